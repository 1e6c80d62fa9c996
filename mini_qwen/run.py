"""One execution of a stage: what it starts with, what it leaves behind. Only the first process prints and writes."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from mini_qwen.curves import plot_curves
from mini_qwen.ledger import Ledger
from mini_qwen.mixture import MixtureKeys, read_phases

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "deepspeed", "tokenizers")


def begin(training_args: TrainingArguments, *recipe: Any) -> None:
    """Refuse what cannot go well, find the checkpoint to resume from, fix the seed, say what runs on what.

    Writes nothing.

    Raises SystemExit when output_dir holds checkpoints of an earlier run that this one is not told to continue, when
    there is nothing to continue, and for launches that do not fit the recipe.
    """
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL's trainers would report their use
    if training_args.n_gpu > 1 and not training_args.prepare_only:
        raise SystemExit(
            f"{training_args.n_gpu} GPUs are visible to one process. Start one process for each GPU, 'bash run.sh "
            "STAGE' or 'accelerate launch --config_file accelerate_config.yaml', or show one: CUDA_VISIBLE_DEVICES=0."
        )
    checkpoints = sorted(Path(training_args.output_dir).glob("checkpoint-*"))
    training_args.resume_from_checkpoint = find_resume(training_args)
    if training_args.muon_learning_rate is not None and training_args.deepspeed_plugin is not None:
        raise SystemExit(
            "muon_learning_rate works on one process, not under DeepSpeed, whose shards are no matrices any more. "
            "Leave it out of the recipe, or start one process: CUDA_VISIBLE_DEVICES=0."
        )
    if checkpoints and not training_args.resume_from_checkpoint and not training_args.prepare_only:
        raise SystemExit(
            f"{training_args.output_dir} holds {checkpoints[-1].name} of an earlier run. Pass "
            "--resume_from_checkpoint true to continue that run, or another --output_dir, or remove the folder."
        )
    ordered = training_args.train_sampling_strategy == "sequential" and training_args.num_train_epochs == 1
    if isinstance(recipe[0], MixtureKeys) and len(read_phases(recipe[0].train_files)) > 1 and not ordered:
        raise SystemExit(
            "train_files lists several mixtures, to be trained on one after the other. That needs "
            "train_sampling_strategy: sequential and num_train_epochs: 1 in the recipe; blocks are shuffled within "
            "each mixture, and a mixture may take its files more than once."
        )
    set_seed(training_args.seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if training_args.process_index == 0:
        logging.set_verbosity_error()
        print(f"device {describe_device(training_args)}, compute {training_args.precision}, fp32 master weights")
        for part in recipe:
            keys = ", ".join(f"{key}={value}" for key, value in plain_recipe(part).items())
            print(f"{type(part).__name__}: {keys}")


def step_of(checkpoint: Path) -> int:
    """500 for checkpoint-500, 0 for a folder of another name."""
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else 0


def find_resume(args: TrainingArguments) -> str | None:
    """The checkpoint folder to continue from: the named one, or for `true` the newest complete one of output_dir.

    The Trainer writes trainer_state.json last; a folder without it was interrupted and is passed over, by name.
    Raises SystemExit when there is none.
    """
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None
    folders = Path(args.output_dir).glob("checkpoint-*") if wanted is True else [Path(wanted)]
    for folder in sorted(folders, key=step_of, reverse=True):
        if (folder / "trainer_state.json").is_file():
            return str(folder)
        if args.process_index == 0:
            print(f"{folder} is no complete checkpoint: trainer_state.json is missing")
    raise SystemExit(f"There is no checkpoint to resume from: {args.output_dir if wanted is True else wanted}.")


def show_start(trainer: Trainer) -> None:
    """Print the size of what is trained, and which attention keeps its documents apart."""
    if trainer.is_world_process_zero():
        model, rows = trainer.model, len(trainer.train_dataset)
        print(f"{model.num_parameters():,} parameters, attention {model.config._attn_implementation}, {rows:,} rows")


def describe_device(args: TrainingArguments) -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return f"{args.world_size} x {name}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run does; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """The commit of the source, with `+changes` when files differ from it; 'unknown' outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes.strip() else "")


def show_data(args: TrainingArguments, ledger: Ledger) -> None:
    """Print and write down what became of every row and token. Leaves the program on `prepare_only`."""
    if args.process_index == 0:
        print(ledger.summary())
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        ledger.save(folder / "data_ledger.json")
    if args.prepare_only:
        raise SystemExit(0)


def circumstances(started: float) -> dict[str, Any]:
    """What every record of a run begins with: command, end, seconds since `started`, commit, versions, machine."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "commit": git_commit(),
        "versions": versions(),
        "cores": os.cpu_count(),
    }


def finish(trainer: Trainer, result: TrainOutput, ledger: Ledger, *recipe: Any) -> None:
    """Write the finished model with its tokenizer, the records of the run, and its loss curve to output_dir.

    run.json holds the recipe as it was run, versions, machine, commit, data ledger, metrics and times;
    trainer_state.json the logged losses; training_loss.png their curve.
    """
    folder = Path(trainer.args.output_dir)
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.model.config.use_cache = True  # switched off for training; a checkpoint is loaded to generate
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.model.generation_config.save_pretrained(folder)
        record = circumstances(trainer.args.started) | {
            "device": describe_device(trainer.args),
            "attention": trainer.model.config._attn_implementation,
            "precision": trainer.args.precision,
            "parameters": trainer.model.num_parameters(),
            "metrics": metrics,
            "ledger": ledger.as_dict(),
            "recipe": {type(part).__name__: plain_recipe(part) for part in recipe},
        }
        (folder / "run.json").write_text(
            json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
        )
        trainer.state.save_to_json(folder / "trainer_state.json")
        plot_curves({folder.name: folder / "trainer_state.json"}, folder / "training_loss.png")
        print(f"wrote {folder}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
    trainer.end()


def plain_recipe(part: Any) -> dict[str, Any]:
    """All keys of our own recipe classes; of a trainer's hundred and more, those that the recipe or the user wrote."""
    return part.written if isinstance(part, TrainingArguments) else dataclasses.asdict(part)
