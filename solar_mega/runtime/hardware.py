"""Peak arithmetic of the GPU at hand, for MFU. Unknown hardware has no MFU: the console says n/a."""

import torch

from solar_mega.runtime.gpus import of_device


def peak_flops(precision: str) -> float | None:
    """Dense FLOP/s of this rank's GPU in `precision`, None on a CPU, an unknown GPU, or for fp32."""
    if precision != "bf16" or not torch.cuda.is_available():
        return None
    gpu = of_device(torch.cuda.get_device_name())
    return None if gpu is None else gpu.bf16
