"""One layout on one cluster: does it fit, how long is a step, where does the time go.

    step = (m + (pp - 1) / vpp) * slowest stage + what of the communication is not hidden + optimizer
    slowest stage = FLOPs / (tp * peak * kernel efficiency) + tensor-parallel traffic / link

Two figures of speed stand side by side. The stated MFU is the user's: tokens/s, days and GPU-hours follow
from it alone. The estimate compares layouts: it assumes what share of the peak kernels reach while they run
(`kernel_efficiency`) and takes bubble, imbalance, recomputation and exposed communication from the layout.
Neither was measured.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from solar_mega.config.check import TrainingConfig
from solar_mega.model.activations import Shape
from solar_mega.model.architecture import Architecture
from solar_mega.model.buffers import bucket_size
from solar_mega.model.layout import layers_of_chunk
from solar_mega.model.memory import StageMemory, stage_memory
from solar_mega.model.traffic import Traffic, stage_flops, stage_traffic
from solar_mega.runtime.gpus import Gpu

MESSAGE_SECONDS = 5e-5
"""Assumed cost of starting one send or receive between stages, which no overlap hides; it keeps plans from
cutting a pipeline into ever smaller chunks."""


@dataclass(frozen=True)
class Cluster:
    gpus: int
    gpu: Gpu
    gpus_per_node: int
    network: float
    """Bytes/s per GPU and direction between nodes."""

    reserve: int
    """Bytes of a GPU left to the CUDA context, NCCL's buffers and fragmentation."""

    mfu: float
    """Stated: share of the peak that a whole step reaches."""

    kernel_efficiency: float
    """Assumed: share of the peak that kernels reach while they run."""


@dataclass(frozen=True)
class Stage:
    """A rank of one pipeline stage."""

    layers: tuple[str, ...]
    """Of each chunk, as `0-5`."""

    memory: StageMemory
    traffic: Traffic
    seconds: float
    """Of one micro-batch, forward and backward, tensor-parallel communication included."""


@dataclass(frozen=True)
class Link:
    """Communication of the busiest stage."""

    what: str
    ranks: int
    over: str
    """nvlink or network."""

    sent: float
    """Bytes per rank and step."""

    seconds: float
    exposed: float
    """Seconds that computation does not hide."""


@dataclass(frozen=True)
class Estimate:
    cfg: TrainingConfig
    arch: Architecture
    cluster: Cluster
    dp: int
    micro_batches: int
    """Per pipeline and step."""

    stages: tuple[Stage, ...]
    links: tuple[Link, ...]
    bubble: float
    """Share of the pipeline's time that a rank waits for its turn, at equal stages."""

    imbalance: float
    """Slowest stage over the mean, less 1."""

    step_seconds: float

    @property
    def memory(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.memory + self.cluster.reserve <= self.cluster.gpu.memory

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.train.global_batch_size * self.cfg.train.seq_length

    @property
    def flops_per_step(self) -> float:
        """Recomputation not counted."""
        return self.tokens_per_step * self.arch.flops_per_token(self.cfg.train.seq_length)

    @property
    def estimated_mfu(self) -> float:
        return self.flops_per_step / (self.step_seconds * self._peak)

    @property
    def stated_seconds(self) -> float:
        """Of a step at the stated MFU."""
        return self.flops_per_step / (self.cluster.mfu * self._peak)

    @property
    def _peak(self) -> float:
        return self.cluster.gpus * self.cluster.gpu.peak(self.cfg.train.precision)

    def to_json(self) -> dict[str, Any]:
        """Bytes, seconds, elements; nothing rounded."""
        train, parallel = self.cfg.train, self.cfg.parallel
        return {
            "layout": {**asdict(parallel), "dp": self.dp},
            "gpus": self.cluster.gpus,
            "gpu": asdict(self.cluster.gpu),
            "parameters": self.arch.parameters(),
            "layers": self.arch.num_layers,
            "micro_batch_size": train.micro_batch_size,
            "micro_batches": self.micro_batches,
            "recompute": train.recompute,
            "tokens_per_step": self.tokens_per_step,
            "steps": train.steps,
            "flops": self.flops_per_step * train.steps,
            "fits": self.fits,
            "memory": self.memory,
            "reserve": self.cluster.reserve,
            "stages": [
                {**asdict(stage), "memory": {**asdict(stage.memory), "total": stage.memory.total}}
                for stage in self.stages
            ],
            "communication": [asdict(link) for link in self.links],
            "bubble": self.bubble,
            "imbalance": self.imbalance,
            "stated": {"mfu": self.cluster.mfu, **self._speed(self.stated_seconds)},
            "estimated": {
                "mfu": self.estimated_mfu,
                "kernel_efficiency": self.cluster.kernel_efficiency,
                **self._speed(self.step_seconds),
            },
        }

    def _speed(self, seconds: float) -> dict[str, float]:
        total = seconds * self.cfg.train.steps
        return {
            "step_seconds": seconds,
            "tokens_per_second": self.tokens_per_step / seconds,
            "days": total / 86400,
            "gpu_hours": total / 3600 * self.cluster.gpus,
        }


def estimate(cfg: TrainingConfig, arch: Architecture, cluster: Cluster) -> Estimate:
    """`cfg` and `arch` (at the depth trained) on `cluster`; they must have passed `check_run` and
    `check_layout` for that many GPUs."""
    parallel, train = cfg.parallel, cfg.train
    dp = cluster.gpus // (parallel.tp * parallel.pp)
    shape = Shape(arch, parallel, train, cfg.kernels)
    micro_batches = train.global_batch_size // (train.micro_batch_size * dp)
    stages = tuple(_stage(shape, cluster, dp, p, micro_batches) for p in range(parallel.pp))
    slowest = max(stage.seconds for stage in stages)
    ramp = (parallel.pp - 1) / parallel.vpp
    links = _links(shape, cluster, dp, stages, micro_batches)
    # Tensor-parallel communication is already in the stages' seconds.
    exposed = sum(link.exposed for link in links if link.what != "tensor")
    share = max(stage.memory.optimizer for stage in stages)
    optimizer = 2 * share / cluster.gpu.memory_bandwidth  # read and written once
    return Estimate(
        cfg=cfg,
        arch=arch,
        cluster=cluster,
        dp=dp,
        micro_batches=micro_batches,
        stages=stages,
        links=links,
        bubble=ramp / (micro_batches + ramp),
        imbalance=slowest * len(stages) / sum(stage.seconds for stage in stages) - 1,
        step_seconds=(micro_batches + ramp) * slowest + exposed + optimizer,
    )


def _stage(shape: Shape, cluster: Cluster, dp: int, pp_rank: int, micro_batches: int) -> Stage:
    parallel = shape.parallel
    chunks = [layers_of_chunk(shape.arch.num_layers, parallel, pp_rank, v) for v in range(parallel.vpp)]
    traffic = stage_traffic(shape, dp, pp_rank)
    rate = parallel.tp * cluster.gpu.peak(shape.train.precision) * cluster.kernel_efficiency
    tensor = traffic.tensor / micro_batches / _tensor_link(cluster, parallel.tp)[1]
    return Stage(
        layers=tuple(f"{c.start}-{c.stop - 1}" if len(c) > 1 else str(c.start) for c in chunks),
        memory=stage_memory(shape, dp, pp_rank),
        traffic=traffic,
        seconds=stage_flops(shape, pp_rank) / rate + tensor,
    )


def _links(
    shape: Shape, cluster: Cluster, dp: int, stages: tuple[Stage, ...], micro_batches: int
) -> tuple[Link, ...]:
    tp, pp, vpp = shape.parallel.tp, shape.parallel.pp, shape.parallel.vpp
    found = []
    if tp > 1:
        over, rate = _tensor_link(cluster, tp)
        sent = max(stage.traffic.tensor for stage in stages)
        found.append(Link("tensor", tp, over, sent, sent / rate, sent / rate))
    if pp > 1:
        over, rate = _pair_link(cluster, tp * dp * pp)
        sent = max(stage.traffic.pipeline for stage in stages)
        # The interleaved schedule sends while it computes (overlap_p2p_comm); 1F1B waits.
        starting = 2 * vpp * micro_batches * MESSAGE_SECONDS
        exposed = starting + (sent / rate if vpp == 1 else 0.0)
        found.append(Link("pipeline", pp, over, sent, sent / rate + starting, exposed))
    if dp > 1:
        over, rate = _data_link(cluster, tp, dp)
        for what in ("gradients", "weights"):
            sent = max(getattr(stage.traffic, what) for stage in stages)
            if sent:
                exposed = max(_exposed(shape, dp, p, stages[p], what, rate) for p in range(pp))
                found.append(Link(what, dp, over, sent, sent / rate, exposed))
    copied = max(stage.traffic.embedding for stage in stages)
    if copied:
        over, rate = _pair_link(cluster, tp * dp * pp)
        found.append(Link("embedding", 2, over, copied, copied / rate, copied / rate))
    return tuple(found)


def _exposed(shape: Shape, dp: int, pp_rank: int, stage: Stage, what: str, rate: float) -> float:
    """Seconds of a stage's data-parallel communication that no computation hides.

    Overlapped, a chunk's gradients are reduced while other chunks compute. Of the first stage's first chunk,
    whose backward is the step's end, all but one bucket goes along with that backward; later stages have
    finished one chunk's time earlier each. Weights: the same the other way round.
    """
    parallel = shape.parallel
    seconds, vpp = getattr(stage.traffic, what) / rate, parallel.vpp
    if not (parallel.overlap_grad_reduce if what == "gradients" else parallel.overlap_param_gather):
        return seconds
    chunk = stage.seconds / vpp * (2 / 3 if what == "gradients" else 1 / 3)  # backward, forward
    if pp_rank > 0:
        return max(0.0, seconds / vpp - pp_rank * chunk, seconds - (vpp - 1 + pp_rank) * chunk)
    lone = min(1.0, (bucket_size(parallel, dp) or math.inf) / stage.memory.parameters)
    return max(seconds * lone, seconds - vpp * chunk)


def _tensor_link(cluster: Cluster, tp: int) -> tuple[str, float]:
    """rank = tp + TP * (dp + DP * pp): tensor-parallel ranks are neighbours."""
    if tp <= cluster.gpus_per_node:
        return "nvlink", cluster.gpu.nvlink
    return "network", min(cluster.gpu.nvlink, cluster.network * cluster.gpus_per_node)


def _data_link(cluster: Cluster, tp: int, dp: int) -> tuple[str, float]:
    """Each member that a group has in a node brings its own network adapter."""
    if tp * dp <= cluster.gpus_per_node:
        return "nvlink", cluster.gpu.nvlink
    members = max(1, cluster.gpus_per_node // tp)
    return "network", min(cluster.gpu.nvlink, cluster.network * members)


def _pair_link(cluster: Cluster, world: int) -> tuple[str, float]:
    inside = world <= cluster.gpus_per_node
    return ("nvlink", cluster.gpu.nvlink) if inside else ("network", cluster.network)
