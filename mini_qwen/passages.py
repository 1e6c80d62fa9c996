"""Passages: texts with one label each, read from files without repeats, and dealt out as examples and test rows."""

from collections import defaultdict
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, zip_longest
from typing import ClassVar, Literal, NamedTuple

from pydantic import ConfigDict

from mini_qwen.files import find_files
from mini_qwen.rows import Row, check_columns, read_rows


@dataclass
class ClassificationTask:
    """Recipe value of one task: `classification: {bbc: {files: [bbc_news.parquet], num_shots: 5}}`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    files: list[str]
    text: str = "text"  # the column of the passages
    title: str | None = None  # the column of their titles, if they have any
    label: str = "category"
    labels: list[str] | None = None  # None: those in the files, sorted
    num_shots: int = 0  # examples with their labels before the question, taken from the same files
    num_rows: int | None = None  # asked about, of each label as many as of the others; None: all but the examples
    max_text_tokens: int = 256  # of a passage, its title included; the end of a longer one is cut off
    # The first words of a question. Source: the seed study of MiniMind2.
    instruction: str = (
        "Classify the passage you will read. You MUST choose exactly one of the following categories:\n{labels}."
    )
    by: list[Literal["text", "likelihood"]] = field(default_factory=lambda: ["text", "likelihood"])


class Passage(NamedTuple):
    title: str  # or nothing
    text: str  # without the title, where it began with it
    label: str


class Passages(NamedTuple):
    rows: list[Passage]
    labels: list[str]
    num_repeats: int  # rows left out because an earlier one has the same text, white space aside


def read_passages(name: str, task: ClassificationTask) -> Passages:
    """All different passages of a task.

    Raises SystemExit, naming file, row and value, for a row that cannot be read, a text or a label that is none, one
    that is not among `labels`, and a text that has two labels.
    """
    columns = [task.text, task.label, *([task.title] if task.title else [])]
    files = find_files(task.files)
    check_columns(files, [columns])
    seen: dict[str, tuple[Passage, str]] = {}
    num_read = 0
    for row in read_rows(files, columns):
        num_read += 1
        passage = read_passage(task, row)
        earlier, place = seen.setdefault(" ".join(row.values[task.text].split()), (passage, row.place))
        if earlier.label != passage.label:
            raise SystemExit(
                f"{row.place}: the text {passage.text[:40]!r} has the {task.label} {passage.label!r}, but {place} has "
                f"the same text with {earlier.label!r}. Correct one of them, or remove it."
            )
    if not num_read:
        raise SystemExit(f"Task '{name}' has no rows: {', '.join(task.files)} is empty. Name files with passages.")
    rows = [passage for passage, _ in seen.values()]
    labels = task.labels or sorted({passage.label for passage in rows})
    if len({label.casefold() for label in labels}) < max(2, len(labels)):
        raise SystemExit(
            f"Task '{name}' has the labels {labels}, but needs two or more, of which no two are the same. See its "
            f"column '{task.label}', or the 'labels' of the recipe."
        )
    return Passages(rows, labels, num_read - len(rows))


def read_passage(task: ClassificationTask, row: Row) -> Passage:
    if row.fault:
        raise SystemExit(f"{row.place} cannot be read: it is {row.fault}. Correct it, or remove it.")
    for column in (task.text, task.label):
        value = row.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise SystemExit(f"{row.place}: '{column}' is {value!r}, but must be text. Correct it, or remove the row.")
    title = row.values.get(task.title) or ""
    if not isinstance(title, str):
        raise SystemExit(f"{row.place}: '{task.title}' is {title!r}, but must be text or nothing.")
    text, label = row.values[task.text].strip(), row.values[task.label].strip()
    if task.labels is not None and label not in task.labels:
        raise SystemExit(
            f"{row.place}: '{task.label}' is {label!r}, but the labels are {', '.join(task.labels)}. Correct the row, "
            "or add it to the 'labels' of the recipe."
        )
    # The files of BBC news open with their title; the question need not say it twice.
    return Passage(title.strip(), text.removeprefix(title.strip()).strip() or text, label)


def deal(name: str, task: ClassificationTask, passages: Passages, seed: int) -> tuple[list[Passage], list[Passage]]:
    """The examples and the test rows, both one label after the other; no passage is both.

    A function of the seed and of the passages, not of their order. Each label's passages are shuffled; test rows are
    taken from the front and examples from the back, so that as a rule the same rows are asked about with any number
    of examples:

        labels a, b; num_shots 3, num_rows 3
            a: a1 a2 a3 a4 a5      examples a5 b4 a4
            b: b1 b2 b3 b4         test rows a1 b1 a2

    Raises SystemExit when a label has too few passages for its examples and a test row.
    """
    by_label: dict[str, list[Passage]] = defaultdict(list)
    for passage in sorted(passages.rows, key=lambda passage: blake2b(f"{seed} {passage}".encode()).digest()):
        by_label[passage.label].append(passage)
    num_shots = [len(range(at, task.num_shots, len(passages.labels))) for at in range(len(passages.labels))]
    for label, num in zip(passages.labels, num_shots, strict=True):
        if len(by_label[label]) <= num:
            raise SystemExit(
                f"Task '{name}' has {len(by_label[label])} different texts with the label '{label}' in "
                f"{', '.join(task.files)}, but needs {num} as examples and at least one to ask about. Lower num_shots "
                f"({task.num_shots}), add rows, or take the label out of 'labels'."
            )
    groups = [by_label[label] for label in passages.labels]
    cuts = [len(group) - num for group, num in zip(groups, num_shots, strict=True)]
    shots = take_turns([group[cut:][::-1] for group, cut in zip(groups, cuts, strict=True)])
    rows = take_turns([group[:cut] for group, cut in zip(groups, cuts, strict=True)])
    return shots, rows[: task.num_rows]


def take_turns(groups: list[list[Passage]]) -> list[Passage]:
    return [passage for passage in chain.from_iterable(zip_longest(*groups)) if passage is not None]


def check_classification(tasks: dict[str, ClassificationTask]) -> None:
    """Raises SystemExit for tasks that cannot be asked, before any model is loaded."""
    for name, task in tasks.items():
        lowest = {"num_shots": 0, "num_rows": 1, "max_text_tokens": 1}
        for key, least in lowest.items():
            value = getattr(task, key)
            if value is not None and value < least:
                raise SystemExit(f"Task '{name}' has {key} {value}, but it must be {least} or more.")
        if not task.by:
            raise SystemExit(f"Task '{name}' is judged by nothing: set by to [text], [likelihood], or both.")
        deal(name, task, read_passages(name, task), seed=0)
