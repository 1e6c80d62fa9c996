"""Checkpoint folders that are complete or not there: written aside, hashed, renamed in one step, verified before use.

    output_dir/.unfinished/     what is being written or deleted; removed when the next run begins
    output_dir/checkpoint-500/  complete, with a manifest.json of all its files
    output_dir/broken-checkpoint-500/   did not verify when a run was to go on from it
A manifest holds the size and SHA-256 of every file, the fingerprint of the run and its seconds, and its own hash.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from mini_qwen.integrity import hash_files, sync, sync_all

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
BROKEN = "broken-"


def hash_content(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, fingerprint: dict[str, Any], seconds: float) -> None:
    """Hash all files below `folder`, write its manifest.json with the run's seconds so far, and sync everything."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    entries = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, hash_files(files), strict=True)
    }
    content: dict[str, Any] = {"files": entries, "fingerprint": fingerprint, "seconds": round(seconds, 1)}
    content["sha256"] = hash_content(content)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync_all(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError, with what is wrong in a few words, when it is missing or not as it was written."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        own_hash = content.pop("sha256")
        if own_hash == hash_content(content):
            return content
        raise ValueError
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST} is damaged") from None


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that is as it was written. Raises ValueError naming the first file that is not."""
    content = read_manifest(folder)
    try:
        compare(folder, content)
    except OSError as error:
        raise ValueError(f"{Path(error.filename or folder).name} cannot be read ({error.strerror})") from None
    return content


def compare(folder: Path, content: dict[str, Any]) -> None:
    """Sizes first, which costs nothing, then hashes."""
    for name, entry in content["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        size = (folder / name).stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes, not {entry['bytes']:,}")
    names = list(content["files"])
    for name, digest in zip(names, hash_files(folder / name for name in names), strict=True):
        if digest != content["files"][name]["sha256"]:
            raise ValueError(f"{name} is not as it was written (its SHA-256 differs)")


def step_of(checkpoint: Path) -> int:
    """500 for checkpoint-500, 0 for a folder of another name."""
    kind, _, step = checkpoint.name.rpartition("-")
    return int(step) if kind == "checkpoint" and step.isdecimal() else 0


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=step_of)


def find_newest(output_dir: Path) -> Path | None:
    """The newest checkpoint that verifies and can be gone on from; broken ones are set aside, in one line each.

    Raises ValueError when there are or were checkpoints and none of them can be used: what a run has cost is not begun
    anew without a word.
    """
    for folder in reversed(find_checkpoints(output_dir)):
        try:
            manifest = verify(folder)
        except ValueError as reason:
            aside = free_name(folder.with_name(BROKEN + folder.name))
            folder.rename(aside)
            print(f"{folder} is not used: {reason}. It is now {aside.name}", flush=True)
            continue
        try:
            check_resumable(manifest)
            return folder
        except ValueError as reason:
            print(f"{folder} is not used: {reason}", flush=True)
    unusable = [*find_checkpoints(output_dir), *output_dir.glob(BROKEN + "*")]
    if unusable:
        raise ValueError(f"none of its {len(unusable)} checkpoints can be used")
    return None


def set_later_aside(checkpoint: Path) -> None:
    """Rename the checkpoints beside this one that are of later steps: a run that goes on from it makes others."""
    for folder in find_checkpoints(checkpoint.parent):
        if step_of(folder) > step_of(checkpoint):
            aside = free_name(folder.with_name(f"later-{folder.name}"))
            folder.rename(aside)
            print(f"{folder} is of a later step than the one gone on from. It is now {aside.name}", flush=True)


def check_resumable(manifest: dict[str, Any]) -> None:
    """Raises ValueError for a complete checkpoint that lacks the optimizer (save_only_model)."""
    names = set(manifest["files"])
    if not {"trainer_state.json", "scheduler.pt"} <= names or not {"optimizer.pt", "latest"} & names:
        raise ValueError("it was saved without the optimizer's state (save_only_model)")


def free_name(path: Path) -> Path:
    """The path, or the first of path-2, path-3 ... that is not taken."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in range(1, 1_000_000))
    return next(name for name in names if not name.exists())


def clear_unfinished(output_dir: Path) -> None:
    """Remove what a killed run was writing or deleting."""
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Give a complete folder from UNFINISHED its name in one step; an older one of that name goes behind it."""
    older = free_name(folder.with_name(f"older-{target.name}"))
    if target.exists():
        target.rename(older)
    folder.rename(target)
    sync(target.parent)
    shutil.rmtree(older, ignore_errors=True)


def publish_files(folder: Path, target: Path) -> None:
    """Move the files of a complete folder into `target`, the manifest last: with it the folder is complete."""
    (target / MANIFEST).unlink(missing_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST):
        os.replace(file, target / file.name)
    folder.rmdir()
    sync(target)


def remove(folder: Path) -> None:
    """Delete a folder so that a kill in between leaves nothing that looks like a checkpoint."""
    unfinished = folder.parent / UNFINISHED
    unfinished.mkdir(exist_ok=True)
    doomed = free_name(unfinished / f"deleted-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what another program holds open goes at the next start


def rotate(output_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete the oldest checkpoints until `limit` are left; never the one just written, nor the `best` one."""
    checkpoints = find_checkpoints(output_dir)
    kept = {newest.name, Path(best).name if best else ""}
    surplus = len(checkpoints) - (limit or len(checkpoints))
    for folder in [folder for folder in checkpoints if folder.name not in kept][: max(surplus, 0)]:
        remove(folder)
