"""The merge methods, one tensor at a time, over streams of fp32 chunks.

Each takes a `Stream` of the tensor's inputs, which it may go through several times, and yields the merged
chunks in order. Chunks always have the same boundaries, so sums and random draws depend neither on threads
nor on how files are cut.

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

from solar_mega.artifact.safetensors_format import DTYPES, torch_dtype
from solar_mega.merge.plan import Job, Origin

CHUNK = 1 << 17
"""Elements per chunk: the buffers of two inputs and their bf16 bytes, 1.5 MB, stay in a core's cache."""

LERP_ABOVE = 0.9995
"""mergekit's threshold: where |cos(theta)| is larger, slerp interpolates linearly."""


class Stream:
    """The inputs of one job as fp32 chunks. Buffers are reused: a chunk is valid until the next one is asked
    for, and may be written to."""

    def __init__(self, origins: Sequence[Origin], stopped: Callable[[], bool] = lambda: False) -> None:
        self.origins, self.stopped = origins, stopped
        self.elements = origins[0].info.elements
        size = min(CHUNK, self.elements)
        self._values = [torch.empty(size, dtype=torch.float32) for _ in origins]
        self._raw = [
            value if origin.info.dtype == "F32" else torch.empty(size, dtype=torch_dtype(origin.info.dtype))
            for origin, value in zip(origins, self._values, strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Raises UserError when a file ends early, InterruptedError when the merge was stopped."""
        for start in range(0, self.elements, CHUNK):
            if self.stopped():
                raise InterruptedError("the merge was stopped")
            count = min(CHUNK, self.elements - start)
            yield tuple(self._read(i, start, count) for i in range(len(self.origins)))

    def _read(self, i: int, start: int, count: int) -> Tensor:
        origin, raw, value = self.origins[i], self._raw[i][:count], self._values[i][:count]
        width = DTYPES[origin.info.dtype][0] // 8
        origin.reader.read_bytes(origin.info.name, start * width, memoryview(raw.view(torch.uint8).numpy()))
        return value if raw is value else value.copy_(raw)


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


def merge_tensor(method: str, job: Job, stream: Stream, seed: int, found: Findings) -> Iterator[Tensor]:
    """The merged tensor in fp32 chunks of CHUNK elements. A chunk is valid until the next one."""
    if method == "linear":
        return _linear(job, stream)
    if method in ("slerp", "delta_slerp"):
        return _slerp(job, stream, found)
    return _task(method, job, stream, seed)


def _linear(job: Job, stream: Stream) -> Iterator[Tensor]:
    total = sum(job.weights) if job.shared["normalize"] else 1.0
    weights = [weight / total for weight in job.weights]
    for first, *others in stream:
        first.mul_(weights[0])
        for other, weight in zip(others, weights[1:], strict=True):
            first.add_(other, alpha=weight)
        yield first


def _slerp(job: Job, stream: Stream, found: Findings) -> Iterator[Tensor]:
    angle = _angle(job, stream)
    found.angles.append(angle)
    left, right = slerp_coefficients(angle.theta, angle.t, angle.lerp)
    for a, b, *base in stream:
        if base:
            a.sub_(base[0])
            b.sub_(base[0])
        a.mul_(left).add_(b, alpha=right)
        yield a.add_(base[0]) if base else a


def _angle(job: Job, stream: Stream) -> Angle:
    aa = bb = ab = 0.0
    for a, b, *base in stream:
        if base:
            a.sub_(base[0])
            b.sub_(base[0])
        aa += torch.dot(a, a).item()
        bb += torch.dot(b, b).item()
        ab += torch.dot(a, b).item()
    length = math.sqrt(aa) * math.sqrt(bb)
    cosine = ab / length if length else 0.0
    # NaN weights count as parallel: they pass through, and are refused where they are stored.
    apart = length and abs(cosine) <= LERP_ABOVE
    return Angle(job.name, cosine, job.shared["t"], not apart)


def slerp_coefficients(theta: float, t: float, lerp: bool) -> tuple[float, float]:
    """Factors of the tensors at t = 0 and t = 1."""
    if lerp:
        return 1 - t, t
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def _task(method: str, job: Job, stream: Stream, seed: int) -> Iterator[Tensor]:
    thin: Callable[[int, int, Tensor], Tensor] = lambda i, chunk, delta: delta  # noqa: E731
    if method == "ties":
        thin = _Trim(job, stream)
    elif method.startswith("dare"):
        thin = _Drop(job, seed)
    elect = method.endswith("ties")
    scale, normalize = job.shared["lambda"], bool(job.shared["normalize"])
    for number, (*inputs, base) in enumerate(stream):
        deltas = [thin(i, number, x.sub_(base)).mul_(job.weights[i]) for i, x in enumerate(inputs)]
        mixed = _elected(deltas, job.weights, normalize) if elect else _summed(deltas, job.weights, normalize)
        yield base.add_(mixed, alpha=scale)


def _summed(deltas: list[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    mixed = deltas[0]
    for delta in deltas[1:]:
        mixed.add_(delta)
    total = sum(weights)
    return mixed.div_(total) if normalize and abs(total) >= 1e-8 else mixed


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

    def __init__(self, job: Job, stream: Stream) -> None:
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
