"""The memory arithmetic against what building, wrapping and stepping a model really allocates."""

import pytest
import torch

from solar_mega.config.schema import KernelConfig, ParallelConfig, TrainConfig
from solar_mega.model.activations import Shape, chunk_saved, in_flight, stage_saved
from solar_mega.model.buffers import buffer
from solar_mega.model.memory import stage_memory
from solar_mega.model.parameters import Weight, stage_weights
from tests.distributed import run_ranks
from tests.train.tiny import SEQUENCE, Case, architecture

LAYOUTS = {
    "tp2 pp2": dict(tp=2, pp=2),
    "tp2 pp2 sp, all have the optimizer": dict(
        tp=2, pp=2, sequence_parallel=True, distributed_optimizer=False
    ),
    "pp2 vpp2 dp2": dict(pp=2, vpp=2),
    "pp2 dp2, all have the optimizer": dict(pp=2, distributed_optimizer=False),
    "dp4": dict(),
    "tp2 dp2": dict(tp=2),
    "pp4": dict(pp=4),
    "dp4, buckets": dict(overlap_grad_reduce=True, bucket_size=2000),
    "pp2 vpp2 dp2, buckets": dict(
        pp=2, vpp=2, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=1
    ),
}
CASES = [(name, tied, precision) for name in LAYOUTS for tied, precision in ((False, "fp32"), (True, "bf16"))]


def allocate_everything(cases) -> list[dict]:
    from tests.ranks import layout

    found = []
    for name, tied, precision in cases:
        case = Case(precision=precision, tied=tied, micro_batch_size=1).on(**LAYOUTS[name])
        with layout(**LAYOUTS[name]):
            found.append(_allocated(case))
    return found


def _allocated(case: Case) -> dict:
    """Bytes, and the elements of each chunk's parameters."""
    from megatron.core import parallel_state

    from tests.train.tiny import batches, start

    chunks, trainer = start(case)
    data, count = batches(case)
    assert trainer.step(data, count).updated
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for c in chunks for p in c.parameters()}
    return dict(
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        elements=[[p.numel() for p in chunk.parameters()] for chunk in chunks],
        weights=sum(storage.nbytes() for storage in storages.values()),
        gradients=sum(b.grad_data.nbytes for replica in trainer.chunks for b in replica.buffers),
        optimizer=_optimizer_bytes(trainer.optimizer),
    )


def _optimizer_bytes(optimizer) -> int:
    total = 0
    for inner in optimizer.chained_optimizers:
        for state in inner.optimizer.state.values():
            total += sum(t.nbytes for name, t in state.items() if name != "step")
        for groups in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            total += sum(t.nbytes for group in getattr(inner, groups, []) for t in group)
    return total


def shape_of(case: Case, **train) -> Shape:
    settings = dict(
        steps=1,
        seq_length=SEQUENCE,
        global_batch_size=8,
        micro_batch_size=case.micro_batch_size,
        precision=case.precision,
        recompute=case.recompute,
    )
    return Shape(
        architecture(case.tied), case.parallel, TrainConfig(**settings | train), case.kernels, cuda=False
    )


@pytest.fixture(scope="module")
def allocated():
    return dict(zip(CASES, zip(*run_ranks(allocate_everything, 4, CASES), strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_state_is_what_gets_allocated(allocated, case):
    name, tied, precision = case
    shape = shape_of(Case(precision=precision, tied=tied, micro_batch_size=1).on(**LAYOUTS[name]))
    for real in allocated[case]:
        planned = stage_memory(shape, real["dp"], real["pp_rank"], dp_rank=real["dp_rank"])
        chunks = stage_weights(shape.arch, shape.parallel, real["pp_rank"])
        counted = [[weight.elements for weight in weights] for weights in chunks]
        assert counted == real["elements"]
        assert planned.parameters == sum(map(sum, counted))
        assert (planned.weights, planned.gradients) == (real["weights"], real["gradients"])
        assert planned.optimizer == real["optimizer"]


def test_all_ranks_together_hold_the_model_once():
    for arch in (architecture(), architecture(tied=True)):
        for parallel in (ParallelConfig(), ParallelConfig(tp=2, pp=2), ParallelConfig(pp=2, vpp=2)):
            stages = [stage_weights(arch, parallel, p) for p in range(parallel.pp)]
            weights = [weight for stage in stages for chunk in stage for weight in chunk]
            norms = sum(weight.elements for weight in weights if "norm" in weight.name)
            total = parallel.tp * sum(weight.elements for weight in weights) - (parallel.tp - 1) * norms
            copied = arch.embedding_parameters() if arch.tied_embeddings and parallel.pp > 1 else 0
            assert total == arch.parameters() + copied


def test_buckets_are_padded_and_dealt():
    weights = [Weight("a", 100), Weight("b", 300), Weight("c", 70)]
    one = buffer(weights, dp=3, distributed=True)  # c at 0, b at 128, a at 448; lcm(3, 128) = 384
    assert one.elements == 768 and one.shares == (70 + 128, 172 + 64, 36)
    two = buffer(weights, dp=3, distributed=True, bucket_size=300)
    assert two.elements == 768 + 384 and sum(two.shares) == 470
    assert buffer(weights, 3, distributed=False).shares == (470, 470, 470)


# ---------------------------------------------------------------------------------------------- activations

SAVED = [
    ("fp32", "none", {}),
    ("bf16", "none", {}),
    ("bf16", "none", {"tp": 2}),
    ("fp32", "none", {"tp": 2, "sequence_parallel": True}),
    ("bf16", "full", {"tp": 2, "sequence_parallel": True}),
    ("fp32", "full", {}),
    ("fp32", "selective", {}),
    ("fp32", "none", {"pp": 2}),
]
TOLERANCE = 0.02
"""The loss of one rank alone keeps a few bytes a token less than the arithmetic says."""


def saved_by_one_forward(cases) -> list[tuple[int, int]]:
    """(pipeline stage, bytes) of each case on this rank."""
    from megatron.core import parallel_state

    from tests.ranks import layout

    found = []
    for precision, recompute, parallel in cases:
        case = Case(precision=precision, recompute=recompute).on(**parallel)
        with layout(**parallel):
            found.append((parallel_state.get_pipeline_model_parallel_rank(), _saved(case)))
    return found


def _saved(case: Case) -> int:
    """Bytes of the storages that a chunk's forward keeps, weights and rotary tables not counted."""
    from megatron.core import parallel_state

    from tests.train.tiny import start

    (chunk,), trainer = start(case)
    model, b = trainer.chunks[0], case.micro_batch_size
    ids = torch.arange(SEQUENCE).repeat(b, 1)
    batch = dict(tokens=ids, labels=ids.clone(), position_ids=ids.clone(), loss_mask=torch.ones(b, SEQUENCE))
    if not parallel_state.is_pipeline_first_stage():
        arch = architecture()
        chunk.set_input_tensor(
            torch.randn(SEQUENCE, b, arch.hidden_size, dtype=chunk.config.params_dtype, requires_grad=True)
        )
    chunk.train()
    known = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    known |= {m.data_ptr() for layer in chunk.decoder.layers for m in layer.self_attention.tables}
    storages: dict[int, int] = {t.untyped_storage().data_ptr(): t.nbytes for t in batch.values()}
    alive = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = trainer.objective.forward(model, batch)
    if not parallel_state.is_pipeline_last_stage():
        storages[output.untyped_storage().data_ptr()] = output.untyped_storage().nbytes()
    return sum(storages.values())


def test_saved_activations():
    found = zip(*run_ranks(saved_by_one_forward, 2, SAVED), strict=True)
    for (precision, recompute, parallel), ranks in zip(SAVED, found, strict=True):
        shape = shape_of(Case(precision=precision, recompute=recompute).on(**parallel))
        for pp_rank, real in ranks:
            planned = chunk_saved(shape, last=pp_rank == shape.parallel.pp - 1)
            assert planned == pytest.approx(real, rel=TOLERANCE), (precision, recompute, parallel, pp_rank)


def test_in_flight_follows_megatrons_schedules():
    assert [in_flight(ParallelConfig(pp=4), 8, p) for p in range(4)] == [4, 3, 2, 1]
    assert [in_flight(ParallelConfig(pp=4), 2, p) for p in range(4)] == [2, 2, 2, 1]
    assert [in_flight(ParallelConfig(pp=4, vpp=3), 8, p) for p in range(4)] == [15, 13, 11, 9]
    assert in_flight(ParallelConfig(), 64, 0) == 1


def test_full_recomputation_keeps_the_layers_input_alone():
    kernels = KernelConfig()
    arch = architecture(num_hidden_layers=8)
    train = TrainConfig(steps=1, seq_length=64, global_batch_size=8, precision="bf16", recompute="full")
    shape = Shape(arch, ParallelConfig(pp=2), train, kernels)
    inputs = 4 * 64 * arch.hidden_size * 2  # 4 layers a stage
    assert stage_saved(shape, 8, 0) == 2 * (inputs + 64 * 28 + 64 * arch.hidden_size * 2)
