"""A training that is over leaves nothing behind in its process."""

import gc
import os

from tests.train.tiny import Case, batches, one_rank, start


def descriptors_after_training() -> int:
    """Process groups hold sockets and threads for as long as anything of a model is alive."""
    with one_rank():
        _, trainer = start(Case())
        data, micro_batches = batches(Case())
        trainer.step(data, micro_batches)
        data.close()
        del trainer, data
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_training_takes_the_place_of_the_one_before():
    descriptors_after_training()  # what torch opens once in a process
    before = descriptors_after_training()
    assert descriptors_after_training() <= before
