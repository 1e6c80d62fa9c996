"""Exams: files of multiple-choice questions, read strictly, for a wrong label would only show as a low accuracy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, ConfigDict

from mini_qwen.files import brief, find_files
from mini_qwen.rows import Row, column_names, read_rows

LETTERS = "ABCDEFGHIJ"
COLUMNS = ["subject", "subject_zh", "question", *LETTERS, "answer"]
Files = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


@dataclass
class ChoiceTask:
    """Recipe value of one set of multiple-choice questions.

    Rows have the columns question, A, B and up to J, answer (a letter); subject and subject_zh where there are any.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    questions: Files
    shots: Files = field(default_factory=list)  # answered questions of the same subjects, never those that are scored
    num_shots: int = 0  # the first so many of the question's subject stand before it
    # letter: the options are listed under the question and their letters scored, as C-Eval, CMMLU and MMLU do;
    # text: they are not listed, and the text of each is scored as the answer.
    score: Literal["letter", "text"] = "letter"
    language: Literal["zh", "en"] = "zh"  # of the words around the question
    description: str | None = None  # first line of a letter prompt, {subject} in it; None: C-Eval's or MMLU's
    chat: bool = False  # the prompt as a turn of the user, for checkpoints that speak the chat template


class Question(NamedTuple):
    subject: str
    title: str  # the subject as a prompt names it
    text: str
    options: tuple[str, ...]
    right: int
    place: str


def read_questions(paths: list[str]) -> list[Question]:
    """The questions of all files.

    Raises SystemExit for a file that is missing, empty, unreadable or lacks a column, and for a row that is no
    question or has a label outside its options.
    """
    questions = []
    for file in find_files(paths):
        check_choice_columns(file)
        count = len(questions)
        questions += [read_question(row) for row in read_rows([file], COLUMNS)]
        if len(questions) == count:
            raise SystemExit(f"{file} has no rows. Name a file of questions, or take this one off the task.")
    return questions


def check_choice_columns(file: Path) -> None:
    names = column_names(file)
    missing = [name for name in ("question", "A", "B", "answer") if names is not None and name not in names]
    if missing:
        raise SystemExit(
            f"{file} lacks the column '{missing[0]}'. A question has the columns question, A, B and up to J, answer. "
            f"The file has: {brief(', '.join(names or [])) or 'none'}."
        )


def read_question(row: Row) -> Question:
    """Options are the columns from A to the first that is missing or null."""
    if row.fault:
        raise SystemExit(f"{row.place} cannot be read: {row.fault}. Correct or remove the row.")
    values = {name: as_text(value) for name, value in row.values.items()}
    options: list[str] = []
    for letter in LETTERS:
        if values.get(letter) is None:
            break
        options.append(values[letter])
    text, label = values.get("question"), values.get("answer")
    if not text or not text.strip():
        raise SystemExit(f"{row.place}: 'question' is {row.values.get('question')!r}, but must be text.")
    letters = LETTERS[: len(options)]
    if len(options) < 2:
        raise SystemExit(f"{row.place} has {len(options)} options in the columns A, B ..., but at least 2 are needed.")
    if label is None or len(label) != 1 or label not in letters:
        raise SystemExit(
            f"{row.place}: 'answer' is {row.values.get('answer')!r}, but must be the letter of one of its "
            f"{len(options)} options, {letters[0]} to {letters[-1]}. Correct or remove the row."
        )
    subject = values.get("subject") or "all"
    title = values.get("subject_zh") or subject.replace("_", " ")
    return Question(subject, title, text, tuple(options), letters.index(label), row.place)


def as_text(value: Any) -> str | None:
    """Numbers too: a file of sums has options that are numbers."""
    return str(value) if isinstance(value, str | int | float) else None


def has_empty_option(question: Question) -> bool:
    return not all(option.strip() for option in question.options)
