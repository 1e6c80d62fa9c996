"""Numbers of few bits that lose nothing on average: each is rounded up or down at random, nearer neighbours oftener.

The expected value of what is stored is the value itself (Gupta et al., 2015, arXiv:1502.02551), where rounding to the
nearest would drop every change that is smaller than half a step. Draws come from torch's generator of the device.
"""

from typing import NamedTuple

import torch

BLOCK = 256  # neighbouring numbers that share one scale, their largest (Dettmers et al., 2022, arXiv:2110.02861)


class Code(NamedTuple):
    """How numbers of a block become 8 bits: powers of 2 at equal distances, from the block's largest downwards."""

    levels: int  # the highest code, which means the scale; code 0 means 0
    octaves: int  # code 1 means the scale / 2**octaves

    @property
    def step(self) -> float:
        """Octaves from one code to the next."""
        return self.octaves / (self.levels - 1)


MEAN = Code(levels=127, octaves=12)  # of gradients, with a sign: neighbours are 6.8% apart
SQUARE = Code(levels=255, octaves=24)  # of squared gradients: neighbours are 6.8% apart


def round_to_bf16(values: torch.Tensor) -> torch.Tensor:
    """fp32 to one of the two bf16 numbers around it: 16 random bits are added, and 16 cut off."""
    bits = values.view(torch.int32)
    return (bits + torch.randint_like(bits, 1 << 16)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 to 24 bits, at random up or down, as the nearest bf16 number and an int8 of eight bits more.

    What is behind 1.00390625 = 1 + 2**-8, half way between two bf16 numbers: (1.0078125, -128).
    """
    bits = values.view(torch.int32)
    bits = (bits + torch.randint_like(bits, 1 << 8)).bitwise_and_(-(1 << 8))
    high = (bits + (1 << 15)) >> 16
    low = (bits - (high << 16)) >> 8
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int8)


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers that `split` made into bf16 and int8, exactly."""
    bits = (high.contiguous().view(torch.int16).int() << 16) + (low.int() << 8)
    return bits.view(torch.float32)


def encode(values: torch.Tensor, code: Code, lowest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 to code.levels of numbers that are not negative, and their scales.

    Args:
        values: [N, BLOCK] fp32.
        lowest: 0 lets what is below the first level become 0 or that level, right on average. 1 makes it that level:
            for what one divides by, where 0 now and then would be far worse than somewhat too much.

    Returns:
        uint8 [N, BLOCK] and fp32 [N, 1].
    """
    scale = values.amax(dim=1, keepdim=True)
    share = values / scale.clamp(min=torch.finfo(torch.float32).tiny)
    below = (share.log2() / code.step + code.levels).floor_().clamp_(0, code.levels - 1)
    value_below = torch.where(below > 0, ((below - code.levels) * code.step).exp2(), 0.0)
    value_above = ((below + 1 - code.levels) * code.step).exp2()
    rises = torch.rand_like(share) < (share - value_below) / (value_above - value_below)
    codes = (below + rises).clamp_(min=lowest)
    return torch.where(values > 0, codes, 0.0).to(torch.uint8), scale


def decode(codes: torch.Tensor, scale: torch.Tensor, code: Code) -> torch.Tensor:
    """fp32 [N, BLOCK], what codes [N, BLOCK] stand for at their scales [N, 1]."""
    return torch.where(codes > 0, ((codes.float() - code.levels) * code.step).exp2(), 0.0) * scale
