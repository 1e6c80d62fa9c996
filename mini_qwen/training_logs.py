"""The history of a run: as its trainer_state.json recorded it, or as a console log shows it among progress bars."""

import ast
import json
import re
from bisect import bisect_left
from pathlib import Path
from typing import Any

STATE = "trainer_state.json"
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # tqdm moves the cursor between the bars of training and evaluation
# The Trainer's bar has no description, unlike those of data preparation: `  4%|▍         | 20/462 [02:22<50:25`.
BAR = re.compile(r"^[ \t]*\d+%\|[^|\r\n]*\| *(?P<step>\d+)/(?P<total>\d+) \[", re.MULTILINE)
ENTRY = re.compile(r"\{'[^{}\n]*\}?")
# What tells the Trainer's figures from other dicts in a log, such as DeepSpeed's settings.
FIGURES = re.compile(r"'(epoch|loss|eval_loss|train_loss|train_runtime)': ")


def read_history(path: Path) -> list[dict[str, Any]]:
    """What a run logged, oldest first, as in the log_history of its trainer_state.json.

    Every entry has a 'step'. Training entries have 'loss', evaluations 'eval_loss', the summary at the end neither.

    Args:
        path: a run's folder, its trainer_state.json, or the console output of transformers' Trainer.

    Raises:
        SystemExit: there is no such file, or it is something else, or its steps cannot be known.
    """
    if path.is_dir():
        path = find_state(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SystemExit(
            f"'{path}' cannot be read: {error.strerror}. Name a run's folder, its {STATE}, or the log of its console."
        ) from None
    return read_state(path, text) if path.suffix == ".json" else read_log(path, text)


def find_state(folder: Path) -> Path:
    """A run's trainer_state.json; for a run that has not finished the error names that of its newest checkpoint."""
    if (folder / STATE).is_file():
        return folder / STATE
    checkpoints = [path.parent for path in folder.glob(f"checkpoint-*/{STATE}")]
    newest = max(checkpoints, key=lambda path: (len(path.name), path.name), default=None)
    cure = f"Its newest checkpoint has one: name '{newest}'." if newest else "Name the folder that a stage wrote."
    raise SystemExit(f"'{folder}' has no {STATE}. {cure}")


def read_state(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        state = json.loads(text)
    except json.JSONDecodeError as error:
        raise SystemExit(
            f"{path}:{error.lineno}: not JSON ({error.msg}), so the file was cut off or damaged. "
            "An earlier checkpoint of the run has a whole one."
        ) from None
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise SystemExit(f"'{path}' has no list 'log_history'. Name a {STATE}, as the Trainer writes it.")
    for number, entry in enumerate(history):
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise SystemExit(
                f"{path}: entry {number} of 'log_history' is {str(entry)[:80]!r}, but must have a whole number as "
                "'step'. The file was changed by hand or damaged; an earlier checkpoint of the run has a whole one."
            )
    return history


def read_log(path: Path, text: str) -> list[dict[str, Any]]:
    """Entries of a console log, with the steps of the progress bars. Unreadable ones are counted and left out."""
    text = ESCAPES.sub("", text).replace("\r", "\n")
    found = [match for match in ENTRY.finditer(text) if is_figures(match, len(text.rstrip()))]
    parsed = [parse_entry(match[0]) for match in found]
    damaged = [match[0] for match, entry in zip(found, parsed, strict=True) if entry is None]
    if damaged:
        print(
            f"{path}: {len(damaged)} of {len(found)} entries cannot be read and are left out, "
            f"the first is {damaged[0][:60]!r}"
        )
    entries = [entry for entry in parsed if entry is not None]
    if not entries:
        raise SystemExit(
            f"'{path}' shows no training: there is nothing like {{'loss': 2.5, 'epoch': 0.1}} in it. Name a run's "
            f"folder, its {STATE}, or what the Trainer printed."
        )
    bars = list(BAR.finditer(text))
    borders = [bisect_left(bars, match.start(), key=re.Match.start) for match in found] + [len(bars)]
    total = None
    for number, (match, entry) in enumerate(zip(found, parsed, strict=True)):
        if entry is None:
            continue
        # tqdm draws the bar again behind what it lets through, and only that one is sure to be up to date.
        following = bars[borders[number] : borders[number + 1]]
        if not following and number + 1 == len(found):  # cut off right behind the entry
            following = [bar for bar in reversed(bars) if total in (None, bar["total"])]
        # At a training entry no other bar is open; at an evaluation that of its batches is.
        if following and ("loss" in entry or total is None):
            total = following[0]["total"]
        step = next((bar["step"] for bar in following if bar["total"] == total), None)
        if step is None:
            raise SystemExit(
                f"{path}: no progress bar follows {match[0][:60]!r}, so its step cannot be known: the log was written "
                f"without progress bars, or in blocks (python without -u). Name the run's {STATE} instead."
            )
        entry["step"] = int(step)
    return entries


def is_figures(match: re.Match[str], end: int) -> bool:
    """Whether it is an entry of the Trainer, or what a cut left of one at the end of the log."""
    cut_off = match.end() >= end and not match[0].endswith("}")
    return cut_off or FIGURES.search(match[0]) is not None


def parse_entry(text: str) -> dict[str, Any] | None:
    """One printed dict, None if it is damaged. transformers 5 prints its numbers in quotes.

    >>> parse_entry("{'loss': nan, 'learning_rate': '1e-05', 'epoch': 0.1}")
    {'loss': nan, 'learning_rate': 1e-05, 'epoch': 0.1}
    """
    text = re.sub(r"np\.\w+\(([^()]*)\)", r"\1", text)
    text = re.sub(r": (-?(?:nan|inf))(?=[,}])", r": '\1'", text)
    try:
        entry = ast.literal_eval(text)
        return {str(key): float(value) if isinstance(value, str) else value for key, value in entry.items()}
    except (ValueError, SyntaxError, AttributeError):
        return None
