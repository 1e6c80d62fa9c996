"""What a stage did to the stage before it: figures of parent and child, and which of them became worse."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import ConfigDict

from mini_qwen.files import brief
from mini_qwen.metrics import standard_error
from mini_qwen.pairs import reward_accuracy

STAGES = ("pt", "sft", "dpo")
Record = dict[str, Any]  # of one checkpoint, as mini_qwen.evaluation makes it


@dataclass
class Limits:
    """Recipe value of `limits`: how much worse than its parent a checkpoint may be before it counts as regressed."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    bits: float = 0.05  # rise of the bits per byte, as a share of the parent's
    repetition: float = 0.05  # rise of a share
    accuracy: float = 0.02  # fall of a share; like the repetition no less than two standard errors of the difference


class Change(NamedTuple):
    """One figure of a checkpoint beside its parent's."""

    checkpoint: str
    parent: str
    figure: str
    before: float
    after: float
    limit: float  # the value beyond which it is worse
    is_worse: bool


class Figure(NamedTuple):
    name: str
    value: float
    kind: str  # the limit that applies
    standard_error: float = 0.0


def find_parents(records: list[Record]) -> dict[str, str]:
    """The checkpoint that each was trained from, where that is among those evaluated.

    run.json beside a checkpoint says it; one that names a folder that is not evaluated has no parent here. Where
    nothing is said, the nearest checkpoint before it in the list that is of an earlier stage.
    """
    places = {Path(record["checkpoint"]).resolve(): record["checkpoint"] for record in records}
    parents = {}
    for number, record in enumerate(records):
        named = read_parent(Path(record["checkpoint"]))
        if named is not None:
            if named.resolve() in places:
                parents[record["checkpoint"]] = places[named.resolve()]
            continue
        earlier = [other for other in records[:number] if is_earlier(other["stage"], record["stage"])]
        if earlier:
            parents[record["checkpoint"]] = earlier[-1]["checkpoint"]
    return parents


def read_parent(checkpoint: Path) -> Path | None:
    """The recipe's `checkpoint` in the run's record, where it stands under the class that the key belongs to."""
    recipe = read_run(checkpoint).get("recipe")
    parts = [part for part in recipe.values() if isinstance(part, dict)] if isinstance(recipe, dict) else []
    named = [part["checkpoint"] for part in parts if isinstance(part.get("checkpoint"), str)]
    return Path(named[0]) if named else None


def read_run(checkpoint: Path) -> Record:
    """run.json beside a checkpoint; empty where there is none, or something else by this name.

    Raises SystemExit for one that is damaged.
    """
    file = checkpoint / "run.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise SystemExit(f"{file} is damaged: {brief(error)}. Restore it, or remove it.") from None
    return record if isinstance(record, dict) else {}


def is_earlier(first: str, second: str) -> bool:
    return first in STAGES and second in STAGES and STAGES.index(first) < STAGES.index(second)


def add_reward_accuracy(records: list[Record], parents: dict[str, str]) -> None:
    """`reward_accuracy` of each checkpoint against its parent, where both scored the same number of pairs."""
    by_checkpoint = {record["checkpoint"]: record for record in records}
    for checkpoint, parent in parents.items():
        policy = by_checkpoint[checkpoint].get("pair_log_probs")
        reference = by_checkpoint[parent].get("pair_log_probs")
        if policy and reference and len(policy) == len(reference):
            by_checkpoint[checkpoint]["reward_accuracy"] = reward_accuracy(policy, reference)


def compared_figures(record: Record) -> list[Figure]:
    """Those figures of a checkpoint that a later stage may have made worse."""
    figures = []
    if "bits_per_byte" in record:
        figures.append(Figure("bits per byte of held-out documents", record["bits_per_byte"], "bits"))
    manners = record if "repetition_4gram" in record else record.get("prompt_manners", {})
    if manners:
        if manners["num_answers"] > 1:  # how much answers differ cannot be told from one
            error = manners["repetition_standard_error"]
            figures.append(Figure("4-gram repetition of answers", manners["repetition_4gram"], "repetition", error))
        figures.append(share("answers that stop", manners["stop_rate"], manners["num_answers"]))
    for key in sorted(key for key in record if key.startswith("accuracy_")):
        group = key.removeprefix("accuracy_")
        figures.append(share(f"exact match, {group}", record[key], record[f"num_questions_{group}"]))
    if "preference_accuracy" in record:
        figures.append(share("pairs right", record["preference_accuracy"], record["num_pairs"]))
    for name, task in record.get("choices", {}).items():
        if task["accuracy"] is not None:
            figures.append(share(f"{name}, multiple choice", task["accuracy"], task["num_questions"]))
    for name, task in record.get("classification", {}).items():
        for way in ("by_likelihood", "by_text"):
            if way in task:
                shown = f"{name}, classified {way.replace('_', ' ')}"
                figures.append(share(shown, task[way]["accuracy"], task["num_rows"]))
    return figures


def share(name: str, value: float, num: int) -> Figure:
    """An accuracy with the standard error of two answers more of each kind, on the scale of those that there are.

    Of 3 right answers of 3 the plain error is 0, as if all ever would be right, and none of 3 would be a verdict. Here
    it is that of 5 of 7, times 7/3: 0.40. Of hundreds it is as good as the plain one.

    Source: Agresti and Coull 1998, "Approximate is Better than 'Exact' for Interval Estimation of Binomial
    Proportions".
    """
    more = num + 4
    return Figure(name, value, "accuracy", standard_error((value * num + 2) / more, more) * more / num)


def compare(records: list[Record], parents: dict[str, str], limits: Limits) -> list[Change]:
    """Every figure that a checkpoint shares with its parent.

    An accuracy of 0.90 with a standard error of 0.03 after one of 0.95 with 0.02: two standard errors of the
    difference are 2 * sqrt(0.03^2 + 0.02^2) = 0.072, more than 0.02, so the limit is 0.95 - 0.072: nothing is worse.
    The errors add up as of independent samples. The questions are the same, so this errs on the side of no verdict.
    """
    by_checkpoint = {record["checkpoint"]: record for record in records}
    changes = []
    for checkpoint, parent in parents.items():
        before = {figure.name: figure for figure in compared_figures(by_checkpoint[parent])}
        for after in compared_figures(by_checkpoint[checkpoint]):
            if after.name in before:
                changes.append(judge(checkpoint, parent, before[after.name], after, limits))
    return changes


def judge(checkpoint: str, parent: str, before: Figure, after: Figure, limits: Limits) -> Change:
    noise = 2 * math.hypot(before.standard_error, after.standard_error)
    if after.kind == "accuracy":
        limit = max(0.0, before.value - max(limits.accuracy, noise))
        return Change(checkpoint, parent, after.name, before.value, after.value, limit, after.value < limit)
    rise = max(limits.repetition, noise) if after.kind == "repetition" else limits.bits * before.value
    limit = before.value + rise
    is_worse = after.value > limit or math.isnan(after.value)  # as of a checkpoint whose weights are no numbers
    return Change(checkpoint, parent, after.name, before.value, after.value, limit, is_worse)
