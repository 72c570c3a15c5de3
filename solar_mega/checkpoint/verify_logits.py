"""Do two forms of a model compute the same? Logits of both on the same tokens, in fp32.

    made from the source through the map    by this project's block
    the target, a Hugging Face directory    by transformers
    the target, a Megatron checkpoint       by this project's block, loaded as training loads it

A map that preserves the function (identity, llama-pro, appended identity layers) is held to more: its logits
must be the source's, bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from solar_mega.artifact.hf import HFDirectory
from solar_mega.checkpoint.items import CheckpointTensors
from solar_mega.checkpoint.source import Source
from solar_mega.checkpoint.views import MegatronView
from solar_mega.config.schema import ParallelConfig
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture
from solar_mega.runtime import parallel as ranks

ROWS, LENGTH = 2, 32
TOLERANCE = 1e-4
"""Largest difference of two implementations, relative to the largest logit (at least 1): fp32 rounding
through tens of layers."""


@dataclass(frozen=True)
class LogitsReport:
    """Largest absolute differences of the logits."""

    forms: float
    """Between the model made from the source and the target."""

    scale: float
    """The largest logit."""

    tolerance: float
    function: float | None
    """Between the source and the grown model where the map preserves the function; None where it does not."""

    @property
    def ok(self) -> bool:
        return self.forms <= self.tolerance and not self.function

    def describe(self) -> str:
        lines = [f"logits: the two forms differ by at most {self.forms:.3g} (allowed {self.tolerance:.3g})"]
        if self.function is not None:
            words = (
                "the source's, bit for bit" if not self.function else f"not the source's: {self.function:.3g}"
            )
            lines.append(f"logits: the map preserves the function; they are {words}")
        return "\n".join(lines)


def verify_logits(src: Source, dst: Source, layer_map: LayerMap) -> LogitsReport:
    """Runs both models. One process; memory for a model in fp32. Raises UserError for unsupported ones."""
    if not src.config:
        raise UserError(f"{src.path} has no config, which --logits needs; give --hf-config DIR")
    base = Architecture.from_hf(src.config, str(src.path))
    arch = base.grown(layer_map)
    length = min(LENGTH, arch.max_position_embeddings)
    tokens = torch.randint(0, arch.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))
    with ranks.running(ParallelConfig()):
        identity = LayerMap.parse("identity", base.num_layers)
        grown = _ours(src, base, layer_map, tokens)
        source = _ours(src, base, identity, tokens) if layer_map.preserves_function else None
        same = LayerMap.parse("identity", arch.num_layers)
        found = _transformers(dst, tokens) if dst.kind == "hf" else _ours(dst, arch, same, tokens)
    scale = max(1.0, float(grown.abs().max()))
    return LogitsReport(
        forms=float((grown - found).abs().max()),
        scale=scale,
        tolerance=TOLERANCE * scale if dst.kind == "hf" else 0.0,
        function=None if source is None else float((grown - source).abs().max()),
    )


def _ours(source: Source, base: Architecture, layer_map: LayerMap, tokens: Tensor) -> Tensor:
    """fp32 logits [rows, length, vocabulary] of the model that the map makes of `source`."""
    from solar_mega.checkpoint.from_hf import load_weights
    from solar_mega.model.builder import build_model

    parallel = ParallelConfig()
    (chunk,) = build_model(base.grown(layer_map), parallel, "fp32")
    if source.kind == "hf":
        load_weights([chunk], HFDirectory(source.path).tensors, base, layer_map, parallel)
    else:
        with CheckpointTensors(source.path) as stored:
            load_weights([chunk], MegatronView(stored, base), base, layer_map, parallel)
    chunk.eval()
    device = next(chunk.parameters()).device
    positions = torch.arange(tokens.shape[1], device=device)[None]
    with torch.no_grad():
        rows = [chunk(row[None].to(device), positions, None) for row in tokens]
    return torch.cat(rows).float().cpu()


def _transformers(target: Source, tokens: Tensor) -> Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(target.path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits.float()
