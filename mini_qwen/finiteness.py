"""A loss, gradient or weight that is no number: the run stops before one reaches a checkpoint, and names the rows."""

import math
from itertools import islice

import torch
from transformers import Trainer

SHOWN_ROWS = 8  # with their beginnings; of the others the index
SHOWN_TOKENS = 20


def check_step(trainer: Trainer, losses: list[torch.Tensor], norm: torch.Tensor | float) -> None:
    """Raises SystemExit when the losses of a step's micro-batches or the gradient's norm are not finite.

    Called between the backward passes and the optimizer's step; under DeepSpeed behind the latter, which leaves the
    weights alone when the gradient is not finite.
    """
    finite = torch.stack([torch.isfinite(loss) for loss in losses]).all()
    if not tolerates_infinite_gradient(trainer):
        finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device))
    if finite.item():  # one look at the device a step
        return
    values = [loss.item() for loss in losses]
    wrong = [number for number, loss in enumerate(values) if not math.isfinite(loss)]
    first, count = (wrong[0], 1) if wrong else (0, len(losses))
    num_ranks = trainer.args.world_size
    others = f" or from rows of the other {num_ranks - 1} processes" * (num_ranks > 1 and not wrong)
    raise SystemExit(
        f"Step {trainer.state.global_step + 1:,}, rank {trainer.args.process_index}: the loss is "
        f"{', '.join(map(str, values))}, the gradient's norm {float(norm)}. The run stops before that reaches a "
        f"checkpoint; go on from the newest with --resume_from_checkpoint true. This came from "
        f"{name_rows(trainer, first, count)}{others}. Look at them; if they are as they should be, lower "
        "learning_rate or raise warmup_steps and permit it by --allow_changes, or use bf16 or fp32 in place of fp16."
    )


def tolerates_infinite_gradient(trainer: Trainer) -> bool:
    """In fp16, as long as the loss can be scaled down further.

    fp16 scales its losses up until a gradient is infinite; the scaler skips that step and halves the scale.
    """
    scaler = trainer.accelerator.scaler
    return trainer.args.fp16 and (scaler is None or scaler.get_scale() >= 1)


def check_weights(trainer: Trainer) -> None:
    """Raises SystemExit when a weight is not finite. Called before weights are written."""
    broken = [name for name, weight in trainer.model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        more = f" and {len(broken) - 1} more weights are" if len(broken) > 1 else " is"
        raise SystemExit(
            f"Step {trainer.state.global_step:,}, rank {trainer.args.process_index}: {broken[0]}{more} not finite, "
            "and nothing is saved. Go on from the newest checkpoint with --resume_from_checkpoint true and a lower "
            "learning_rate, which --allow_changes learning_rate permits."
        )


def name_rows(trainer: Trainer, first: int, count: int) -> str:
    """The rows of `count` micro-batches, from number `first` of the step under way on, by index and beginning."""
    per_step = trainer.args.gradient_accumulation_steps
    loader = trainer.callback_handler.train_dataloader
    epoch, step = divmod(trainer.state.global_step, max(1, math.ceil(len(loader) / per_step)))
    loader.set_epoch(epoch)  # reading ahead may have begun the next one
    num_batches = step * per_step + first
    batches = islice(iter(loader.batch_sampler), num_batches, num_batches + count)
    rows = [index for batch in batches for index in batch]
    shown = [f"{index} ({begin_of(trainer, index)!r})" for index in rows[:SHOWN_ROWS]]
    return "rows " + ", ".join([*shown, *map(str, rows[SHOWN_ROWS:])])


def begin_of(trainer: Trainer, index: int) -> str:
    row = trainer.train_dataset[index]
    ids = row["input_ids" if "input_ids" in row else "prompt_ids"][:SHOWN_TOKENS]
    return trainer.processing_class.decode(ids).rstrip("\ufffd")
