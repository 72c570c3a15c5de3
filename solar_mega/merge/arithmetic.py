"""The merge methods, one tensor at a time, chunk by chunk (`merge.chunks`). All arithmetic is fp32 or wider.

x_i (a, b) are the models' tensors, w_i their weights, y is the result:

    linear           y = sum_i w_i x_i                               normalize: / sum_i w_i
    slerp            y = sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b,  cos(theta) = a.b/|a||b|
    delta_slerp      y = base + slerp(a - base, b - base)
    task_arithmetic  y = base + lambda sum_i w_i d_i,  d_i = x_i - base                arXiv 2212.04089
    ties             d_i trimmed to its largest |entries|, one sign elected per element   arXiv 2306.01708
    dare_linear      d_i with entries dropped at random, the rest divided by the density  arXiv 2311.03099
    dare_ties        the same, with TIES's election of signs
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from solar_mega.merge.chunks import Stored, Stream
from solar_mega.merge.plan import Job
from solar_mega.ops.dot_products import dot_products

LERP_ABOVE = 0.9995
"""mergekit's threshold: where |cos(theta)| is larger, slerp interpolates linearly."""


@dataclass
class Angle:
    """What SLERP found for a tensor."""

    name: str
    cosine: float
    t: float
    lerp: bool
    """Interpolated linearly because |cosine| > LERP_ABOVE, or because one side is zero."""

    @property
    def theta(self) -> float:
        """Angle between the two tensors, radians."""
        return math.acos(max(-1.0, min(1.0, self.cosine)))


@dataclass
class Findings:
    """Per-tensor facts worth telling, collected while merging."""

    angles: list[Angle] = field(default_factory=list)


def merge_tensor(method: str, stream: Stream, seed: int, found: Findings) -> Iterator[Tensor]:
    """The merged tensor in the dtype on disk, in chunks of CHUNK elements. A chunk is valid until the next
    one."""
    job, stored = stream.job, Stored(stream.job)
    if method == "linear":
        return _weighted(stream, stored, _per(_total(job), job.weights))
    if method == "task_arithmetic":
        weights = _per(_total(job), job.weights)
        return _weighted(stream, stored, [job.shared["lambda"] * weight for weight in weights])
    if method in ("slerp", "delta_slerp"):
        angle = _angle(stream)
        found.angles.append(angle)
        return _weighted(stream, stored, slerp_coefficients(angle.theta, angle.t, angle.lerp))
    return map(stored.cast, _sparse(method, stream, seed))


def _total(job: Job) -> float:
    """What the weighted sum is divided by."""
    total = sum(job.weights) if job.shared["normalize"] else 1.0
    return total if abs(total) >= 1e-8 else 1.0


def _per(total: float, weights: Sequence[float]) -> list[float]:
    return [weight / total for weight in weights]


def _weighted(stream: Stream, stored: Stored, weights: Sequence[float]) -> Iterator[Tensor]:
    for inputs, base in stream.stored():
        yield stored.sum(inputs, weights, base)


def _angle(stream: Stream) -> Angle:
    aa = bb = ab = 0.0
    for inputs, base in stream.stored():
        products = dot_products(*inputs, base).tolist()
        aa, bb, ab = aa + products[0], bb + products[1], ab + products[2]
    length = math.sqrt(aa) * math.sqrt(bb)
    cosine = ab / length if length else 0.0
    # NaN weights count as parallel: they pass through, and are refused where they are stored.
    apart = length and abs(cosine) <= LERP_ABOVE
    return Angle(stream.job.name, cosine, stream.job.shared["t"], not apart)


def slerp_coefficients(theta: float, t: float, lerp: bool) -> tuple[float, float]:
    """Factors of the tensors at t = 0 and t = 1."""
    if lerp:
        return 1 - t, t
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def _sparse(method: str, stream: Stream, seed: int) -> Iterator[Tensor]:
    """TIES and DARE: differences thinned out, then summed; fp32."""
    job = stream.job
    thin: Callable[[int, int, Tensor], Tensor] = _Trim(stream) if method == "ties" else _Drop(job, seed)
    elect = method.endswith("ties")
    scale, normalize = job.shared["lambda"], bool(job.shared["normalize"])
    for number, (*inputs, base) in enumerate(stream):
        deltas = [thin(i, number, x.sub_(base)).mul_(job.weights[i]) for i, x in enumerate(inputs)]
        mixed = _elected(deltas, job.weights, normalize) if elect else _summed(deltas, _total(job))
        yield base.add_(mixed, alpha=scale)


def _summed(deltas: list[Tensor], total: float) -> Tensor:
    mixed = deltas[0]
    for delta in deltas[1:]:
        mixed.add_(delta)
    return mixed.div_(total)


def _elected(deltas: list[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """TIES: per element the sign of the weighted sum is elected (0 counts as positive), and only the
    differences of that sign are summed; `normalize` divides by the sum of their weights."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    sign = torch.where(total >= 0, 1.0, -1.0)
    mixed, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta * sign > 0
        mixed.add_(delta.mul_(agrees))
        divisor.add_(agrees, alpha=weight)
    return mixed.div_(torch.where(divisor == 0, 1.0, divisor)) if normalize else mixed


class _Drop:
    """DARE: keeps each entry with probability `density` and divides it by that."""

    def __init__(self, job: Job, seed: int) -> None:
        self.job, self.seed = job, seed

    def __call__(self, i: int, chunk: int, delta: Tensor) -> Tensor:
        density = self.job.densities[i]
        if density >= 1:
            return delta
        if density <= 0:
            return delta.zero_()
        # Drawn from names, not from a sequence: any order of work gives the same choice.
        digest = hashlib.sha256(f"{self.seed}:{i}:{self.job.name}:{chunk}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        delta.mul_(torch.rand(delta.shape, generator=generator) < density)
        return delta.div_(density) if self.job.shared["rescale"] else delta


class _Trim:
    """TIES: keeps the k = max(1, int(density n)) largest entries by magnitude; among equal ones the first.

    The k-th largest magnitude is found exactly without sorting or holding the tensor: fp32 magnitudes order
    like their bit patterns, so a count of the upper 16 bits finds the bucket, a second one the value.
    """

    _HALF = 1 << 16

    def __init__(self, stream: Stream) -> None:
        job = stream.job
        self.densities = job.densities
        self.keep = [max(1, int(d * stream.elements)) if d > 0 else 0 for d in job.densities]
        self.threshold = [0] * len(job.inputs)
        upper = self._count(stream, lambda i, bits: bits >> 16)
        places = [_bucket(counts, keep) for counts, keep in zip(upper, self.keep, strict=True)]
        lower = self._count(stream, lambda i, bits: bits[bits >> 16 == places[i][0]] & (self._HALF - 1))
        for i, (bucket, above) in enumerate(places):
            value, larger = _bucket(lower[i], self.keep[i] - above)
            self.threshold[i] = bucket << 16 | value
            self.keep[i] -= above + larger  # how many entries equal to the threshold are kept

    def _count(self, stream: Stream, part: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        counts = [torch.zeros(self._HALF, dtype=torch.int64) for _ in self.densities]
        for *inputs, base in stream:
            for i, x in enumerate(inputs):
                if 0 < self.densities[i] < 1:
                    counts[i] += torch.bincount(part(i, _magnitude_bits(x.sub_(base))), minlength=self._HALF)
        return counts

    def __call__(self, i: int, chunk: int, delta: Tensor) -> Tensor:
        if self.densities[i] >= 1:
            return delta
        if self.densities[i] <= 0:
            return delta.zero_()
        bits = _magnitude_bits(delta)
        kept, equal = bits > self.threshold[i], bits == self.threshold[i]
        found = int(equal.sum())
        if found > self.keep[i]:
            equal &= equal.cumsum(0) <= self.keep[i]
        self.keep[i] -= min(found, self.keep[i])
        return delta.mul_(kept | equal)


def _magnitude_bits(x: Tensor) -> Tensor:
    return x.view(torch.int32) & 0x7FFFFFFF


def _bucket(counts: Tensor, k: int) -> tuple[int, int]:
    """(the bucket that holds the k-th largest entry, how many entries lie in larger buckets)."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, max(k, 1)))
    place = min(place, len(counts) - 1)
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0
