"""Hugging Face model directories: config, weights, and the files that travel along."""

import copy
import fnmatch
import json
import os
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import Problems, UserError

SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that hold no weights and are right at any depth: tokenizer, generation settings, licence."""

# Settings that give a layer its kind by its number. A map that moves layers would silently change what they
# mean, and they cannot say what a grown model needs. Values that mean "every layer alike" are harmless.
POSITIONAL_KEYS = (
    "attn_layer_offset",
    "attn_layer_period",
    "cross_attention_layers",
    "decoder_sparse_step",
    "expert_layer_offset",
    "expert_layer_period",
    "first_k_dense_replace",
    "global_attn_every_n_layers",
    "interleave_moe_layer_step",
    "mlp_only_layers",
    "num_kv_shared_layers",
)
_EVERY = ("_step", "_period", "_n_layers")  # 1 in these means "every layer"

# Families whose every p-th layer attends to everything and the others to a sliding window, by the layer's
# number, unless `layer_types` says it layer by layer.
_WINDOW_PERIOD = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}

# The first layer with a sliding window where the config names none.
_FIRST_WINDOW = {"qwen2": 28, "qwen3": 28}

# Lists that may happen to be as long as the model is deep, but are not about layers.
_NOT_PER_LAYER = re.compile(
    r"(^architectures|_ids?|_tokens|_sections?|_sizes?|_strides?|_kernels?|languages)$"
)

_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def split_layer(name: str) -> tuple[int | None, str]:
    """`model.layers.7.mlp.up_proj.weight` -> (7, "mlp.up_proj.weight"); (None, name) for any other tensor."""
    match = _LAYER.match(name)
    return (int(match[1]), match[2]) if match else (None, name)


def layer_name(layer: int, suffix: str) -> str:
    """The inverse of `split_layer` for a layer's tensor."""
    return f"model.layers.{layer}.{suffix}"


class HFDirectory:
    """A model directory as transformers saves it. Opening it reads config.json only.

    Raises UserError when there is no such directory, or no config.json that names architecture and depth.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            hint = ""
            if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
                hint = f"; if it is a Hugging Face Hub name: hf download {path} --local-dir DIR"
            raise UserError(f"{path} is not a directory; give a Hugging Face model directory{hint}")
        self.config: dict[str, Any] = _read_config(self.path)

    def __repr__(self) -> str:
        return f"HFDirectory({str(self.path)!r})"

    @property
    def architecture(self) -> str:
        """transformers' class name, such as LlamaForCausalLM."""
        return self.config["architectures"][0]

    @property
    def num_layers(self) -> int:
        return self.config["num_hidden_layers"]

    @cached_property
    def tensors(self) -> SafetensorsReader:
        """The weights; headers are read and checked at the first use."""
        return SafetensorsReader(self.path)

    @property
    def side_files(self) -> tuple[str, ...]:
        """Names of files, and template directories, that an exported or grown model takes over."""
        patterns = [*SIDE_FILES, *(["*.py"] if "auto_map" in self.config else [])]
        names = sorted(name for name in os.listdir(self.path) if not name.startswith("."))
        return tuple(name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns))

    def copy_side_files(self, target: Path) -> None:
        """Copies `side_files` into the directory `target`; links are followed."""
        for name in self.side_files:
            if (self.path / name).is_dir():
                shutil.copytree(self.path / name, target / name)
            else:
                shutil.copyfile(self.path / name, target / name)

    def weight_problems(self) -> list[str]:
        """What the weights lack, judged by the config: layers, tensors of single layers, embeddings."""
        found: dict[int, set[str]] = {}
        names = self.tensors.infos
        for name in names:
            layer, suffix = split_layer(name)
            if layer is not None:
                found.setdefault(layer, set()).add(suffix)
        problems = []
        absent = sorted(set(range(self.num_layers)) - found.keys())
        if not found:
            return [
                f"no tensor is named model.layers.N.*, as in Llama-like decoders ({self.architecture}); "
                f"the first is {next(iter(names), 'none')}"
            ]
        if absent or max(found) >= self.num_layers:
            have = f"{len(found)} ({min(found)} to {max(found)})"
            problems.append(f"config.json says {self.num_layers} layers, the weights have {have}")
        if not _has_kinds_of_layers(self.config):
            common = set.union(*found.values())
            for layer in sorted(found):
                problems += [f"{layer_name(layer, s)} is missing" for s in sorted(common - found[layer])]
        outside = ["model.embed_tokens.weight", "model.norm.weight"]
        if not self.config.get("tie_word_embeddings", False):
            outside.append("lm_head.weight")
        return problems + [f"{name} is missing" for name in outside if name not in names]

    def check_weights(self) -> None:
        """Raises UserError listing `weight_problems`."""
        problems = Problems()
        found = self.weight_problems()
        for text in found[:20] if len(found) <= 20 else [*found[:19], f"... and {len(found) - 19} more"]:
            problems.add(text)
        problems.raise_if_any(f"checkpoint {self.path}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} has no config.json; give a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/config.json cannot be read: {error}") from None
    problems = Problems()
    if not isinstance(config, dict):
        problems.add(f"expected a JSON object, got {type(config).__name__}")
        config = {"architectures": [""], "num_hidden_layers": 1}
    names = config.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        problems.add(f'"architectures" must list a class name such as LlamaForCausalLM, got {names!r}')
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or layers < 1:
        nested = " (only text models are supported)" if "text_config" in config else ""
        problems.add(f'"num_hidden_layers" must be a positive number, got {layers!r}{nested}')
    problems.raise_if_any(f"{path}/config.json")
    return config


def _has_kinds_of_layers(config: dict[str, Any]) -> bool:
    """Whether layers of one model may hold different tensors (experts in some of them, say)."""
    return bool(_positional(config) or per_layer_keys(config) - {"layer_types"})


def _positional(config: dict[str, Any]) -> list[str]:
    """The POSITIONAL_KEYS that make a difference between the layers of this model."""

    def inert(key: str) -> bool:
        return not config.get(key) or config[key] == 1 and key.endswith(_EVERY)

    return [key for key in POSITIONAL_KEYS if not inert(key)]


def per_layer_keys(config: dict[str, Any]) -> set[str]:
    """Keys of `config` whose value is a list with one entry per layer."""
    n = config["num_hidden_layers"]
    return {
        key
        for key, value in config.items()
        if isinstance(value, list) and len(value) == n and not _NOT_PER_LAYER.search(key)
    }


def grown_config(config: dict[str, Any], layer_map: LayerMap) -> dict[str, Any]:
    """`config` at the depth of `layer_map`: `num_hidden_layers`, and every per-layer list through the map.

    Attention windows that a family gives by layer number are spelled out as `layer_types` first, so each copy
    keeps the attention its weights were trained with. `max_window_layers` becomes the number of target layers
    whose source lies below it. Everything else is unchanged, and so is `config` itself.

    Raises UserError when the map was made for another depth, or when the config gives layers their kind by
    number in a way that a list cannot express (`POSITIONAL_KEYS`) and the map moves layers.
    """
    problems = Problems()
    n = config.get("num_hidden_layers")
    if n != layer_map.source_layers:
        problems.add(f"the map is for {layer_map.source_layers} layers, num_hidden_layers is {n}")
    if not layer_map.is_identity:
        for key in _positional(config):
            problems.add(f"{key} = {config[key]!r} fixes layers by number and cannot follow the map")
    problems.raise_if_any(f'config.json through the layer map "{layer_map.spelling[:60]}"')

    result = copy.deepcopy(config)
    if layer_map.is_identity:
        return result
    implied = _implied_layer_types(config)
    if implied is not None:
        result["layer_types"] = implied
    for key in per_layer_keys(result):
        result[key] = layer_map.remap_list(result[key])
    window = config.get("max_window_layers")
    if type(window) is int:
        below = layer_map.remap_list([layer < window for layer in range(n)])
        result["max_window_layers"] = sum(below)
    result["num_hidden_layers"] = len(layer_map)
    return result


def _implied_layer_types(config: dict[str, Any]) -> list[str] | None:
    """`layer_types` where the config leaves them to the layers' numbers; None where it does not."""
    n = config["num_hidden_layers"]
    if config.get("layer_types") is not None:
        return None
    period = config.get("sliding_window_pattern", _WINDOW_PERIOD.get(config.get("model_type", "")))
    if type(period) is int and period > 1:
        return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(n)]
    first = config.get("max_window_layers", _FIRST_WINDOW.get(config.get("model_type", "")))
    if config.get("use_sliding_window") and type(first) is int:
        return ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
    return None


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Writes config.json."""
    (Path(directory) / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
