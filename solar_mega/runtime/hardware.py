"""Peak arithmetic of the GPUs this project is run on, for MFU. Unknown hardware has no MFU: the console says
n/a."""

import torch

_PEAK_BF16 = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s from the vendor's data sheets; the first name found in the device's name counts."""


def peak_flops(precision: str) -> float | None:
    """Dense FLOP/s of this rank's GPU in `precision`, None on a CPU, an unknown GPU, or for fp32."""
    if precision != "bf16" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK_BF16.items() if part in name), None)
