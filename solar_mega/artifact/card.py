"""The README.md of a model that was grown or merged."""

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
        "\nIt has **not** been trained since. A model just grown is worse than its base; the paper continues "
        "pretraining before anything else.\n"
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


def merge_card(
    name: str,
    method: str,
    models: list[str],
    architecture: str,
    layers: int,
    parameters: int,
    recipe: str,
) -> str:
    """A Hugging Face model card for a merge.

    Args:
        models: names of the directories that went in.
        recipe: what the merge was told, as text.
    """
    listed = "\n".join(f"- `{model}`" for model in models)
    return f"""---
library_name: transformers
tags:
- merge
- solar_mega
---

# {name}

`{architecture}` with {layers} layers and {parameters / 1e9:.2f} B parameters, merged by `{method}` from

{listed}

```json
{recipe}
```

Arithmetic in fp32, one rounding at the end. Made by solar_mega {__version__}; `lineage.json` has the hashes
of the models and the versions of everything involved.
"""
