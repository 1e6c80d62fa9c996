"""The kernels of the loss head say of each row what torch's own operations say, whatever its width and type."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; it comes with torch for CUDA")

from mini_qwen import row_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 63, 64, 1000])
def test_rows(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels, "BLOCK", 64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(width)
    logits = (torch.randn(7, width, generator=generator) * 5).to(device, dtype)
    labels = torch.randint(width, (7,), generator=generator).to(device)
    exact = logits.double()
    log_probs = exact.log_softmax(dim=-1)

    log_z, chosen, is_top1, entropy = row_kernels.score_rows(logits, labels)
    own = log_probs.gather(1, labels[:, None])[:, 0]
    assert torch.allclose((chosen - log_z).double(), own, atol=1e-5)
    assert torch.equal(is_top1, exact.argmax(dim=-1) == labels)
    assert torch.allclose(entropy.double(), -(log_probs.exp() * log_probs).sum(dim=-1), atol=1e-5)

    slopes = log_probs.exp() - torch.nn.functional.one_hot(labels, width)
    row_kernels.slope_rows_(logits, labels, log_z)
    assert torch.allclose(logits.double(), slopes, atol=1e-6 if dtype == torch.float32 else 4e-3)
