"""A tiny training run for checkpoint tests, and a check of loaded states that does not go through sharded
loading.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from solar_mega.checkpoint.run_state import RunState
from solar_mega.config.schema import OptimizerConfig, ParallelConfig, ScheduleConfig
from tests.families import SEQUENCE

KINDS = {  # name -> (precision, distributed optimizer)
    "fp32": ("fp32", False),
    "fp32-dist": ("fp32", True),
    "bf16": ("bf16", False),
    "bf16-dist": ("bf16", True),
}


@dataclass
class Run:
    arch: Any
    parallel: ParallelConfig
    chunks: list
    trainer: Any

    @property
    def optimizer(self):
        return self.trainer.optimizer

    def steps(self, first: int, count: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of steps first .. first + count - 1."""
        results = []
        for step in range(first, first + count):
            result = self.trainer.step(iter(_batches(self.arch.vocab_size, step)), 2)
            results.append((result.loss, result.grad_norm))
        return results

    def state(self, step: int) -> RunState:
        return RunState(
            step=step,
            consumed_samples=2 * step,
            consumed_tokens=2 * step * SEQUENCE,
            schedule=self.trainer.schedule.state_dict(),
            hf_config=dict(self.arch.hf_config),
            config_toml="",
            parallel={},
            source="",
            lineage={},
        )


def start(arch, parallel: ParallelConfig, kind: str, source=None, source_arch=None, layer_map=None) -> Run:
    """A model with weights of `source` (all zero without one), wrapped, with optimizer and schedule."""
    from solar_mega.checkpoint.from_hf import load_weights
    from solar_mega.model.builder import build_model
    from solar_mega.train.optimizer import build_optimizer, build_schedule, wrap
    from solar_mega.train.step import NEXT_TOKEN, Trainer

    precision, _ = KINDS[kind]
    chunks = build_model(arch, parallel, precision)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
    if source is not None:
        load_weights(chunks, source, source_arch, layer_map, parallel)
    wrapped = wrap(chunks, parallel)
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(wrapped, config, parallel, precision)
    schedule = build_schedule(optimizer, ScheduleConfig(warmup_steps=2), config, 20)
    trainer = Trainer(
        wrapped, optimizer, schedule, NEXT_TOKEN, 1, SEQUENCE, pipelined_chunks=parallel.vpp > 1
    )
    return Run(arch, parallel, chunks, trainer)


def _batches(vocabulary: int, step: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    batches = []
    for _ in range(2):
        text = torch.randint(0, vocabulary, (1, SEQUENCE + 1), generator=generator)
        batches.append(
            dict(
                tokens=text[:, :-1],
                labels=text[:, 1:],
                position_ids=torch.arange(SEQUENCE)[None],
                loss_mask=torch.ones(1, SEQUENCE),
            )
        )
    return batches


def differences(path, run: Run, layer_map, with_optimizer: bool = True) -> tuple[int, list[str]]:
    """(values compared, names that differ) between the run's tensors and the checkpoint's full ones, cut by
    hand.
    """
    compared, wrong = 0, []
    for label, mine, expected in pairs_by_hand(path, run, layer_map, with_optimizer):
        compared += 1
        if not torch.equal(mine, expected.to(mine.dtype)):
            wrong.append(label)
    return compared, wrong


def put_by_hand(path, run: Run, layer_map, step: int) -> None:
    """Fills weights, master weights and moments with what `pairs_by_hand` cuts, and sets all step
    counters."""
    inner = run.optimizer.chained_optimizers[0].optimizer
    for group in inner.param_groups:
        for main in group["params"]:
            zeros = {key: torch.zeros_like(main) for key in ("exp_avg", "exp_avg_sq")}
            inner.state[main] = {"step": torch.tensor(float(step)), **zeros}
    for _, mine, expected in pairs_by_hand(path, run, layer_map, True):
        mine.copy_(expected)


def pairs_by_hand(path, run: Run, layer_map, with_optimizer: bool):
    """(name, the run's tensor, the same part of the checkpoint's full tensor)."""
    from megatron.core import dist_checkpointing, parallel_state

    full = dist_checkpointing.load_plain_tensors(str(path))
    t = parallel_state.get_tensor_model_parallel_rank()
    for chunk in run.chunks:
        for name, parameter in chunk.named_parameters():
            key, origin = _stored_name(name, chunk, layer_map, run.arch)

            def whole(prefix, key=key, origin=origin):
                stacked = full.get(f"{prefix}decoder.layers.{key}") if origin is not None else None
                if stacked is not None:
                    return stacked[origin]
                return full[f"{prefix}{key}" if origin is None else f"{prefix}decoder.layers.{origin}.{key}"]

            pairs = [(name, parameter.data, _cut(whole(""), name, t, run.parallel.tp))]
            if with_optimizer:
                pairs += _state_pairs(run, name, parameter, whole, t)
            yield from pairs


def _stored_name(name: str, chunk, layer_map, arch) -> tuple[str, int | None]:
    renamed = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match:
        target = chunk.decoder.layers[int(match[1])].layer_number - 1
        return renamed.get(match[2], match[2]), layer_map[target]
    if name == "output_layer.weight" and arch.tied_embeddings:
        return "embedding.word_embeddings.weight", None
    return name, None


def _cut(whole: torch.Tensor, name: str, t: int, tp: int) -> torch.Tensor:
    if "linear_fc1.weight" in name:
        return torch.cat([half.chunk(tp)[t] for half in whole.chunk(2)])
    if "linear_proj" in name or "linear_fc2" in name:
        return whole.chunk(tp, 1)[t]
    if "norm" in name:
        return whole
    return whole.chunk(tp)[t]


def _state_pairs(run: Run, name: str, parameter, whole, t: int) -> list:
    inner = run.optimizer.chained_optimizers[0]
    kind = type(inner).__name__
    states = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    part = slice(None)
    if kind == "DistributedOptimizer":
        if not any(
            parameter in ranges["param_map"]
            for buckets in inner.gbuf_ranges
            for b in buckets.values()
            for ranges in b
        ):
            return []  # another data-parallel rank's share
        held = inner._get_main_param_and_optimizer_states(parameter)
        share = inner._get_model_param_range_map(parameter)["param"]
        part, states = slice(share.start, share.end), {**states, "param": "param"}
    elif kind == "FP32Optimizer":
        held = inner.optimizer.state[parameter]
    else:
        main = parameter.main_param
        held = {**inner.optimizer.state[main], "fp32_param": main.data}
        states = {**states, "fp32_param": "fp32_param"}
    pairs = []
    for key in states:
        expected = _cut(whole(f"optimizer.state.{key}."), name, t, run.parallel.tp).flatten()[part]
        pairs.append((f"{key} of {name}", held[key].flatten(), expected))
    return pairs


def step_counts(run: Run) -> tuple[set[float], bool]:
    """(step counts of all states, whether each state has a counter of its own)."""
    states = list(run.optimizer.chained_optimizers[0].optimizer.state.values())
    counters = [state["step"] for state in states]
    return {float(step) for step in counters}, len({step.data_ptr() for step in counters}) == len(counters)


def save_homogeneous(run, path):
    """As stock Megatron saves by default: the layers of a parameter stacked into one tensor."""
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    from solar_mega.runtime import parallel

    if parallel.is_main():
        path.mkdir()
    torch.distributed.barrier()
    content = {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": False}
    metadata = ensure_metadata_has_dp_cp_group(dict(content))
    model = run.chunks[0].sharded_state_dict(metadata=metadata)
    optimizer = run.optimizer.sharded_state_dict(model, metadata=metadata)
    dist_checkpointing.save({"model": model, "optimizer": optimizer}, str(path), content_metadata=content)
