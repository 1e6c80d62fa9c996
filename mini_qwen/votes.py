"""Votes of the arena: one JSON line each, never lost or mixed, and the preference pairs that they are.

    {"time": "2026-01-31T08:05:00+00:00", "prompt": "Where does Anna live?", "system": "", "settings": {...},
     "blind": true, "verdict": "better", "winner": "results/dpo", "answers": [
       {"model": "results/dpo", "text": "Anna lives in Prague.", "finish": "stop", "raw": false, "error": null},
       {"model": "results/sft", "text": "In Prague", "finish": "length", "raw": false, "error": null}]}

`verdict` is better (than all others, and `winner` is a model), tie or all_bad. The answers stand as they stood on the
page. `finish` is stop, length or cancelled; `raw` is true for a continuation of raw text.
"""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from mini_qwen.integrity import sync

VERDICTS = ("better", "tie", "all_bad")


@dataclass
class Answer:
    model: str
    text: str
    finish: str | None
    raw: bool = False
    error: str | None = None


@dataclass
class Vote:
    time: str
    prompt: str
    system: str
    settings: dict[str, Any]
    blind: bool
    verdict: str
    winner: str | None
    answers: list[Answer]

    def __post_init__(self) -> None:
        names = [answer.model for answer in self.answers if answer.error is None]
        right = self.winner in names if self.verdict == "better" else self.winner is None
        if self.verdict not in VERDICTS or not right:
            raise ValueError(f"verdict {self.verdict!r} with winner {self.winner!r}")


def append_vote(file: Path, vote: Vote) -> None:
    """Add a line and have it on the disk. Several processes and threads may do so at once.

    A line is there as a whole or not at all; after a crash in the middle of one, the next begins on a line of its own.
    Raises OSError where the disk takes no more.
    """
    line = (json.dumps(asdict(vote), ensure_ascii=False) + "\n").encode()
    # Unbuffered: a buffer would write the rest of a line that failed once more, when it is closed.
    with FileLock(f"{file}.lock"), file.open("a+b", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            line = line if stream.read(1) == b"\n" else b"\n" + line
        try:
            while line:
                line = line[stream.write(line) :]
            os.fsync(stream.fileno())
        except OSError:
            os.ftruncate(stream.fileno(), size)
            raise
        if size == 0:
            sync(file.parent)


def check_votes(file: Path) -> None:
    """Raises SystemExit where no vote could be written, before anybody votes."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"), file.open("ab"):
            pass
    except OSError as error:
        raise SystemExit(f"No votes can be written to '{file}': {error.strerror}. Choose another --votes.") from None


def read_votes(file: Path) -> tuple[list[Vote], int]:
    """The votes of a file, and how many of its lines are none: cut off by a crash, or changed by hand."""
    votes, num_broken = [], 0
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            fields["answers"] = [Answer(**answer) for answer in fields["answers"]]
            votes.append(Vote(**fields))
        except (ValueError, TypeError, KeyError, RecursionError):
            num_broken += 1
    return votes, num_broken


def preference_pairs(votes: list[Vote]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of DPO data, the winner of a vote against each of the others, and what gave none, by reason.

    A chosen answer must have ended by itself: training adds its `<|im_end|>`, which would teach to break off.
    """
    pairs: list[dict[str, Any]] = []
    without: Counter[str] = Counter()
    for vote in votes:
        if vote.verdict != "better":
            without[vote.verdict.replace("_", " ")] += 1
            continue
        chosen = next(answer for answer in vote.answers if answer.model == vote.winner)
        for rejected in vote.answers:
            if rejected is chosen:
                continue
            reason = why_no_pair(chosen, rejected)
            if reason:
                without[reason] += 1
                continue
            row: dict[str, Any] = {"prompt": vote.prompt}
            row |= {"system": vote.system} if vote.system.strip() else {}
            for side, answer in (("chosen", chosen), ("rejected", rejected)):
                row[side] = [{"role": "assistant", "content": answer.text}]
            pairs.append(row)
    return pairs, without


def why_no_pair(chosen: Answer, rejected: Answer) -> str | None:
    """Why two answers are no pair to train on, or None."""
    if rejected.error is not None:
        return "the other model failed"
    if chosen.raw or rejected.raw:
        return "a continuation of raw text"
    if not chosen.text.strip() or not rejected.text.strip():
        return "an empty answer"
    if chosen.finish != "stop":
        return "the chosen answer was cut off"
    return "the same answer twice" if chosen.text == rejected.text else None
