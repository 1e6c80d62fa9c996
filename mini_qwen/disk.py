"""Room on the disk: what the checkpoints of a run will need, against what is free, before the first step."""

import errno
import math
import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from mini_qwen.checkpoint import find_checkpoints
from mini_qwen.low_memory import state_bytes

# Bytes of optimizer state for each parameter; of one that is not named, AdamW's, which hardly any exceeds.
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 1, "lion": 4, "8bit": 2, "4bit": 1, "adamw": 8}
OTHER_FILES = 20_000_000  # tokenizer, logs, states of the generators


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def checkpoint_bytes(trainer: Trainer) -> int:
    """Estimate of one checkpoint: weights and optimizer state, the latter with fp32 master weights under ZeRO."""
    args, weights = trainer.args, list(trainer.model.parameters())
    num_parameters = sum(weight.numel() for weight in weights)
    if args.deepspeed_plugin is not None:
        # model.safetensors, the same weights once more in DeepSpeed's own file, masters and two moments in shards
        bytes_each = 4 if args.precision == "fp32" else 2
        return num_parameters * (2 * bytes_each + 12) + OTHER_FILES
    stored = sum(weight.numel() * weight.element_size() for weight in weights)
    if args.save_only_model:
        return stored + OTHER_FILES
    return stored + optimizer_bytes(trainer) + OTHER_FILES


def optimizer_bytes(trainer: Trainer) -> int:
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    num_parameters = sum(weight.numel() for weight in weights)
    if trainer.args.low_memory:
        return state_bytes(weights)
    if trainer.optimizer is None:
        name = str(trainer.args.optim)
        return num_parameters * next((size for key, size in OPTIMIZER_BYTES.items() if key in name.lower()), 8)
    # Muon keeps one number for each weight of its matrices, AdamW two for all others.
    matrices, others = (sum(weight.numel() for weight in group["params"]) for group in trainer.optimizer.param_groups)
    return 4 * matrices + 8 * others


def most_checkpoints(trainer: Trainer, num_steps: int) -> int:
    """How many checkpoints there are at most when the run has ended; one for a run that only saves when stopped."""
    args = trainer.args
    if args.save_strategy == SaveStrategy.NO:
        return 1
    if args.save_strategy == SaveStrategy.STEPS:
        every = args.save_steps if args.save_steps >= 1 else max(1, num_steps * args.save_steps)
        num_saves = math.ceil(num_steps / every)
    else:
        num_saves = max(1, math.ceil(args.num_train_epochs))
    return min(num_saves, trainer.checkpoint_limit or num_saves)


def count_steps(trainer: Trainer) -> int:
    """Of the whole run, as the Trainer will count them."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    num_batches = math.ceil(len(trainer.train_dataset) / (args.train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * math.ceil(num_batches / args.gradient_accumulation_steps))


def check_space(trainer: Trainer) -> None:
    """Raises SystemExit when the disk of output_dir has no room for the checkpoints and the finished model.

    An old checkpoint is deleted when the new one is whole, so that there is one more for a while.
    """
    folder = Path(trainer.args.output_dir)
    each, number = checkpoint_bytes(trainer), most_checkpoints(trainer, count_steps(trainer))
    bytes_each = 4 if trainer.args.low_memory else 0  # the finished model is fp32 then
    model = sum(weight.numel() * max(weight.element_size(), bytes_each) for weight in trainer.model.parameters())
    there = sum(map(folder_bytes, find_checkpoints(folder)))
    need, free = each * (number + 1) + model - there, shutil.disk_usage(folder).free
    if need > free:
        raise SystemExit(
            f"{folder} needs {gigabytes(need)} more: {number} checkpoint{'s' * (number > 1)} of {gigabytes(each)}, "
            f"one more while it is written, and the model ({gigabytes(model)}). Its disk has {gigabytes(free)} free. "
            "Free some, lower save_total_limit, raise save_steps, or name an output_dir on another disk."
        )


def explain_full_disk(error: Exception, folder: Path, unfinished: Path, need: int) -> SystemExit | None:
    """What to say instead of the error when the cause is a disk without room; None when it has enough.

    torch says nothing of the disk when it cannot write, so the figures decide: what is free, and what this save has
    taken so far.
    """
    free = shutil.disk_usage(folder).free + folder_bytes(unfinished)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if not full and free >= need:
        return None
    return SystemExit(
        f"The disk of {folder} is full: a checkpoint needs {gigabytes(need)}, {gigabytes(free)} are free "
        f"({error!s:.120}). Nothing unfinished was left behind, and the checkpoints before it are whole. Free some "
        "room, then go on with --resume_from_checkpoint true."
    )
