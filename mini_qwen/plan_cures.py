"""What makes a run fit a GPU that it does not: recipe keys, or more GPUs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from mini_qwen.low_memory import state_bytes
from mini_qwen.plan import MOST_GPUS, Machine, Run
from mini_qwen.plan_parameters import empty_model

CHECKPOINTING = "activation_checkpointing: true"


class Cure(NamedTuple):
    """Recipe keys, or a number of GPUs, and the bytes on each GPU that come of them."""

    change: str
    num_bytes: int


def cures(run: Run, machine: Machine) -> list[Cure]:
    """What makes the run fit, each by itself, with the same rows a step in all; empty when nothing here does."""
    tried = [(what, smaller, machine) for what, smaller in smaller_batches(run)]
    if run.loss_head == "full" and machine.zero != 3:
        tried.append(("loss_head: chunked", replace(run, loss_head="chunked"), machine))
    spared = replace(run, checkpointing=True)
    if not run.checkpointing:
        tried.append((CHECKPOINTING, spared, machine))
        tried += [(f"{CHECKPOINTING}, {what}", less, machine) for what, less in smaller_batches(spared)]
    if machine.gpus == 1 and not run.alone:
        # Its optimizer takes the place of Muon and works without DeepSpeed.
        keys = f"low_memory: true, {'muon_learning_rate: null, ' * run.muon}{CHECKPOINTING}"
        keys += f", --zero 0 in place of {machine.zero}" * (machine.zero > 0)
        weights = empty_model(run.config, torch.bfloat16).parameters()
        low = replace(spared, half_weights=True, muon=False, state_bytes=state_bytes(weights))
        single = replace(machine, zero=0)
        tried += [(keys, low, single)]
        tried += [(f"{keys}, {what}", less, single) for what, less in smaller_batches(low)]
    number = machine.gpus * 2
    while number <= MOST_GPUS and not run.alone:
        shared, more = run.on(number, of=machine.gpus), replace(machine, gpus=number, zero=machine.zero or 2)
        choices = [(describe_batch(shared), shared), *smaller_batches(shared)]
        tried += [(f"--gpus {number} with ZeRO-{more.zero}, {what}", less, more) for what, less in choices]
        number *= 2
    found = {}
    for what, other, place in tried:
        kind = (other.half_weights, other.checkpointing, other.loss_head, place.gpus > machine.gpus)
        if kind not in found and other.fits(place):  # of each kind the first, which changes least
            found[kind] = Cure(what, sum(other.memory(place).values()))
    return list(found.values())


def smaller_batches(run: Run) -> Iterator[tuple[str, Run]]:
    """The same rows a step, in smaller micro-batches, the largest first."""
    product = run.micro * run.accumulation
    for micro in range(run.micro - 1, 0, -1):
        if product % micro == 0:
            smaller = replace(run, micro=micro, accumulation=product // micro)
            yield describe_batch(smaller), smaller


def describe_batch(run: Run) -> str:
    return f"per_device_train_batch_size: {run.micro}, gradient_accumulation_steps: {run.accumulation}"
