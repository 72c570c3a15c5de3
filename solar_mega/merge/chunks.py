"""A tensor's way through a merge: inputs read chunk by chunk, merged chunks rounded to what is stored.

Memory is a window on each input and a chunk of the result, whatever the tensor's size.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from solar_mega.artifact.safetensors_format import DTYPES, torch_dtype
from solar_mega.errors import UserError
from solar_mega.merge.plan import Job, Origin
from solar_mega.ops.weighted_sum import weighted_sum, weighted_sum_reference

CHUNK = 1 << 21
"""Elements per chunk: so many that the calls around the arithmetic do not count, and memory stays small."""

_WINDOW = 4 * CHUNK  # elements of an input that are mapped at a time


class Stream:
    """The inputs of one job, chunk by chunk; may be gone through several times. A chunk is valid until the
    next one is asked for.

    Chunks always have the same boundaries, so sums and random draws depend neither on threads nor on how
    files are cut. Reading raises UserError when a file ends early, InterruptedError when the merge was
    stopped.
    """

    def __init__(self, job: Job, stopped: Callable[[], bool] = lambda: False) -> None:
        self.job, self.stopped = job, stopped
        self.elements = job.inputs[0].info.elements
        dtypes = {origin.info.dtype for origin in job.origins}
        self._dtype = torch_dtype(dtypes.pop()) if len(dtypes) == 1 else torch.float32
        self._windows: list[tuple[int, Tensor] | None] = [None] * len(job.origins)

    def stored(self) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        """(inputs, base or None), each [elements of the chunk], as stored: to be read only. Of different
        dtypes, as fp32."""
        for start in range(0, self.elements, CHUNK):
            if self.stopped():
                raise InterruptedError("the merge was stopped")
            count = min(CHUNK, self.elements - start)
            chunk = [self._view(i, start, count).to(self._dtype) for i in range(len(self._windows))]
            yield (chunk, None) if self.job.base is None else (chunk[:-1], chunk[-1])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Inputs, and base where there is one, as fp32 chunks of their own, which may be written to."""
        wide = torch.empty(len(self.job.origins), min(CHUNK, self.elements), dtype=torch.float32)
        for inputs, base in self.stored():
            chunk = inputs if base is None else (*inputs, base)
            yield tuple(wide[i, : len(x)].copy_(x) for i, x in enumerate(chunk))

    def _view(self, i: int, start: int, count: int) -> Tensor:
        first = start // _WINDOW * _WINDOW
        window = self._windows[i]
        if window is None or window[0] != first:
            self._windows[i] = None  # lets go of it before the next one is mapped
            window = self._windows[i] = first, self._map(self.job.origins[i], first)
        return window[1][start - first : start - first + count]

    def _map(self, origin: Origin, first: int) -> Tensor:
        width = DTYPES[origin.info.dtype][0] // 8
        count = min(_WINDOW, self.elements - first)
        data = origin.reader.window(origin.info.name, first * width, count * width)
        tensor = torch.frombuffer(data, dtype=torch_dtype(origin.info.dtype))
        if tensor.data_ptr() % width:  # in files without padding
            return torch.frombuffer(bytearray(data), dtype=tensor.dtype)
        return tensor


class Stored:
    """Merged chunks in the dtype on disk, rounded once. Chunks come in order; one is valid until the next.

    Raises UserError naming tensor and element where a value is not finite, or would not be in that dtype.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.done = job, 0
        self._out = torch.empty(min(CHUNK, job.inputs[0].info.elements), dtype=torch_dtype(job.dtype))

    def sum(self, inputs: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Tensor:
        """sum_i w_i x_i, or base + sum_i w_i (x_i - base)."""
        out = self._out[: len(inputs[0])]
        if not weighted_sum(inputs, weights, base, out=out):
            self._refuse(weighted_sum_reference(inputs, weights, base), out)
        self.done += len(out)
        return out

    def cast(self, chunk: Tensor) -> Tensor:
        """An fp32 chunk."""
        out = self._out[: len(chunk)].copy_(chunk)
        # A sum is as good as looking at every element, and needs no mask: NaN and infinity survive it.
        if not torch.isfinite(chunk.sum() if self.job.dtype != "F16" else out.float().sum()):
            self._refuse(chunk, out)
        self.done += len(out)
        return out

    def _refuse(self, chunk: Tensor, stored: Tensor) -> None:
        job, bad = self.job, ~torch.isfinite(stored)
        if not bad.any():
            return  # many large values: only their sum is beyond fp32
        if torch.isfinite(chunk[bad]).all():
            raise UserError(
                f"{job.name}: merged values up to {chunk.abs().max():g}, more than {job.dtype} holds; "
                "use --dtype"
            )
        element = self.done + int(bad.nonzero()[0])
        sources = ", ".join(str(origin.reader.directory) for origin in job.origins)
        raise UserError(
            f"{job.name}: element {element} is not finite after merging; look for NaN in {sources}"
        )
