"""The planner's time: GPUs as their data sheets have them, FLOPs of a token, steps of a run, and what a step sends."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from transformers import Qwen2Config

from mini_qwen.plan_memory import BUCKET_ELEMENTS
from mini_qwen.plan_parameters import count_parameters, product_weights, widths


class GPU(NamedTuple):
    """One card. `link` is to the others of its node, a direction: half of what data sheets call bandwidth."""

    gigabytes: float  # 10^9 bytes
    teraflops: float  # dense, bf16 or fp16, sums in fp32
    link: float  # GB/s
    bf16: bool = True


# NVIDIA's data sheets; of figures "with sparsity", half. H800 and A800 are H100 and A100 with less NVLink. GeForce
# cards: white papers of Ada (table 2) and Ampere GA102 (table 2), fp16 with fp32 sums; PCIe 4.0 x16, T4 3.0 x16.
GPUS = {
    "H200": GPU(141, 989.4, 450),
    "H100": GPU(80, 989.4, 450),
    "H800": GPU(80, 989.4, 200),
    "A100": GPU(80, 312.0, 300),
    "A100-40": GPU(40, 312.0, 300),
    "A800": GPU(80, 312.0, 200),
    "L40S": GPU(48, 362.05, 32),
    "A10": GPU(24, 125.0, 32),
    "RTX4090": GPU(24, 165.2, 32),
    "RTX3090": GPU(24, 71.0, 32),
    "T4": GPU(16, 65.0, 16, bf16=False),
}


@dataclass(frozen=True)
class Network:
    """How GPUs are joined. The defaults are assumptions, not measurements."""

    gpus_per_node: int = 8
    node: float = 450.0  # GB/s of each GPU to the others of its node, a direction
    between: float = 50.0  # GB/s of each GPU to other nodes, a direction: one port of 400 Gb/s each
    share: float = 0.7  # of these that a collective reaches
    hop: float = 10e-6  # seconds that each of a ring's steps takes, however little it carries

    def collective(self, num_bytes: float, gpus: int, calls: int) -> float:
        """Seconds of a reduce-scatter or an all-gather of `num_bytes`, in `calls` parts, by a ring of all GPUs.

        Each GPU sends (n - 1) / n of the bytes in n - 1 steps, at the pace of the slowest link.
        (Thakur et al., Optimization of collective communication operations in MPICH, 2005.)

        >>> Network(node=100, share=1.0, hop=0.0).collective(2e9, gpus=4, calls=1)
        0.015
        """
        pace = self.node if gpus <= self.gpus_per_node else min(self.node, self.between)
        return num_bytes * (gpus - 1) / gpus / (pace * 1e9 * self.share) + calls * (gpus - 1) * self.hop


def flops_per_token(config: Qwen2Config, length: float) -> float:
    """Of training, forward and backward, in rows of `length` tokens: 6 a weight that multiplies, 12 a layer's scores.

    Source: Chowdhery et al., PaLM, 2022, appendix B: scores as if every token saw the whole row, nothing computed
    twice. The full recipe at 1,024: 6 x 998,637,568 + 12 x 48 x 1,024 x 1,024 = 6.596e9.
    """
    return 6 * product_weights(config) + 12 * config.num_hidden_layers * widths(config)[1] * length


def num_steps(
    rows: int, micro: int, accumulation: int, gpus: int = 1, epochs: float = 1.0, drop_rest: bool = False
) -> int:
    """Optimizer steps, as the Trainer counts them: what is left at an epoch's end is one more, smaller step.

    15,579,216 blocks, 12 x 16 x 6 a step: 13,524 steps; 13,523 with drop_rest, which leaves the smaller one out, as
    transformers 4.45 did.
    """
    batches = math.ceil(rows / (micro * gpus))
    each = batches // accumulation if drop_rest else math.ceil(batches / accumulation)
    return math.ceil(epochs * max(1, each))


def communication_seconds(
    config: Qwen2Config, network: Network, gpus: int, zero: int, accumulation: int, width: int
) -> float:
    """Seconds that one step sends, none of it hidden behind computing.

    DDP: the gradients reduced and gathered once a step, in fp32. ZeRO-1: the gradients reduced, the weights gathered,
    once a step. ZeRO-2: the gradients reduced with each micro-batch. ZeRO-3: the weights gathered twice as well.
    (Rajbhandari et al., ZeRO, 2020, section 7; DeepSpeed reduces with each micro-batch from ZeRO-2 on.)

    Args:
        width: bytes of a gradient and of a weight where they are sent, 4 for DDP.
    """
    parameters = count_parameters(config)
    if gpus == 1:
        return 0.0
    calls = math.ceil(parameters / BUCKET_ELEMENTS)
    once = network.collective(width * parameters, gpus, calls)
    return once * {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[zero]
