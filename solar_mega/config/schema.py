"""What a run can be told: one frozen dataclass per concern, one field per decision.

The docstring under each field is its help text (`solar-mega VERB --help` shows it), so units and
defaults live here and nowhere else. `load.py` reads TOML into these, `check.py` finds what is wrong
with them before any work starts.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "bf16"]
Implementation = Literal["fused", "reference"]


@dataclass(frozen=True)
class ModelConfig:
    path: Path
    """Hugging Face directory or Megatron checkpoint that gives the architecture and, unless
    `weights = "random"`, the weights. For random weights a directory holding only `config.json` will do."""

    layer_map: str = "identity"
    """Depth: which source layer each target layer starts from. `identity`, `dus:M` (drop the last M
    layers of the model and the first M of its copy), `stack:G`, `interleave:G`, `repeat:A-B`,
    `llama-pro:K`, `append:K`, `mean`, `slices:0-24,8-32`, a list `0,1,2,1,2,3` or a mergekit recipe.yaml;
    then changes such as `+freeze@originals` or `+scale:0.5@24-48` (docs/layer_maps.md)."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` keeps the architecture (through `layer_map`) and initialises from `train.seed`."""

    init_std: float | None = None
    """Standard deviation of random initialisation; default: `initializer_range` of the source's
    config.json."""


@dataclass(frozen=True)
class ParallelConfig:
    tp: int = 1
    """Tensor-parallel ranks: each layer's matrices are split this many ways."""

    pp: int = 1
    """Pipeline stages: the layers are split this many ways, in order."""

    vpp: int = 1
    """Virtual stages (model chunks) per pipeline rank; above 1 uses the interleaved schedule."""

    dp: int | None = None
    """Data-parallel replicas. Derived from the world size; give it to have it checked."""

    sequence_parallel: bool = False
    """Split norms and residuals along the sequence inside a tensor-parallel group (needs tp > 1)."""

    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks. May change at a resume."""

    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks bucket by bucket, while the backward pass goes on."""

    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket during the next forward pass (needs `distributed_optimizer` and
    `overlap_grad_reduce`)."""

    bucket_size: int | None = None
    """Weights in a bucket of those two; default: Megatron's, 40 million, or a million for each replica if
    that is more. Only the first pipeline stage's first chunk is cut: the others have time to spare."""

    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with the products around it, in Transformer Engine's user buffers
    (needs `kernels.linear = "te"`, tp > 1 and `sequence_parallel`)."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    """Optimizer steps of the whole run, counted from its beginning (a resumed run ends at the same step)."""

    seq_length: int
    """Tokens per sample."""

    global_batch_size: int
    """Samples per optimizer step over all ranks."""

    micro_batch_size: int = 1
    """Samples per forward pass on one data-parallel rank."""

    precision: Precision = "bf16"
    """`bf16` trains bf16 weights over fp32 master weights; `fp32` everything in fp32."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention only, or whole layers."""

    seed: int = 1234
    """Seeds weights, dropout and the order of the data."""

    eval_interval: int = 0
    """Steps between validations; 0 validates only at the start and at the end."""

    eval_samples: int = 64
    """Validation samples (of `seq_length` tokens) per validation; 0 turns validation off."""

    log_interval: int = 10
    """Steps between console lines; `metrics.jsonl` has every step."""

    threads: int | None = None
    """CPU threads per process (CPU runs only); default: cores divided by local ranks."""

    skip_nonfinite: int = 0
    """Steps that may be left out of the run because their loss or gradient is not finite; the next one ends
    it. Their samples are consumed, the learning rate does not move."""

    spike_deviations: float = 8.0
    """A loss this many deviations above the median of the last 64 steps gets a line naming its samples; 0
    turns it off."""

    straggler_interval: int = 100
    """Steps between comparisons of the ranks' forward times; 0 turns them off."""

    hang_seconds: float = 600.0
    """A step or validation batch that takes longer has hung: every rank writes the stacks of its threads to
    `<output.dir>/hangs/` and the run ends. Four times as long for a save; 0 turns it off."""

    profile: tuple[int, int] | None = None
    """First and last step to trace with torch's profiler, on every rank, into `<output.dir>/profile/`."""


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 3e-4
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate at the end of the decay."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled (AdamW); not applied to norms and biases."""

    clip_grad: float = 1.0
    """Global gradient norm; 0 turns clipping off."""


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """Cosine decay, warm-up-stable-decay, or constant after warm-up."""

    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to `optimizer.lr`."""

    decay_steps: int | None = None
    """Cosine: steps until `min_lr` is reached (default: `train.steps`). WSD: length of the final decay
    (default: a tenth of `train.steps`)."""

    wsd_decay: Literal["linear", "cosine", "minus_sqrt", "exponential"] = "minus_sqrt"
    """Shape of the WSD decay."""


@dataclass(frozen=True)
class DataConfig:
    train: tuple[str, ...]
    """Tokenised corpora (`.bin/.idx` prefixes), each optionally with a weight:
    `["0.7 a/text", "0.3 b/code"]`."""

    valid: tuple[str, ...] = ()
    """Validation corpora; empty splits `train` by documents as `split` says."""

    split: tuple[float, float] = (0.98, 0.02)
    """Train and validation shares of the documents when `valid` is empty."""

    tokenizer: Path | None = None
    """Tokenizer directory or SentencePiece model the corpora were made with; default: the model's own."""

    cache: Path | None = None
    """Where sample indices are cached; default: `<output.dir>/data_cache`."""


@dataclass(frozen=True)
class CheckpointConfig:
    interval: int = 0
    """Steps between saves; 0 saves only at the end (and when a signal asks for it)."""

    interval_minutes: float = 0.0
    """Minutes between saves, beside or instead of `interval`; 0 turns it off."""

    async_save: bool = False
    """Write checkpoints beside the training, which goes on as soon as the state is set aside. One save at a
    time; the run waits for the last one before it ends."""

    on_failure: Literal["stop", "continue"] = "stop"
    """When a save fails (disk full): stop, or go on and try again at the next interval. Older checkpoints are
    intact either way. The save at the end, or on a signal, always stops."""

    keep: int = 2
    """Newest complete checkpoints kept; never below 2."""

    resume: Literal["auto", "never", "must"] = "auto"
    """`auto` continues from `<output.dir>/checkpoints/latest` where there is one, `must` fails where there
    is none, `never` refuses to start over a directory that has checkpoints."""

    save_optimizer: bool = True
    """Keep optimizer state in checkpoints; without it a checkpoint can be loaded but not resumed."""

    hashes: bool = True
    """Keep a SHA-256 of every file of a checkpoint."""

    verify: bool = True
    """Compare the files with their hashes before resuming; the ranks share the reading."""

    fallback: bool = False
    """When the newest checkpoint is damaged, set it aside and resume from the one before it. Otherwise a
    damaged checkpoint is an error."""


@dataclass(frozen=True)
class OutputConfig:
    dir: Path
    """Everything the run writes: `metrics.jsonl`, `config.toml`, `checkpoints/`, `hf/`."""

    export_hf: bool = True
    """Write the trained model as a Hugging Face directory `<dir>/hf` at the end."""

    export_precision: Precision | None = None
    """dtype of the exported weights; default: that of the source directory."""

    shard_size: str = "5GB"
    """Largest safetensors file of an export, as transformers spells it."""

    tensorboard: bool = False
    """Write `<dir>/tensorboard` beside `metrics.jsonl` (needs the extra `tracking`)."""

    wandb: str | None = None
    """Project of Weights & Biases to log into (needs the extra `tracking`)."""

    wandb_mode: Literal["online", "offline"] | None = None
    """`offline` keeps the run in `<dir>/wandb`, for `wandb sync` from a machine with a connection. Default:
    what the environment variable WANDB_MODE says, else online."""


@dataclass(frozen=True)
class KernelConfig:
    rms_norm: Implementation = "fused"
    """RMSNorm and residual add: the compiled op or the PyTorch reference."""

    rotary: Implementation = "fused"
    """Split of the packed QKV and rotary embedding: the compiled op or the PyTorch reference."""

    swiglu: Implementation = "fused"
    """Gated activation of the feed-forward layer: the compiled op or the PyTorch reference."""

    attention: Literal["fused", "sdpa", "flash", "te", "reference"] = "fused"
    """Core attention: the compiled op on CPUs and PyTorch's scaled_dot_product_attention on GPUs, the latter
    everywhere, flash-attn or Transformer Engine (both for GPUs, if installed), or megatron-core's unfused
    softmax."""

    linear: Literal["local", "te"] = "local"
    """Linears of the layers: Megatron's with this project's CPU products, or Transformer Engine's (for GPUs,
    if installed)."""

    fp8: Literal["off", "tensorwise", "blockwise", "mxfp8"] = "off"
    """Products of `linear = "te"` in FP8: one scale a tensor (Ada, Hopper and newer; e4m3 forward, e5m2
    backward), one per 128 x 128 or 1 x 128 block (Hopper and newer, e4m3), or one per 32 elements (Blackwell,
    e4m3). Scales are those of the tensor at hand. Weights stay bf16; head and embedding are not touched."""

    gradient_accumulation_fusion: bool = False
    """On GPUs, weight gradients are added to their fp32 buffer by the product itself: apex's extension, or
    Transformer Engine with `linear = "te"`. On CPUs they always are."""

    token_loss: Implementation = "fused"
    """Vocabulary-parallel cross entropy: the compiled ops, or megatron-core's own over all logits."""

    loss_logits_mib: int = 64
    """MiB of logits that the fused loss holds at a time; 0 computes all of a micro-batch's logits at once."""


@dataclass(frozen=True)
class PretrainConfig:
    """`solar-mega pretrain`: (continued) pretraining of a model grown through a layer map."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    output: OutputConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
