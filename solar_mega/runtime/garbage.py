"""Python's garbage collector, kept off what cannot be garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def small_heap() -> Iterator[None]:
    """Collections inside look only at what was made inside.

    A full collection in a heap with torch, transformers and megatron-core takes a quarter of a second, which
    is most of a short operation that makes many objects or asks for one.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
