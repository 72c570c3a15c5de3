"""The README.md of a grown model."""

from solar_mega import __version__
from solar_mega.depth.layer_map import LayerMap


def model_card(name: str, base: str, architecture: str, layer_map: LayerMap, parameters: int) -> str:
    """A Hugging Face model card that says what the model is, what it came from and what to do with it next.

    Args:
        name: of the new directory.
        base: of the source directory.
        parameters: elements of all tensors.
    """
    changed = not layer_map.is_identity
    tags = "\n".join(f"- {tag}" for tag in (["depth-up-scaling"] if changed else []) + ["solar_mega"])
    how = (
        f"Its layers start as copies of the layers of `{base}`; no weight was changed:"
        if changed
        else f"It has the layers of `{base}`:"
    )
    next_step = (
        "\nIt has **not** been trained since. A model just grown is worse than its base; "
        "the paper continues pretraining before anything else.\n"
        if changed
        else ""
    )
    return f"""---
library_name: transformers
tags:
{tags}
---

# {name}

`{architecture}` with {len(layer_map)} layers and {parameters / 1e9:.2f} B parameters. {how}

```
{layer_map.describe()}
```

Layer map: `{layer_map.spelling}`. Made by solar_mega {__version__}; `lineage.json` has the hash of the base
and the versions of everything involved.
{next_step}
Depth up-scaling: *SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling*,
[arXiv 2312.15166](https://arxiv.org/abs/2312.15166).
"""
