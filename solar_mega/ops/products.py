"""In which precision a processor multiplies bf16 matrices fastest."""

import functools
import platform
from pathlib import Path

import torch


@functools.cache
def products_in_fp32() -> bool:
    """True where bf16 matrices are best widened and multiplied in fp32: x86 processors without bf16 tiles
    (AMX) and, of Intel's, also those with AVX512-BF16, whose products run at half the rate of fp32 ones
    (measured: 82 against 157 GFLOP/s on one core). AMD's with AVX512-BF16 double the rate and are left alone,
    as is everything that is not x86. A rule and not a measurement, so that two runs on one machine agree to
    the bit.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    supports = {name: getattr(torch.cpu, name, lambda: False)() for name in (_TILES, _VECTORS)}
    return not supports[_TILES] and not (supports[_VECTORS] and _vendor() == "AuthenticAMD")


_TILES, _VECTORS = "_is_amx_tile_supported", "_is_avx512_bf16_supported"


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
