"""The Python face of `csrc/`. Each file reads in one direction: formula, reference, op, autograd, public."""

from solar_mega.ops.dpo_loss import DPOLoss, dpo_loss, dpo_loss_reference
from solar_mega.ops.library import available, build_info, report
from solar_mega.ops.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

__all__ = [
    "DPOLoss",
    "add_rms_norm",
    "add_rms_norm_reference",
    "available",
    "build_info",
    "dpo_loss",
    "dpo_loss_reference",
    "report",
    "rms_norm",
    "rms_norm_reference",
]
