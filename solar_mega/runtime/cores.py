"""How many cores this process may use."""

import os


def available_cores() -> int:
    """Those of its affinity mask, which schedulers and containers narrow; all, where there is no mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
