"""The Python face of `csrc/`. Each file reads in one direction: formula, reference, op, autograd, public."""

from solar_mega.ops.causal_attention import causal_attention, causal_attention_reference
from solar_mega.ops.dot_products import dot_products, dot_products_reference
from solar_mega.ops.dpo_loss import DPOLoss, dpo_loss, dpo_loss_reference
from solar_mega.ops.library import available, build_info, report
from solar_mega.ops.linear_dpo_loss import linear_dpo_loss
from solar_mega.ops.linear_token_logprob import (
    WeightsOf,
    linear_token_logprob,
    linear_token_logprob_reference,
)
from solar_mega.ops.products import products_in_fp32
from solar_mega.ops.qkv_rotary import qkv_rotary, qkv_rotary_reference
from solar_mega.ops.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from solar_mega.ops.swiglu import swiglu, swiglu_reference
from solar_mega.ops.token_logprob import TokenMetrics, token_logprob, token_logprob_with_metrics
from solar_mega.ops.token_logprob_reference import token_logprob_reference
from solar_mega.ops.weighted_sum import weighted_sum, weighted_sum_reference

__all__ = [
    "WeightsOf",
    "DPOLoss",
    "TokenMetrics",
    "add_rms_norm",
    "add_rms_norm_reference",
    "available",
    "build_info",
    "causal_attention",
    "causal_attention_reference",
    "dot_products",
    "dot_products_reference",
    "dpo_loss",
    "dpo_loss_reference",
    "linear_dpo_loss",
    "linear_token_logprob",
    "linear_token_logprob_reference",
    "products_in_fp32",
    "qkv_rotary",
    "qkv_rotary_reference",
    "report",
    "rms_norm",
    "rms_norm_reference",
    "swiglu",
    "swiglu_reference",
    "token_logprob",
    "token_logprob_reference",
    "token_logprob_with_metrics",
    "weighted_sum",
    "weighted_sum_reference",
]
