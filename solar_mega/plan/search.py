"""Every layout that a run could have on a cluster, the ones that fit by estimated time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from solar_mega.config.check import TrainingConfig, check_run
from solar_mega.config.schema import ParallelConfig
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import check_layout
from solar_mega.plan.estimate import Cluster, Estimate, estimate

RECOMPUTE = ("none", "full")
"""`selective` matters where attention keeps its scores, which the attention kernels here do not."""

LARGEST_MICRO_BATCH = 16


@dataclass(frozen=True)
class Found:
    best: tuple[Estimate, ...]
    """Those that fit, fastest first; of layouts that differ in recomputation only, the faster one."""

    tried: int
    """Layouts that the model, the batch and the cluster allow."""

    smallest: Estimate | None
    """The one with the least memory, whether it fits or not."""


def search(cfg: TrainingConfig, arch: Architecture, cluster: Cluster) -> Found:
    """Tries tp x pp x vpp x micro-batch x recomputation; dp follows from the number of GPUs. Sequence, data,
    steps and global batch stay as `cfg` says.

    Tensor parallelism stays within a node and always takes sequence parallelism along.
    """
    tried, fitting = 0, []
    smallest: Estimate | None = None
    for candidate in candidates(cfg, arch, cluster):
        tried += 1
        found = estimate(candidate, arch, cluster)
        if smallest is None or found.memory < smallest.memory:
            smallest = found
        if found.fits:
            fitting.append(found)
    fitting.sort(key=lambda found: (found.step_seconds, found.memory))
    return Found(tuple(fitting), tried, smallest)


def candidates(cfg: TrainingConfig, arch: Architecture, cluster: Cluster) -> Iterator[TrainingConfig]:
    """Configurations that `check_run` and `check_layout` accept."""
    for parallel in _layouts(arch, cluster, cfg.parallel):
        dp = cluster.gpus // (parallel.tp * parallel.pp)
        for micro_batch in _powers_of_two(LARGEST_MICRO_BATCH):
            if cfg.train.global_batch_size % (micro_batch * dp):
                break
            for recompute in RECOMPUTE:
                train = replace(cfg.train, micro_batch_size=micro_batch, recompute=recompute)
                train = replace(train, eval_samples=_nearest(cfg.train.eval_samples, micro_batch * dp))
                candidate = replace(cfg, parallel=parallel, train=train)
                if _allowed(candidate, arch, cluster.gpus):
                    yield candidate


def _layouts(arch: Architecture, cluster: Cluster, base: ParallelConfig) -> Iterator[ParallelConfig]:
    for tp in _powers_of_two(min(cluster.gpus_per_node, cluster.gpus)):
        for pp in _divisors(arch.num_layers):
            if cluster.gpus % (tp * pp):
                continue
            for vpp in _divisors(arch.num_layers // pp) if pp > 1 else [1]:
                yield replace(base, tp=tp, pp=pp, vpp=vpp, dp=None, sequence_parallel=tp > 1)


def _allowed(cfg: TrainingConfig, arch: Architecture, gpus: int) -> bool:
    try:
        check_run(cfg, gpus)
    except UserError:
        return False
    return not check_layout(arch, cfg.parallel, cfg.train.seq_length).texts


def _nearest(samples: int, multiple: int) -> int:
    """Validation samples rounded up to what the candidate can validate on."""
    return -(-samples // multiple) * multiple


def _powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _divisors(value: int) -> list[int]:
    return [d for d in range(1, value + 1) if value % d == 0]
