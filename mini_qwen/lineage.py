"""The records that a run left beside its checkpoint, and those of the runs before it, with no path of the machine."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mini_qwen.checkpoint import read_manifest
from mini_qwen.comparison import read_parent
from mini_qwen.files import brief
from mini_qwen.fingerprint import hash_weights
from mini_qwen.model import check_checkpoint
from mini_qwen.recipe import SECRET

# A path that begins at a root, a home or another machine, or goes through a folder above; not one within the project,
# nor an address of the web.
NAME = r"[\w.-]{1,255}"
PART = r"[^\s'\",;:|<>()\[\]{}/\\]{1,255}[/\\]"
REMOTE = rf"(?:{NAME}@{NAME}:(?=[^\s/]|/[^/])|{NAME}:(?=/[^/]))"  # host:/folder, me@host:folder
START = rf"(?:file:/+|{REMOTE}|~|/|(?:{PART})*\.\.[/\\]|[A-Za-z]:[/\\]|\\\\)"
WHOLE_PATH = re.compile(START, re.IGNORECASE)
PATH_IN_TEXT = re.compile(rf"(?<![\w.:/~\\-]){START}[^\s'\",;|<>()\[\]{{}}]+", re.IGNORECASE)


@dataclass
class Run:
    """What is known of the run that made a checkpoint."""

    name: str
    record: dict[str, Any] = field(default_factory=dict)  # run.json
    state: dict[str, Any] = field(default_factory=dict)  # trainer_state.json
    missing: list[str] = field(default_factory=list)  # in words

    @property
    def last_loss(self) -> float | None:
        losses = [entry["loss"] for entry in self.state.get("log_history", []) if "loss" in entry]
        return losses[-1] if losses else None

    def facts(self) -> dict[str, Any]:
        """What a reader asks first, None where nothing is recorded."""
        record, ledger, metrics = self.record, self.record.get("ledger", {}), self.record.get("metrics", {})
        packages = record.get("versions", {})
        return {
            "data": self.sources(),
            "rows": ledger.get("rows_kept"),
            "tokens, learnt": ledger.get("tokens_trained"),
            "tokens, only read": ledger.get("tokens_masked"),
            "steps": self.state.get("global_step"),
            "epochs": metrics.get("epoch"),
            "mean training loss": metrics.get("train_loss"),
            "last training loss": self.last_loss,
            "held-out loss": metrics.get("eval_loss"),
            "computed in": record.get("precision"),
            "machine": record.get("device"),
            "seconds": record.get("seconds"),
            "finished": record.get("finished"),
            "commit": record.get("commit"),
            "versions": "\n".join(f"{name} {number}" for name, number in packages.items()) or None,
        }

    def sources(self) -> str | None:
        """The data, a line for each path, with its tokens where they were counted."""
        counted = self.record.get("ledger", {}).get("tokens_by_source")
        if counted:
            return "\n".join(f"{shorten(path)} ({number:,} tokens)" for path, number in counted.items())
        named = [part["train_files"] for part in self.record.get("recipe", {}).values() if "train_files" in part]
        return json.dumps(publishable(named[0]), ensure_ascii=False) if named else None


def read_record(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file. Raises SystemExit for anything else in it."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SystemExit(f"The record {file} cannot be read: {brief(error)}. Restore it, or remove it.") from None


def read_lineage(checkpoint: Path) -> list[Run]:
    """The run of the checkpoint and those before it, the first one first."""
    runs = [read_run(checkpoint)]
    folder, parent = checkpoint, read_parent(checkpoint)
    while parent is not None:
        if not is_parent(folder, parent):
            runs[0].missing.append(
                f"what was before {runs[0].name} (it began with {shorten(str(parent))}, where the weights that it "
                "began with are not to be found now)"
            )
            break
        runs.insert(0, read_run(parent))
        folder, parent = parent, read_parent(parent)
    return runs


def read_run(folder: Path) -> Run:
    run = Run(folder.resolve().name)
    run.record, run.state = (read_record(folder / name) or {} for name in ("run.json", "trainer_state.json"))
    run.missing += [f"run.json of {run.name}"] * (not run.record)
    run.missing += [f"trainer_state.json of {run.name}"] * (not run.state)
    return run


def is_parent(child: Path, folder: Path) -> bool:
    """Whether the weights in `folder` are those that the run of `child` began with, by the hash in its manifest.

    The path in a record says where they were; another run may have written there since.
    """
    try:
        began_with = read_manifest(child)["fingerprint"].get("start_weights")
        check_checkpoint(str(folder))
    except (ValueError, SystemExit):
        return False
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return began_with == hash_weights(model) or began_with == hash_weights(model.to(torch.bfloat16))  # low_memory


def shorten(text: str) -> str:
    r"""The text, of each path that leads outside the project only its last name.

    >>> shorten("/mnt/my data/pt"), shorten("mini_data/pt"), shorten("taken from /mnt/a/b.parquet, row 3")
    ('pt', 'mini_data/pt', 'taken from b.parquet, row 3')
    """
    return last_name(text) if WHOLE_PATH.match(text) else PATH_IN_TEXT.sub(lambda found: last_name(found[0]), text)


def last_name(path: str) -> str:
    path = re.sub(rf"^{REMOTE}", "", path)
    windows = "\\" in path or path[1:2] == ":"
    return (PureWindowsPath(path) if windows else PurePosixPath(path)).name.replace("~", "")


def publishable(value: Any) -> Any:
    """A record's value with its paths shortened, keys of mappings included, and without what keys call a secret."""
    if isinstance(value, dict):
        return {shorten(str(key)): publishable(part) for key, part in value.items() if not SECRET.search(str(key))}
    if isinstance(value, list):
        return [publishable(part) for part in value]
    return shorten(value) if isinstance(value, str) else value
