"""What is handed to flash-attn: its layout, its window, its bounds of packed samples. The library needs a
GPU; in its place stands the formula with flash-attn's documented arguments, in fp32."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from solar_mega.model.attention import SDPAttention
from solar_mega.model.packing import packing
from solar_mega.ops.causal_attention import causal_attention_reference

S, B, GROUPS, PER, D = 24, 2, 2, 3, 8


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """q [b, s, n, d], k and v [b, s, g, d] -> [b, s, n, d]; (left, right) positions before and after the own
    one, -1 for all."""
    assert causal and dropout_p == 0 and window_size[1] in (0, -1)
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return causal_attention_reference(q, k, v, softmax_scale, window_size[0] + 1).transpose(0, 1)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """q [tokens, n, d], k and v [tokens, g, d] -> [tokens, n, d]."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    bounds = cu_seqlens_q.tolist()
    spans = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
    return torch.cat([flash_attn_func(q[None, at], k[None, at], v[None, at], **options)[0] for at in spans])


@pytest.fixture
def flash(monkeypatch):
    module = ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    from solar_mega.model.accelerated_attention import FlashAttention

    return FlashAttention


def tensors(b: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    heads = (GROUPS * PER, GROUPS, GROUPS)
    return [torch.randn(S, b, n, D, generator=random) for n in heads]


@pytest.mark.parametrize("window", [None, (4, 0), (100, 0)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_flash_attention_gets_what_sdpa_gets(flash, window, packed):
    config = SimpleNamespace(attention_dropout=0.0, window_size=window, window_attn_skip_freq=None)
    ours, theirs = (
        kind(config, 1, AttnMaskType.causal, softmax_scale=0.3).eval() for kind in (SDPAttention, flash)
    )
    inputs = tensors(1 if packed else B)
    samples = packing(torch.tensor([0, 5, 6, S], dtype=torch.int32), torch.device("cpu")) if packed else None
    expected = ours(*inputs, None, packed_seq_params=samples)
    torch.testing.assert_close(theirs(*inputs, None, packed_seq_params=samples), expected)
