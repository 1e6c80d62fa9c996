"""One execution of a stage: what it starts with, what it leaves behind. Only the first process prints and writes."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from mini_qwen.checkpoint import publish_files, write_manifest
from mini_qwen.circumstances import circumstances, describe_device
from mini_qwen.curves import plot_curves
from mini_qwen.disk import check_space
from mini_qwen.guard import Guarded
from mini_qwen.interruption import interruption
from mini_qwen.launch import NUM_PROCESSES
from mini_qwen.ledger import Ledger
from mini_qwen.levers import show_levers
from mini_qwen.low_memory import widen
from mini_qwen.mixture import MixtureKeys, read_phases
from mini_qwen.resumption import check_identity, find_resume, hold, on_first_process, release
from mini_qwen.threads import threads_of_each
from mini_qwen.watch import Heartbeat, call_when_orphaned, end_as_orphan
from mini_qwen.zero_muon import why_not_here


def begin(training_args: TrainingArguments, *recipe: Any) -> None:
    """Refuse what cannot go well, find the checkpoint to resume from, fix the seed, say what runs on what.

    Writes nothing but the lock of an output_dir that is there. From here on a signal stops the run with code 75.

    Raises SystemExit when output_dir holds an earlier run that this one is not told to continue, when there is
    nothing to continue, and for launches that do not fit the recipe.
    """
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL's trainers would report their use
    interruption.listen(speaks=training_args.process_index == 0)
    call_when_orphaned(end_as_orphan)
    check_launch(training_args)
    ordered = training_args.train_sampling_strategy == "sequential" and training_args.num_train_epochs == 1
    if isinstance(recipe[0], MixtureKeys) and len(read_phases(recipe[0].train_files)) > 1 and not ordered:
        raise SystemExit(
            "train_files lists several mixtures, to be trained on one after the other. That needs "
            "train_sampling_strategy: sequential and num_train_epochs: 1 in the recipe; blocks are shuffled within "
            "each mixture, and a mixture may take its files more than once."
        )
    training_args.resume_from_checkpoint = find_resume(training_args)
    set_seed(training_args.seed)
    torch.set_num_threads(threads_of_each(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if training_args.process_index == 0:
        logging.set_verbosity_error()
        weights = "bf16 weights and a byte more, 8-bit moments" if training_args.low_memory else "fp32 master weights"
        print(f"device {describe_device(training_args)}, compute {training_args.precision}, {weights}")
        for part in recipe:
            keys = ", ".join(f"{key}={value}" for key, value in plain_recipe(part).items())
            print(f"{type(part).__name__}: {keys}")


def check_launch(args: TrainingArguments) -> None:
    """Raises SystemExit when the number of processes or GPUs is not what was asked for or cannot work."""
    if args.n_gpu > 1 and not args.prepare_only:
        raise SystemExit(
            f"{args.n_gpu} GPUs are visible to one process. Start one process for each GPU, 'bash run.sh STAGE' or "
            "'python -m mini_qwen.launch --num_processes N', or show one: CUDA_VISIBLE_DEVICES=0."
        )
    asked = int(os.environ.get(NUM_PROCESSES, args.world_size))
    if asked != args.world_size:
        raise SystemExit(
            f"{asked} processes were asked for, and this one is 1 of {args.world_size}. accelerate starts one only "
            "for some machine files (MULTI_CPU among them); use accelerate_config.yaml as it is."
        )
    if args.muon_learning_rate is not None and args.deepspeed_plugin is not None and (reason := why_not_here(args)):
        raise SystemExit(f"muon_learning_rate does not work under DeepSpeed as it stands here: {reason}.")
    if args.low_memory and (args.world_size > 1 or args.deepspeed_plugin is not None):
        raise SystemExit(
            "low_memory works on one process, without DeepSpeed, whose optimizers keep fp32 weights of their own. "
            "Leave it out of the recipe: ZeRO-2 shares the memory among the GPUs. Or start one process, without a "
            "launcher: CUDA_VISIBLE_DEVICES=0."
        )


def show_data(args: TrainingArguments, ledger: Ledger) -> None:
    """Print and write down what became of every row and token. Leaves the program on `prepare_only`."""
    if not args.prepare_only:
        on_first_process(args, lambda: hold(args))
    if args.process_index == 0:
        print(ledger.summary())
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        ledger.save(folder / "data_ledger.json")
    if args.prepare_only:
        interruption.leave()
        raise SystemExit(0)


def show_start(trainer: Guarded) -> None:
    """The last checks before the first step: the same run as the checkpoint's, and room on the disk.

    Prints the size of what is trained, which attention keeps its documents apart, and what was chosen for speed.
    """
    args, model = trainer.args, trainer.model

    def check() -> None:
        check_identity(trainer)
        check_space(trainer)
        rows = len(trainer.train_dataset)
        print(f"{model.num_parameters():,} parameters, attention {model.config._attn_implementation}, {rows:,} rows")
        print(show_levers(trainer))

    on_first_process(args, check)
    if args.world_size > 1:
        trainer.heartbeat = Heartbeat(Path(args.output_dir), args.process_index, args.world_size)
        trainer.heartbeat.start()


def finish(trainer: Guarded, result: TrainOutput, ledger: Ledger, *recipe: Any) -> None:
    """Write the finished model with its tokenizer, the records of the run, and its loss curve to output_dir.

    run.json holds the recipe as it was run, versions, machine, commit, data ledger, metrics and times;
    trainer_state.json the logged losses; training_loss.png their curve; manifest.json, written last, all hashes.
    """
    folder = Path(trainer.args.output_dir)
    metrics = result.metrics | {"train_loss": mean_loss(trainer.state.log_history)}
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.model.config.use_cache = True  # switched off for training; a checkpoint is loaded to generate
    with trainer.written_aside() as aside:
        whole = aside / "finished"
        if trainer.args.low_memory:
            widen(trainer.model, trainer.optimizer)
        trainer.save_model(str(whole))
        if trainer.is_world_process_zero():
            trainer.model.generation_config.save_pretrained(whole)
            record = circumstances(trainer.args.started) | {
                "device": describe_device(trainer.args),
                "attention": trainer.model.config._attn_implementation,
                "precision": trainer.args.precision,
                "parameters": trainer.model.num_parameters(),
                "metrics": metrics,
                "ledger": ledger.as_dict(),
                "recipe": {type(part).__name__: plain_recipe(part) for part in recipe},
            }
            (whole / "run.json").write_text(
                json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
            )
            trainer.state.save_to_json(whole / "trainer_state.json")
            plot_curves({folder.name: whole / "trainer_state.json"}, whole / "training_loss.png")
            write_manifest(whole, trainer.fingerprint, record["seconds"])
            publish_files(whole, folder)
            print(f"wrote {folder}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
    release(trainer.args)
    trainer.leave(0)


def mean_loss(history: list[dict[str, Any]]) -> float:
    """Of all steps of a run. The Trainer's own is of those since the last resume.

    >>> mean_loss([{"step": 20, "loss": 4.0}, {"step": 30, "loss": 1.0}])
    3.0
    """
    entries = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    steps = [0, *(step for step, _ in entries)]
    total = sum(loss * (step - before) for (step, loss), before in zip(entries, steps, strict=False))
    return total / max(1, steps[-1])


def plain_recipe(part: Any) -> dict[str, Any]:
    """All keys of our own recipe classes; of a trainer's hundred and more, those that the recipe or the user wrote."""
    return part.written if isinstance(part, TrainingArguments) else dataclasses.asdict(part)
