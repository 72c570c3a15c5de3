"""Counts what matrix products multiply, as they are made: torch's own counter leaves out in-place ones."""

import math

from torch.utils._python_dispatch import TorchDispatchMode

_FACTORS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2)}
"""Places of the two factors among the arguments."""


class Multiplications(TorchDispatchMode):
    """`with Multiplications() as counted: ...`, then `counted.total`."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        places = _FACTORS.get(function.overloadpacket.__name__)
        if places is not None:
            a, b = (args[place] for place in places)
            self.total += math.prod(a.shape) * b.shape[1]
        return function(*args, **(kwargs or {}))
