"""Questions with one right answer each: how many are answered in these words, and how near the others come."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.files import find_files
from mini_qwen.generation import ask
from mini_qwen.manners import manners
from mini_qwen.metrics import exact_match, standard_error
from mini_qwen.overlap import rouge_l
from mini_qwen.rows import read_rows


class Question(NamedTuple):
    text: str
    answer: str
    group: str


def read_questions(files: list[str]) -> list[Question]:
    """Rows {"question", "answer", "group"}; without a group, or with '' as in a csv, a question is in the group 'all'.

    Raises SystemExit for a question or an answer that is no text, and when there is no row.
    """
    questions = []
    for row in read_rows(find_files(files), ["question", "answer", "group"]):
        text, answer = row.text("question"), row.text("answer")
        if not text.strip():
            raise SystemExit(f"{row.place}: 'question' is {text!r}, but must be text to answer.")
        group = row.values.get("group")
        questions.append(Question(text, answer, "all" if group in (None, "") else str(group)))
    if not questions:
        raise SystemExit(f"There is no question in {', '.join(files)}.")
    return questions


def score_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, Any]:
    """Exact match in each group with its standard error, mean ROUGE-L of all answers, and how the answers behave."""
    answers = ask(model, tokenizer, [question.text for question in questions], max_new_tokens, batch_size, "questions")
    figures: dict[str, Any] = {}
    for group in sorted({question.group for question in questions}):
        chosen = [at for at, question in enumerate(questions) if question.group == group]
        accuracy = exact_match([answers[at].text for at in chosen], [questions[at].answer for at in chosen])
        figures |= {f"accuracy_{group}": accuracy, f"standard_error_{group}": standard_error(accuracy, len(chosen))}
        figures[f"num_questions_{group}"] = len(chosen)
    overlaps = [rouge_l(answer.text, right.answer) for answer, right in zip(answers, questions, strict=True)]
    return figures | {"rouge_l": fmean(overlaps), "num_questions": len(questions)} | manners(answers)
