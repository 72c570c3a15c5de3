"""The GPUs that plans and MFU know: figures from the vendors' data sheets, not measured here. No torch."""

from dataclasses import dataclass

from solar_mega.errors import UserError


@dataclass(frozen=True)
class Gpu:
    name: str
    """As it stands in the device's own name (`NVIDIA H100 80GB HBM3`)."""

    memory: int
    """Bytes, as nvidia-smi reports them."""

    bf16: float
    """Dense FLOP/s of the tensor cores."""

    fp32: float
    """FLOP/s outside the tensor cores."""

    memory_bandwidth: float
    """Bytes/s."""

    nvlink: float
    """Bytes/s in each direction to the GPUs of the same node; PCIe's where there is no NVLink."""

    network: float
    """Bytes/s in each direction to other nodes, per GPU, of the usual server with one adapter a GPU."""

    capability: tuple[int, int]
    """Compute capability."""

    def peak(self, precision: str) -> float:
        """FLOP/s in `train.precision`."""
        return self.bf16 if precision == "bf16" else self.fp32


_MIB = 2**20

GPUS = {
    "h100-pcie": Gpu("H100 PCIe", 81559 * _MIB, 756e12, 51e12, 2.0e12, 64e9, 25e9, (9, 0)),
    "h100": Gpu("H100", 81559 * _MIB, 989e12, 67e12, 3.35e12, 450e9, 50e9, (9, 0)),
    "h200": Gpu("H200", 143771 * _MIB, 989e12, 67e12, 4.8e12, 450e9, 50e9, (9, 0)),
    "a100-40gb": Gpu("A100-SXM4-40GB", 40960 * _MIB, 312e12, 19.5e12, 1.56e12, 300e9, 25e9, (8, 0)),
    "a100": Gpu("A100", 81920 * _MIB, 312e12, 19.5e12, 2.04e12, 300e9, 25e9, (8, 0)),
    "b200": Gpu("B200", 183359 * _MIB, 2250e12, 75e12, 7.7e12, 900e9, 50e9, (10, 0)),
}
"""By the name that `--gpu` takes. The narrower names come first: `of_device` takes the first that fits."""


def of_device(device_name: str) -> Gpu | None:
    """The GPU that calls itself `device_name`; None for one that is not known."""
    return next((gpu for gpu in GPUS.values() if gpu.name in device_name), None)


def find_gpu(name: str, flag: str = "--gpu") -> Gpu:
    """Raises UserError for a name that is not in GPUS."""
    if name.lower() not in GPUS:
        raise UserError(f"{flag} {name}: not a GPU that is known here; known: {', '.join(GPUS)}")
    return GPUS[name.lower()]
