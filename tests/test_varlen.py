"""torch's own flash attention: where it is chosen and refused, and that it keeps the rows of a batch apart."""

from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mini_qwen.training import choose_attention
from mini_qwen.varlen import attend

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's flash attention needs a GPU")


def test_a_cpu_takes_sdpa() -> None:
    if not torch.cuda.is_available():
        assert choose_attention("auto", "bf16") == "sdpa"
    assert choose_attention("auto", "fp32") == "sdpa"


@needs_gpu
def test_a_gpu_takes_a_flash_attention_for_packed_rows_in_bf16() -> None:
    assert "flash" in choose_attention("auto", "bf16") or choose_attention("auto", "bf16") == "varlen"
    assert choose_attention("auto", "bf16", dropout=0.1) != "varlen"


@pytest.mark.parametrize("keys", [{"packed": False}, {"dropout": 0.1}, {"precision": "fp32"}])
def test_it_is_refused_where_it_cannot_be(keys: dict[str, Any]) -> None:
    assert choose_attention("varlen", "bf16") == "varlen"
    with pytest.raises(SystemExit, match="varlen is not possible here"):
        choose_attention("varlen", **({"precision": "bf16"} | keys))


@pytest.mark.parametrize("given", ["a mask", "nothing"])
def test_rows_whose_borders_are_not_known_are_refused(given: str) -> None:
    """It would let all of a batch see each other."""
    states = torch.zeros(1, 2, 6, 8)
    mask = torch.ones(1, 6) if given == "a mask" else None
    borders = torch.tensor([0, 6], dtype=torch.int32) if given == "a mask" else None
    with pytest.raises(ValueError, match="packed rows without a mask"):
        attend(torch.nn.Module(), states, states, states, mask, cu_seq_lens_q=borders, max_length_q=6)


@needs_gpu
def test_each_row_is_attended_to_as_if_it_were_alone() -> None:
    """Rows of 5, 1 and 10 tokens, four heads on two keys and values, queries in fp32 as RoPE leaves them."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 16, 64, device="cuda") for heads in (4, 2, 2))
    value = value.bfloat16()
    borders = torch.tensor([0, 5, 6, 16], dtype=torch.int32, device="cuda")
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    ours, _ = attend(module, query, key, value, None, 0.125, borders, 10)
    for start, end in ((0, 5), (5, 6), (6, 16)):
        row = [states[:, :, start:end].bfloat16() for states in (query, key, value)]
        alone, _ = sdpa_attention_forward(module, *row, None, scaling=0.125)
        assert torch.allclose(ours[:, start:end].float(), alone.float(), atol=2e-2)
