"""Muon under ZeRO-2: DeepSpeed's own, with the rates and the decay of `torch.optim.Muon`."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainingArguments

ZERO_STAGE = 2  # of DeepSpeed, the one that is tested with Muon


def why_not_here(args: TrainingArguments) -> str | None:
    """What stands in the way of Muon under DeepSpeed, and the cure; None when nothing does."""
    stage = args.deepspeed_plugin.zero_stage
    if stage != ZERO_STAGE:
        only = f"only {ZERO_STAGE} is tested with it; set it to {ZERO_STAGE}"
        return f"the machine file's zero_stage is {stage}, and {only}"
    if args.max_grad_norm:
        return (
            f"max_grad_norm is {args.max_grad_norm}: DeepSpeed clips behind Muon's orthogonalization, where it would "
            "shrink every update, and not before it. Set max_grad_norm: 0"
        )
    return None


def make_zero_muon(
    matrices: Iterable[torch.nn.Parameter],
    others: Iterable[torch.nn.Parameter],
    muon_lr: float,
    adamw_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """DeepSpeed's Muon with torch's AdamW for the others, as groups that the Trainer can schedule.

    DeepSpeed's update of a matrix of A rows and B columns has the length sqrt(max(1, A / B)), that of torch with
    `match_rms_adamw` 0.2 sqrt(max(A, B)): 0.2 sqrt(B) times as much, whatever A is. So matrices of the same number of
    columns are a group, its rate that much higher, its decay that much lower: what is taken off a step stays.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    by_columns: defaultdict[int, list[torch.nn.Parameter]] = defaultdict(list)
    for weight in matrices:
        weight.use_muon = True
        by_columns[weight.shape[1]].append(weight)
    groups: list[dict[str, Any]] = []
    for columns, weights in sorted(by_columns.items()):
        scale = 0.2 * math.sqrt(columns)
        group = {"params": weights, "lr": scale * muon_lr, "weight_decay": weight_decay / scale, "momentum": 0.95}
        groups.append(group | {"rate_scale": scale, "ns_method": "standard", "use_muon": True})
    rest = list(others)
    for weight in rest:
        weight.use_muon = False
    groups.append({"params": rest, "lr": adamw_lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "use_muon": False})
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={})
