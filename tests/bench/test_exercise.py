"""What memory and race checkers watch on a GPU runs here too, on the CPU's kernels."""

from solar_mega.bench import exercise
from solar_mega.bench.cases import OPERATIONS


def test_every_operation_and_its_variants_run(monkeypatch):
    monkeypatch.setattr(exercise, "SIZES", (exercise.SIZES[0], exercise.SIZES[3]))
    modes = sum(len(operation.modes) for operation in OPERATIONS.values())
    assert exercise.run([]) == 2 * 3 * (modes + len(exercise.VARIANTS))
    assert exercise.run(["dpo_loss"]) == 2 * 3 * (len(OPERATIONS["dpo_loss"].modes) + 1)
