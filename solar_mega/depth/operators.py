"""The rivals of depth up-scaling: each way to choose source layers as one pure function.

A target layer is a source layer's number, or a tuple of numbers whose weights it averages. `n` is the
source's depth throughout; ranges are half-open and counted from 0. Depth up-scaling itself is
`layer_map.depth_up_scaling`.
"""

from solar_mega.errors import UserError

Source = int | tuple[int, ...] | None
"""One target layer's origin: a copied layer, layers to average, or None for fresh weights."""


def stack(n: int, copies: int) -> tuple[int, ...]:
    """The whole model `copies` times: target t starts from t mod n. s = copies * n.

    Progressive stacking (Gong et al., ICML 2019); G_stack of "Stacking Your Transformers"
    (arXiv 2405.15319).
    """
    return tuple(range(n)) * copies


def interleave(n: int, copies: int, start: int, stop: int) -> tuple[int, ...]:
    """Each layer of [start, stop) `copies` times in place, the others once: 0,0,1,1,... over the whole model.

    s = n + (copies - 1) (stop - start). The interpolation of "Multi-level Residual Networks from Dynamical
    Systems View" (arXiv 1710.10348).
    """
    return tuple(layer for layer in range(n) for _ in range(copies if start <= layer < stop else 1))


def repeat(n: int, start: int, stop: int, copies: int) -> tuple[int, ...]:
    """The range [start, stop) played `copies` times in a row, what is around it once.

    s = n + (copies - 1) (stop - start). Partial stacking in arXiv 2405.15319; with two copies of
    [M, n - M) it is depth up-scaling.
    """
    return (*range(start), *(tuple(range(start, stop)) * copies), *range(stop, n))


def llama_pro(n: int, groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(targets, those of them that are added): n layers cut into `groups` groups of n / groups, each followed
    by a copy of its last layer, which starts as the identity. s = n + groups.

    LLaMA Pro's block expansion (arXiv 2401.02415) with one copy per group; the paper takes 8 groups of 32.

    Raises UserError unless `groups` divides n.
    """
    if not 1 <= groups <= n or n % groups:
        fits = ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
        raise UserError(f"{n} layers cannot be cut into {groups} equal groups; the number is one of {fits}")
    size = n // groups
    targets: list[int] = []
    added = []
    for group in range(groups):
        targets += range(group * size, (group + 1) * size)
        added.append(len(targets))
        targets.append(targets[-1])
    return tuple(targets), tuple(added)


def append(n: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(targets, those of them that are added): the model and then its last layer `count` times more, each
    starting as the identity. s = n + count.

    Net2DeeperNet (arXiv 1511.05641) carried over to residual blocks.
    """
    return (*range(n), *[n - 1] * count), tuple(range(n, n + count))


def mean_of_neighbours(n: int, start: int, stop: int) -> tuple[Source, ...]:
    """Between every two neighbours of [start, stop) a layer whose weights are their mean.

    s = n + (stop - start - 1). Linear interpolation of weights over depth, as in "Multilevel Initialization
    for Layer-Parallel Deep Neural Network Training" (arXiv 1912.08974).
    """
    targets: list[Source] = []
    for layer in range(n):
        targets.append(layer)
        if start <= layer and layer + 1 < stop:
            targets.append((layer, layer + 1))
    return tuple(targets)
