"""Muon for the weight matrices, AdamW for everything else, as one optimizer that the Trainer can schedule and save."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainingArguments

from mini_qwen.low_memory import low_memory_optimizer
from mini_qwen.zero_muon import make_zero_muon


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on the matrices inside the layers and `torch.optim.AdamW` on embeddings, norms and biases.

    Muon makes each matrix's update orthogonal, so that all its directions move alike (Jordan et al., 2024); with
    `match_rms_adamw` the update has AdamW's size (Liu et al., 2025, arXiv:2502.16982), here at its own rate.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        others: Iterable[torch.nn.Parameter],
        muon_lr: float,
        adamw_lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self.parts = [
            torch.optim.Muon(list(matrices), lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(list(others), lr=adamw_lr, weight_decay=0.0, betas=betas, eps=eps),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.share_groups()

    def share_groups(self) -> None:
        """Let the parts work on this optimizer's own groups, where the scheduler writes the rates."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.share_groups()


def make_optimizer(
    model: PreTrainedModel, args: TrainingArguments, muon_learning_rate: float | None
) -> torch.optim.Optimizer | None:
    """Muon with AdamW when the recipe sets `muon_learning_rate`, LowMemoryAdamW when it sets `low_memory`.

    Else None: the Trainer makes the one that `optim` names. Under DeepSpeed, which hands an optimizer flattened shards
    that are no matrices any more, Muon is DeepSpeed's own.
    """
    if args.low_memory:
        return low_memory_optimizer(model, args)
    if muon_learning_rate is None:
        return None
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in named if weight.ndim == 2 and ".layers." in name]
    chosen = {id(weight) for weight in matrices}
    make = MuonWithAdamW if args.deepspeed_plugin is None else make_zero_muon
    return make(
        matrices,
        [weight for _, weight in named if id(weight) not in chosen],
        muon_lr=muon_learning_rate,
        adamw_lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def rate_of(group: dict[str, Any], args: TrainingArguments) -> float:
    """The recipe's learning rate of an optimizer's group; only Muon's groups have a momentum."""
    if "momentum" in group and args.muon_learning_rate is not None:
        return args.muon_learning_rate * group.get("rate_scale", 1.0)
    return args.learning_rate


def take_rates(optimizer: torch.optim.Optimizer, scheduler: Any, args: TrainingArguments) -> None:
    """Give the recipe's learning rates to an optimizer and a scheduler that were loaded from a checkpoint.

    They come with those of the run that wrote it, whatever the recipe says now. The schedule itself is the recipe's.
    """
    groups = optimizer.param_groups
    rates = [rate_of(group, args) for group in groups]
    if not isinstance(scheduler, LambdaLR) or scheduler.base_lrs == rates:
        return
    for group, rate, before in zip(groups, rates, scheduler.base_lrs, strict=True):
        group["initial_lr"] = rate
        group["lr"] *= rate / before
    scheduler.base_lrs = rates
    scheduler._last_lr = [group["lr"] for group in groups]
