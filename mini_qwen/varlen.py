"""Attention over packed rows by torch's own flash attention, for which nothing beside torch is to be installed.

The whole batch is one row [1, N]; where its rows begin and end comes with it from the collator, once for all layers.
"""

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

VARLEN = "varlen"  # the name of this attention in a recipe and in transformers
# torch 2.11 takes queries with more heads than keys and values unasked.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row: query [1, heads, N, D], key and value [1, kv_heads, N, D] -> [1, N, heads, D].

    Args:
        cu_seq_lens_q: [rows + 1] int32, where the rows begin and the last ends.
        max_length_q: tokens that no row has more of.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        raise ValueError(f"attn_implementation {VARLEN} is for packed rows without a mask; take sdpa here.")
    # Under autocast RoPE leaves queries and keys in fp32; values are in the type of the products.
    flat = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    borders = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(*flat, *borders, scale=scaling, window_size=(-1, 0), **GROUPED)[None], None


def add_varlen() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, flash_attention_mask)
