"""The plan of a run on a machine: its memory, steps, FLOPs and hours, and those on more or fewer GPUs.

Memory is worked out in mini_qwen/plan_memory.py, time in plan_time.py; a recipe is read in plan_recipe.py, and what
makes a run fit is found in plan_cures.py.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from transformers import Qwen2Config

from mini_qwen.plan_memory import Compute, LossHead, Step, memory
from mini_qwen.plan_parameters import count_parameters
from mini_qwen.plan_time import GPU, Network, communication_seconds, flops_per_token, num_steps
from mini_qwen.zero_muon import ZERO_STAGE

# Assumed, not measured: CUDA's context with its libraries, and memory that the allocator holds but cannot give.
CONTEXT_BYTES, FRAGMENTATION = 1_000_000_000, 0.05
MOST_GPUS = 1024
MUON_STAGES = (0, ZERO_STAGE)


@dataclass(frozen=True)
class Machine:
    gpu: GPU
    gpus: int = 1
    zero: int = 0  # DeepSpeed's stage; 0: one process, or DDP

    @property
    def room(self) -> float:
        """Bytes of one GPU that tensors can have."""
        return self.gpu.gigabytes * 1e9 * (1 - FRAGMENTATION) - CONTEXT_BYTES


@dataclass(frozen=True)
class Run:
    """What a recipe asks for, on any machine. A row is a block, a conversation, or a pair of answers."""

    config: Qwen2Config
    rows: int  # of an epoch
    tokens: int  # of an epoch, as computed: both sides of each pair
    micro: int  # per_device_train_batch_size, in rows
    accumulation: int
    length: int  # tokens that a row may have, or either side of a pair
    state_bytes: int  # of the optimizer, for all parameters
    sides: int = 1  # 2: pairs
    epochs: float = 1.0
    max_steps: int = 0  # 0: by epochs
    precision: Literal["auto", "bf16", "fp16"] = "auto"  # as written; auto: bf16 where the GPU has it
    half_weights: bool = False  # low_memory: else fp32 weights or masters
    muon: bool = False  # muon_learning_rate
    alone: bool = False  # the optimizer works on one process only
    masked: bool = False  # SDPA keeps documents, or pads, apart
    checkpointing: bool = False
    loss_head: LossHead = "chunked"
    reference: Literal["none", "ahead", "each step"] = "none"  # when DPO computes it

    def step(self, machine: Machine) -> Step:
        bf16 = machine.gpu.bf16 and self.precision != "fp16"
        compute: Compute = "half" if machine.zero or (self.half_weights and bf16) else "autocast"
        head: LossHead = "full" if machine.zero == 3 else self.loss_head  # see why_not_chunked in mini_qwen/levers.py
        kind = (compute, self.accumulation, self.masked, self.checkpointing, head, self.half_weights)
        return Step(self.micro * self.sides, self.length, *kind)

    def memory(self, machine: Machine) -> dict[str, int]:
        """Bytes on each GPU, by part; a reference that is computed in each step is a second model."""
        step = self.step(machine)
        parts = memory(self.config, step, self.state_bytes, machine.zero, machine.gpus)
        second = step.weight_width * count_parameters(self.config) if self.reference == "each step" else 0
        return parts | {"weights": parts["weights"] + second}

    @property
    def stages(self) -> tuple[int, ...]:
        """Of ZeRO, those under which its optimizer works; 0: without DeepSpeed."""
        if self.alone:
            return (0,)
        return MUON_STAGES if self.muon else (0, 1, 2, 3)

    def fits(self, machine: Machine) -> bool:
        return sum(self.memory(machine).values()) <= machine.room

    def rows_a_step(self, gpus: int) -> int:
        return self.micro * self.accumulation * gpus

    def steps(self, gpus: int, drop_rest: bool = False) -> int:
        if self.max_steps:
            return self.max_steps
        return num_steps(self.rows, self.micro, self.accumulation, gpus, self.epochs, drop_rest)

    def flops(self, rows: float) -> float:
        """To train on so many rows; a reference that is computed in each step adds a forward pass, a third."""
        of_row = self.tokens / self.rows
        return rows * of_row * flops_per_token(self.config, of_row / self.sides) * self.with_reference

    @property
    def with_reference(self) -> float:
        return 4 / 3 if self.reference == "each step" else 1.0

    def trained_rows(self, gpus: int) -> float:
        return self.max_steps * self.rows_a_step(gpus) if self.max_steps else self.rows * self.epochs

    def all_flops(self, gpus: int) -> float:
        """Of the whole run, with the one pass of a reference that is computed ahead."""
        ahead = self.flops(self.rows) / 3 if self.reference == "ahead" else 0.0
        return self.flops(self.trained_rows(gpus)) + ahead

    def hours(self, machine: Machine, mfu: float) -> float:
        """At the share `mfu` of the GPUs' peak, with all that the run does besides computing."""
        return self.all_flops(machine.gpus) / (machine.gpus * machine.gpu.teraflops * 1e12 * mfu) / 3600

    def on(self, gpus: int, of: int) -> "Run":
        """The run of `of` GPUs on another number, with rows a step as near as can be, never fewer.

        1,152 rows as 6 x 32 x 6 GPUs are 5 x 2 x 128 GPUs = 1,280 rows, for 9 each would be 1.5 micro-batches of 6.
        """
        share = math.ceil(self.rows_a_step(of) / gpus)
        accumulation = math.ceil(share / self.micro)
        return replace(self, micro=math.ceil(share / accumulation), accumulation=accumulation)


class Scale(NamedTuple):
    """The run on a number of GPUs."""

    gpus: int
    micro: int
    accumulation: int
    rows_a_step: int
    steps: int
    compute_s: float  # of a step
    send_s: float
    hours: float
    efficiency: float  # share of the time that is computing
    gigabytes: float  # of each GPU
    fits: bool


def sweep(run: Run, machine: Machine, network: Network, mfu: float) -> list[Scale]:
    """The run on 1, 2, 4 ... MOST_GPUS GPUs: `mfu` is what one GPU reaches, and sending comes on top of it."""
    scales = []
    number = 1
    while number <= MOST_GPUS:
        place = replace(machine, gpus=number, zero=machine.zero if number > 1 else 0)
        shared = run.on(number, of=machine.gpus)
        width = 2 if place.zero else 4
        peak = number * machine.gpu.teraflops * 1e12 * mfu
        compute = run.flops(shared.rows_a_step(number)) / peak
        send = communication_seconds(run.config, network, number, place.zero, shared.accumulation, width)
        steps = shared.steps(number)
        ahead = (run.all_flops(machine.gpus) - run.flops(run.trained_rows(machine.gpus))) / peak
        scales.append(
            Scale(
                *(number, shared.micro, shared.accumulation, shared.rows_a_step(number), steps, compute, send),
                hours=(steps * (compute + send) + ahead) / 3600,
                efficiency=compute / (compute + send),
                gigabytes=sum(shared.memory(place).values()) / 1e9,
                fits=shared.fits(place),
            )
        )
        number *= 2
    return scales
