"""The levers of speed and memory: what a run has chosen of each, and why, as one table before it starts.

Each is a key of the recipe, the launcher or the environment, with a default that is right on every machine.
"""

import os
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from transformers import PreTrainedModel, Trainer, TrainingArguments

from mini_qwen.fingerprint import describe_distribution
from mini_qwen.loss_head import add_loss_head
from mini_qwen.threads import VARIABLE, available_cores
from mini_qwen.varlen import VARLEN

# Keys of a config that change the logits between the head's matrix and the loss, in models other than Qwen2.
TRANSFORMED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")

AUTOMATIC_PRECISION = "bf16 or fp16 on a GPU; fp32 on a CPU, the same on every machine"


class Lever(NamedTuple):
    key: str  # of the recipe, where it is one
    chosen: Any
    why: str


def fit_loss_head(model: PreTrainedModel, args: TrainingArguments, equal_weights: bool) -> None:
    """Give the model our loss head where the recipe's `loss_head` says so; replaces one that TRL has added before."""
    if choose_loss_head(model, args).chosen == "chunked":
        add_loss_head(model, equal_weights)


def choose_loss_head(model: PreTrainedModel, args: TrainingArguments) -> Lever:
    """`chunked` where it can be. Raises SystemExit where it is asked for and cannot be."""
    reason = why_not_chunked(model, args)
    if args.loss_head == "chunked" and reason is not None:
        raise SystemExit(
            f"loss_head: chunked is not possible here: {reason}. Leave the key out, or set it to library."
        )
    if args.loss_head == "library":
        return Lever("loss_head", "library", "the recipe says so")
    if reason is not None:
        return Lever("loss_head", "library", reason)
    return Lever("loss_head", "chunked", "the batch's logits are never all there; only labelled tokens are scored")


def why_not_chunked(model: PreTrainedModel, args: TrainingArguments) -> str | None:
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return "ZeRO-3 gathers the head's matrix for the model's own forward pass only"
    if getattr(args, "use_weighting", False):
        return "use_weighting needs sums over the vocabulary that it does not make"
    if args.label_smoothing_factor > 0:
        return "label_smoothing_factor needs all logits"
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return "the model's head is not one matrix"
    changed = [key for key in TRANSFORMED if getattr(model.config, key, None) is not None]
    return f"the model changes its logits ({', '.join(changed)})" if changed else None


def list_levers(trainer: Trainer) -> list[Lever]:
    args, model = trainer.args, trainer.model
    on_gpu = args.device.type == "cuda"
    levers = [choose_loss_head(model, args), describe_attention(model, on_gpu)]
    if hasattr(args, "precompute_ref_log_probs"):
        ahead = args.precompute_ref_log_probs
        why = "one pass before the training" if ahead else "a second model in memory, and its pass in every step"
        levers.append(Lever("precompute_ref_log_probs", ahead, why))
        by_length = args.train_sampling_strategy == "group_by_length"
        why = "a batch's pairs are of like length" if by_length else "pairs are filled up to the batch's longest"
        levers.append(Lever("train_sampling_strategy", args.train_sampling_strategy, why))
    precision = "the recipe says so" if "precision" in args.written else AUTOMATIC_PRECISION
    compiled = "small operations become one; the first steps are slow"
    if not args.compile_layers:
        later = "compiling takes 7 to 15 s before the first step of a GPU, a minute on a CPU"
        compiled = "not in this stage" if "compile_layers" in args.decided else later
    why = "memory for time" if args.activation_checkpointing else "1.3 times the time where memory allows it off"
    levers += [
        Lever("precision", args.precision, precision),
        Lever("compile_layers", args.compile_layers, compiled),
        Lever("activation_checkpointing", bool(args.activation_checkpointing), why),
        describe_optimizer(trainer),
        Lever("dataloader_num_workers", args.dataloader_num_workers, "rows are read from mapped files"),
        Lever("distribution", describe_distribution(trainer), f"{args.world_size} processes"),
        describe_threads(),
    ]
    return levers


def describe_attention(model: PreTrainedModel, on_gpu: bool) -> Lever:
    chosen = model.config._attn_implementation
    if "flash" in chosen or chosen == VARLEN:
        return Lever("attn_implementation", chosen, "a batch is one flat row")
    why = "the recipe's, or no flash attention that this GPU can use" if on_gpu else "no GPU"
    return Lever("attn_implementation", chosen, f"{why}; rows are kept apart by their positions")


def describe_optimizer(trainer: Trainer) -> Lever:
    """Before the Trainer has made its own, `optim` is what it will make."""
    if trainer.args.low_memory:
        each = 9 if trainer.args.precision == "fp16" else 7
        return Lever("low_memory", f"AdamW in {each} bytes a weight, gradients included", "the recipe says so")
    if trainer.args.muon_learning_rate is not None:
        return Lever("muon_learning_rate", "Muon and AdamW", "fewer steps to the same loss")
    name = getattr(trainer.args.optim, "value", trainer.args.optim)
    return Lever("optim", name, "one kernel for all weights" if "fused" in name else "the recipe says so")


def describe_threads() -> Lever:
    cores, busy = available_cores(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    why = f"{VARIABLE}, set by you or the launcher" if os.environ.get(VARIABLE) else f"{cores} cores for this run"
    if busy > cores / 2:
        why += f"; {busy:.1f} of them busy lately: beside other programs {VARIABLE}=1 can be many times faster"
    return Lever("threads", torch.get_num_threads(), why)


def show_levers(trainer: Trainer) -> str:
    return tabulate(list_levers(trainer), headers=("lever", "chosen", "why"), tablefmt="simple")
