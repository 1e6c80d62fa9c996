"""The output folder of a run: one writer at a time, one experiment, and the checkpoint to go on from."""

import json
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import Trainer, TrainingArguments

from mini_qwen.checkpoint import (
    MANIFEST,
    check_resumable,
    clear_unfinished,
    find_checkpoints,
    find_newest,
    read_manifest,
    verify,
)
from mini_qwen.fingerprint import check_same_run, make_fingerprint

LOCK = ".lock"
FINGERPRINT = "fingerprint.json"  # of the run that a folder belongs to, from its first step on


def lock_of(folder: Path) -> FileLock:
    """The same object in all of a process; the system lets go of the lock when the process ends, however it ends."""
    return FileLock(folder / LOCK, is_singleton=True)


def hold(args: TrainingArguments) -> None:
    """Make sure that no other program writes into output_dir. Raises SystemExit when one does."""
    if args.process_index != 0:
        return
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock_of(folder).acquire(timeout=0)
    except Timeout:
        raise SystemExit(
            f"Another program is training into {folder}. Wait for it or stop it, or name another --output_dir."
        ) from None


def release(args: TrainingArguments) -> None:
    if args.process_index == 0:
        (Path(args.output_dir) / LOCK).unlink(missing_ok=True)
        lock_of(Path(args.output_dir)).release(force=True)


def find_resume(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from, the same in all processes: the named one, or the newest one of output_dir.

    `true` is the newest, or the beginning of a run that was stopped before it saved anything; `auto` is also the
    beginning of a run that was never started. Broken checkpoints are passed over and set aside.

    Raises SystemExit for an output_dir that holds an earlier run which this one is not told to go on with, for a named
    checkpoint that is broken, and where there is nothing to go on from.
    """
    wanted, folder = args.resume_from_checkpoint, Path(args.output_dir)
    if args.prepare_only:
        return None
    if not wanted:
        refuse_earlier_run(folder)
        return None
    if wanted is not True and wanted != "auto":
        try:
            check_resumable(Path(wanted), verify(Path(wanted)))
        except ValueError as reason:
            raise SystemExit(f"There is no checkpoint to resume from: {wanted}: {reason}.") from None
        return str(wanted)
    found: list[str | None] = [None]
    if folder.is_dir() and args.process_index == 0:
        hold(args)
        clear_unfinished(folder)
        newest = find_newest(folder)
        found = [newest and str(newest)]
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(found)
    if found[0] is None and wanted is True and not (folder / FINGERPRINT).is_file():
        raise SystemExit(f"There is no checkpoint to resume from: {folder}.")
    if args.process_index == 0:
        print(f"going on from {found[0]}" if found[0] else f"{folder} has no whole checkpoint: from the beginning")
    return found[0]


def refuse_earlier_run(folder: Path) -> None:
    checkpoints = find_checkpoints(folder)
    held = checkpoints[-1].name if checkpoints else "the finished model" if (folder / MANIFEST).exists() else None
    if held:
        raise SystemExit(
            f"{folder} holds {held} of an earlier run. Pass --resume_from_checkpoint true to continue that run, or "
            "another --output_dir, or remove the folder."
        )


def check_identity(trainer: Trainer) -> None:
    """Make sure that a resumed run is the one that wrote the checkpoint, and write down whose the folder is now."""
    args = trainer.args
    if args.process_index != 0:
        return
    trainer.fingerprint = make_fingerprint(trainer)
    if args.resume_from_checkpoint:
        saved = read_manifest(Path(args.resume_from_checkpoint))["fingerprint"]
        check_same_run(saved, trainer.fingerprint, args.resume_from_checkpoint, args.allow_changes or [])
    write_whole(Path(args.output_dir) / FINGERPRINT, trainer.fingerprint)


def write_whole(file: Path, content: dict[str, Any]) -> None:
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    fresh.replace(file)
