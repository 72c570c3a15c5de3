"""What a Hugging Face directory holds, without loading it."""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.lineage import Lineage, read_lineage
from solar_mega.errors import UserError


def inspect_hf(path: Path | str) -> dict[str, Any]:
    """A JSON-able description of a model directory. Damaged weights are described, not raised.

    Keys: `kind`, `path`, `architecture`, `model_type`, `layers`, `hidden_size`, `vocab_size`,
    `tied_embeddings`, `parameters`, `tensors`, `dtypes` ({dtype: elements}), `bytes` (weights), `files`,
    `complete`, `problems` (texts, empty when complete), `side_files`, `lineage` (dict or None). Figures of
    weights that cannot be read are None.

    Raises UserError when `path` is not a Hugging Face directory at all.
    """
    directory = HFDirectory(path)
    config = directory.config
    result: dict[str, Any] = {
        "kind": "huggingface",
        "path": str(directory.path.absolute()),
        "architecture": directory.architecture,
        "model_type": config.get("model_type"),
        "layers": directory.num_layers,
        "hidden_size": config.get("hidden_size"),
        "vocab_size": config.get("vocab_size"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "parameters": None,
        "tensors": None,
        "dtypes": None,
        "bytes": None,
        "files": None,
        "side_files": list(directory.side_files),
    }
    problems: list[str] = []
    try:
        infos = directory.tensors.infos.values()
        dtypes: Counter[str] = Counter()
        for info in infos:
            dtypes[info.dtype] += math.prod(info.shape)
        result |= {
            "parameters": sum(dtypes.values()),
            "tensors": len(infos),
            "dtypes": dict(dtypes),
            "bytes": directory.tensors.total_bytes,
            "files": len(directory.tensors.files),
        }
        problems += directory.weight_problems()
    except UserError as error:
        problems.append(str(error))
    try:
        lineage = read_lineage(directory.path)
    except UserError as error:
        lineage = None
        problems.append(str(error))
    result["complete"] = not problems
    result["problems"] = problems
    result["lineage"] = None if lineage is None else _lineage(lineage)
    return result


def _lineage(lineage: Lineage) -> dict[str, Any]:
    content = asdict(lineage)
    content["parents"] = list(content["parents"])
    content["layer_map"] = None if lineage.layer_map is None else lineage.layer_map.to_json()
    return content
