"""What a target layer does to the weights it was copied from, and whether it is trained.

    o_proj x down_proj    the two matrices through which a layer writes into the residual stream, scaled:
                          both at 0 make the layer the identity
    noise                 every matrix W of the layer becomes W + noise * Z, Z standard normal, drawn from
                          (noise_seed, target layer, tensor name): the same on every layout and route
    freeze                the layer's weights stay as they are while the model is trained

Scales come first, then noise. Norm weights and biases of the projections in and out of attention are not
noised; a bias of a scaled matrix is scaled with it.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from solar_mega.errors import Problems


@dataclass(frozen=True)
class Modifier:
    """Changes of one target layer; the default changes nothing."""

    o_proj: float = 1.0
    """Factor of the attention's output projection."""

    down_proj: float = 1.0
    """Factor of the feed-forward's output projection."""

    noise: float = 0.0
    """Standard deviation of the noise added to the layer's matrices, in the weights' own unit."""

    noise_seed: int = 0

    freeze: bool = False

    @property
    def changes_weights(self) -> bool:
        return self.changes_outputs or self.noise > 0

    @property
    def changes_outputs(self) -> bool:
        return (self.o_proj, self.down_proj) != (1.0, 1.0)

    @property
    def is_identity_block(self) -> bool:
        """The layer adds nothing to the residual stream: its output is its input."""
        return self.o_proj == self.down_proj == self.noise == 0.0

    def after(self, first: "Modifier") -> "Modifier":
        """One modifier for `first` and then this one. Scales multiply; `first` must be free of noise."""
        if first.noise:
            raise ValueError("noise was drawn for the layers of the map between, and cannot be joined")
        return Modifier(
            o_proj=self.o_proj * first.o_proj,
            down_proj=self.down_proj * first.down_proj,
            noise=self.noise,
            noise_seed=self.noise_seed,
            freeze=self.freeze or first.freeze,
        )

    def problems(self) -> list[str]:
        """What is wrong with the values; empty when nothing is."""
        texts = []
        for name in ("o_proj", "down_proj"):
            if not math.isfinite(getattr(self, name)):
                texts.append(f"the scale of {name} is {getattr(self, name)}; it must be a finite number")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            texts.append(f"the noise is {self.noise}; it must be a standard deviation of at least 0")
        if not 0 <= self.noise_seed < 1 << 63:
            texts.append(f"the noise's seed is {self.noise_seed}; it must be from 0 to 2^63 - 1")
        return texts

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the default."""
        return {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if getattr(self, entry.name) != entry.default
        }

    @classmethod
    def from_json(cls, value: Any, problems: Problems) -> "Modifier":
        """Reads `to_json`; unknown keys and wrong types go to `problems`."""
        known = {entry.name: type(entry.default) for entry in fields(cls)}
        if not isinstance(value, dict):
            problems.add(f"a modifier must be an object, got {value!r}")
            return cls()
        given = {}
        for key, item in value.items():
            kind = known.get(key)
            if kind is float and type(item) in (int, float):
                given[key] = float(item)
            elif kind is not None and type(item) is kind:
                given[key] = item
            else:
                problems.add(f"{key!r}: {item!r} is not a modifier; known are {', '.join(known)}")
        return cls(**given)


PLAIN = Modifier()
IDENTITY_BLOCK = Modifier(o_proj=0.0, down_proj=0.0)
