"""The output folder of a run: one writer at a time, one experiment, and the checkpoint to go on from."""

import json
from collections.abc import Callable
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
    set_later_aside,
    verify,
)
from mini_qwen.fingerprint import check_same_run, make_fingerprint

LOCK = ".lock"
FINGERPRINT = "fingerprint.json"  # of the run that a folder belongs to, from its first step on


def lock_of(folder: Path) -> FileLock:
    """The same object in all of a process; the system lets go of the lock when the process ends, however it ends."""
    return FileLock(folder / LOCK, is_singleton=True)


def on_first_process(args: TrainingArguments, work: Callable[[], Any]) -> Any:
    """The result of `work`, done by the first process, in all of them.

    When it refuses to go on (SystemExit), all end: left alone the others would wait for it. Only one says why.
    """
    result: list[Any] = [None, False]
    refusal = None
    if args.process_index == 0:
        try:
            result[0] = work()
        except SystemExit as refused:
            refusal, result[1] = refused, True
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(result)
    if result[1]:
        raise refusal or SystemExit(1)
    return result[0]


def hold(args: TrainingArguments) -> None:
    """Make sure that no other program writes into output_dir, and clear what a killed one was writing there.

    Raises SystemExit when another one does. For the first process, before anything of this run is written.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock_of(folder).acquire(timeout=0)
    except Timeout:
        raise SystemExit(
            f"Another program is training into {folder}. Wait for it or stop it, or name another --output_dir."
        ) from None
    clear_unfinished(folder)


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
    find = find_newest_of if wanted is True or wanted == "auto" else use_named
    found = on_first_process(args, lambda: find(args, folder))
    if args.process_index == 0:
        print(f"going on from {found}" if found else f"{folder} has no checkpoint: from the beginning")
    return found


def use_named(args: TrainingArguments, folder: Path) -> str:
    named = Path(args.resume_from_checkpoint)
    try:
        check_resumable(verify(named))
    except ValueError as reason:
        raise SystemExit(f"There is no checkpoint to resume from: {named}: {reason}.") from None
    if named.resolve().parent != folder.resolve():
        refuse_earlier_run(folder)
    else:
        hold(args)
    return str(named)


def find_newest_of(args: TrainingArguments, folder: Path) -> str | None:
    newest = None
    if folder.is_dir():
        hold(args)
        try:
            newest = find_newest(folder)
        except ValueError as reason:
            raise SystemExit(
                f"There is no checkpoint to resume from: {folder}: {reason}. To begin the run anew, remove the folder."
            ) from None
    begun = (folder / FINGERPRINT).is_file() and not (folder / MANIFEST).is_file()
    never_begun = not (folder / FINGERPRINT).is_file() and args.resume_from_checkpoint == "auto"
    if newest is None and not begun and not never_begun:
        finished = ", and the run is finished" * (folder / MANIFEST).is_file()
        raise SystemExit(f"There is no checkpoint to resume from: {folder}{finished}.")
    return newest and str(newest)


def refuse_earlier_run(folder: Path) -> None:
    checkpoints = find_checkpoints(folder)
    held = checkpoints[-1].name if checkpoints else "the finished model" if (folder / MANIFEST).exists() else None
    if held:
        raise SystemExit(
            f"{folder} holds {held} of an earlier run. Pass --resume_from_checkpoint true to continue that run, or "
            "another --output_dir, or remove the folder."
        )


def check_identity(trainer: Trainer) -> None:
    """Make sure that a resumed run is the one that wrote the checkpoint, and write down whose the folder is now.

    Its seconds count on from the checkpoint's.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    trainer.fingerprint = make_fingerprint(trainer)
    if args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        manifest = read_manifest(checkpoint)
        check_same_run(manifest["fingerprint"], trainer.fingerprint, str(checkpoint), args.allow_changes or [])
        args.started -= manifest.get("seconds", 0.0)
        if checkpoint.resolve().parent == folder.resolve():
            set_later_aside(checkpoint)
    write_whole(folder / FINGERPRINT, trainer.fingerprint)


def write_whole(file: Path, content: dict[str, Any]) -> None:
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    fresh.replace(file)
