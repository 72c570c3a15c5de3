"""Layers that are averaged, scaled or noised: the same bits from a Megatron checkpoint on any layout as from
the Hugging Face form of the same weights, and what becomes of Adam's states."""

import pytest
import torch

from solar_mega.depth.layer_map import LayerMap
from tests.checkpoint import training
from tests.distributed import run_ranks
from tests.families import make_family
from tests.ranks import layout

LAYERS, STEPS = 4, 2
SPELLING = "0,1,1~2,2,2~2~3,3+scale:0.5@2+o_proj:0@3+noise:0.02:5@2,3+down_proj:-1.5@5"
KINDS = ("fp32", "bf16-dist")
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))


def _save(directory, root):
    """Trains on TP2 x PP2; saves the checkpoint, and the same weights for Hugging Face."""
    from solar_mega.artifact.hf import HFDirectory
    from solar_mega.checkpoint.megatron import save_checkpoint
    from solar_mega.checkpoint.store import CheckpointStore
    from solar_mega.checkpoint.to_hf import export_hf
    from solar_mega.model.architecture import Architecture

    source = HFDirectory(directory)
    arch = Architecture.from_hf(source.config)
    for kind in KINDS:
        precision, distributed = training.KINDS[kind]
        with layout(2, 2, distributed_optimizer=distributed) as parallel:
            identity = LayerMap.parse("identity", LAYERS)
            run = training.start(arch, parallel, kind, source.tensors, arch, identity)
            run.steps(0, STEPS)
            save_checkpoint(CheckpointStore(root / kind), run.chunks, run.optimizer, run.state(STEPS))
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            export_hf(run.chunks, arch, parallel, root / f"{kind}-hf", directory, dtype, "1GB", {})


def _load(root, targets):
    """target -> (values compared, names that differ, a loss of the next step)."""
    from solar_mega.artifact.hf import HFDirectory
    from solar_mega.checkpoint.from_hf import load_weights
    from solar_mega.checkpoint.megatron import load_checkpoint, read_run_state
    from solar_mega.checkpoint.store import CheckpointStore
    from solar_mega.model.architecture import Architecture
    from solar_mega.model.builder import build_model

    layer_map = LayerMap.parse(SPELLING, LAYERS)
    results = {}
    for kind, (tp, pp) in targets:
        path = CheckpointStore(root / kind).latest()
        base = Architecture.from_hf(read_run_state(path).hf_config)
        arch, (precision, distributed) = base.grown(layer_map), training.KINDS[kind]
        with layout(tp, pp, distributed_optimizer=distributed) as parallel:
            run = training.start(arch, parallel, kind)
            load_checkpoint(path, run.chunks, run.optimizer, layer_map)
            expected = build_model(arch, parallel, precision)
            load_weights(expected, HFDirectory(root / f"{kind}-hf").tensors, base, layer_map, parallel)
            compared, wrong = 0, []
            for mine, other in zip(run.chunks, expected, strict=True):
                for (name, a), b in zip(mine.named_parameters(), other.parameters(), strict=True):
                    compared += 1
                    wrong += [] if torch.equal(a, b) else [name]
            states = _wrong_states(path, run, layer_map)
            narrow = _as_bf16(path, arch, base, root, kind, layer_map, parallel)
            results[kind, (tp, pp)] = (compared, wrong, states, narrow, run.steps(STEPS, 1))
    return results


def _as_bf16(path, arch, base, root, kind, layer_map, parallel):
    """Weights alone into a bf16 model: the dtype changes after the map, on both ways."""
    from solar_mega.artifact.hf import HFDirectory
    from solar_mega.checkpoint.from_hf import load_weights
    from solar_mega.checkpoint.megatron import load_checkpoint
    from solar_mega.model.builder import build_model

    mine, other = (build_model(arch, parallel, "bf16") for _ in range(2))
    load_checkpoint(path, mine, None, layer_map)
    load_weights(other, HFDirectory(root / f"{kind}-hf").tensors, base, layer_map, parallel)
    pairs = [(a, b) for x, y in zip(mine, other, strict=True) for a, b in _pairs(x, y)]
    return all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in pairs)


def _pairs(x, y):
    return zip(x.parameters(), y.parameters(), strict=True)


def _wrong_states(path, run, layer_map) -> tuple[int, list[str]]:
    """Moments and master weights against the checkpoint's full tensors, averaged and cut by hand."""
    from megatron.core import dist_checkpointing, parallel_state

    from solar_mega.checkpoint.optimizer_state import states_of

    full = dist_checkpointing.load_plain_tensors(str(path))
    t, compared, wrong = parallel_state.get_tensor_model_parallel_rank(), 0, []
    for chunk in run.chunks:
        for name, parameter in chunk.named_parameters():
            if not name.startswith("decoder.layers."):
                continue
            target = chunk.decoder.layers[int(name.split(".")[2])].layer_number - 1
            key, _ = training._stored_name(name, chunk, layer_map, run.arch)
            held, share = states_of(run.optimizer, parameter)
            for state, tensor in held.items():
                stored = {"master": "param"}.get(state, state)
                parts = [
                    full[f"optimizer.state.{stored}.decoder.layers.{layer}.{key}"]
                    for layer in layer_map.sources_of(target)
                ]
                value = sum(parts) / len(parts)
                if state == "master":
                    modifier = layer_map.modifiers[target]
                    value = value * (modifier.o_proj if "linear_proj" in name else 1)
                    value = value * (modifier.down_proj if "linear_fc2" in name else 1)
                    if modifier.noise and parameter.dim() == 2:
                        if "linear_qkv" in name:
                            continue  # not one stretch of rows; its weights are compared above
                        value = value + _noise(layer_map, target, name, value)
                compared += 1
                expected = training._cut(value, name, t, run.parallel.tp).flatten()[share]
                wrong += [] if torch.equal(tensor.flatten(), expected) else [f"{state} of {name}"]
    return compared, wrong


def _noise(layer_map, target, name, whole):
    from solar_mega.artifact.layer_source import making, noise_rows

    suffixes = {
        "linear_proj": ["self_attn.o_proj"],
        "linear_fc2": ["mlp.down_proj"],
        "linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
    }[name.split(".")[-2]]
    rows = whole.shape[0] // len(suffixes)
    return torch.cat(
        [
            noise_rows(making(layer_map, target, f"{suffix}.weight", 2), (rows, whole.shape[1]), 0, rows)
            for suffix in suffixes
        ]
    )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root = tmp_path_factory.mktemp("changed")
    source = make_family("qwen2", root, LAYERS)
    run_ranks(_save, 4, source, root)
    targets = [(kind, place) for kind in KINDS for place in LAYOUTS]
    return run_ranks(_load, 4, root, targets)


def test_the_same_bits_as_from_hugging_face(loaded):
    for rank in loaded:
        for target, (compared, wrong, _, narrow, _) in rank.items():
            assert compared > 10 and not wrong, (target, wrong)
            assert narrow, target


def test_moments_are_averaged_and_master_weights_made_in_fp32(loaded):
    for target in loaded[0]:
        assert sum(rank[target][2][0] for rank in loaded) > 60
        for rank in loaded:
            assert not rank[target][2][1], (target, rank[target][2][1])


def test_training_goes_on_alike_on_every_layout(loaded):
    """One step from the same states: fp32 sums in another order."""
    (reference,) = loaded[0]["fp32", (1, 1)][4]
    for place in LAYOUTS:
        (step,) = loaded[0]["fp32", place][4]
        assert step == pytest.approx(reference, rel=1e-5)
