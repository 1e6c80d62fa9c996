"""Where and with what a run takes place: versions, commit, command, machine. Part of every record."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "deepspeed", "tokenizers")


def describe_device(args: TrainingArguments) -> str:
    return f"{args.world_size} x {device_name()}"


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run does; those that are not installed are left out."""
    return {"python": platform.python_version()} | versions_of(PACKAGES)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit() -> str:
    """The commit of the source, with `+changes` when files differ from it; 'unknown' outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "--no-optional-locks", "-C", str(root)]  # a run must not stand in the way of the user's own git
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes.strip() else "")


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
