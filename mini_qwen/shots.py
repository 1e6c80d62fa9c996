"""Shots: the prompt of a multiple-choice question, with as many answered questions before it as fit."""

from collections.abc import Callable
from typing import NamedTuple

from mini_qwen.exams import LETTERS, ChoiceTask, Question

DELIMITER = "\n\n"  # between the description, the shots and the question
ANSWER_WORDS = {"zh": "答案：", "en": "Answer:"}
# As in the tasks ceval-valid_* and mmlu_* of lm-eval 0.4, so that accuracies can be compared.
DESCRIPTIONS = {
    "zh": "以下是中国关于{subject}的单项选择题，请选出其中的正确答案。",
    "en": "The following are multiple choice questions (with answers) about {subject}.",
}


class Prompt(NamedTuple):
    """What is scored: p(delimiter + option | text) of each option."""

    text: str
    delimiter: str
    options: tuple[str, ...]
    num_dropped: int  # shots that did not fit


def scored_options(task: ChoiceTask, question: Question) -> tuple[str, ...]:
    return tuple(LETTERS[: len(question.options)]) if task.score == "letter" else question.options


def delimiter(task: ChoiceTask, chat: bool) -> str:
    """Between the prompt and an option: lm-eval's blank, but none before a Chinese text or a turn of the assistant."""
    return "" if chat or (task.score == "text" and task.language == "zh") else " "


def ask(task: ChoiceTask, question: Question) -> str:
    """The question as the model sees it, up to its answer.

    letter    2+2=?\\nA. 3\\nB. 4\\nAnswer:
    text      2+2=?\\nAnswer:             for chat: 2+2=?
    """
    lines = [question.text.strip()]
    if task.score == "letter":
        lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False)]
    if task.score == "letter" or not task.chat:
        lines.append(ANSWER_WORDS[task.language])
    return "\n".join(lines)


def answered(task: ChoiceTask, question: Question) -> str:
    """A shot. What parts its answer from it is what parts them in the question that is scored, or a new line."""
    asked = ask(task, question)
    gap = "\n" if task.score == "text" and task.chat else delimiter(task, chat=False)
    return asked + gap + scored_options(task, question)[question.right]


def make_prompt(task: ChoiceTask, question: Question, shots: list[Question], chat: bool) -> Prompt:
    """The prompt with these shots. A prompt of texts has no description, for it would speak of options to choose."""
    described = (task.description or DESCRIPTIONS[task.language]).replace("{subject}", question.title)
    opening = [described] if task.score == "letter" else []
    parts = [*opening, *(answered(task, shot) for shot in shots), ask(task, question)]
    return Prompt(DELIMITER.join(parts), delimiter(task, chat), scored_options(task, question), 0)


def shots_of(task: ChoiceTask, question: Question, subject_shots: list[Question]) -> tuple[list[Question], bool]:
    """The shots of a question, and whether one of the first was left out for being the question itself."""
    others = [shot for shot in subject_shots if not is_same(shot, question)]
    return others[: task.num_shots], any(is_same(shot, question) for shot in subject_shots[: task.num_shots])


def is_same(first: Question, second: Question) -> bool:
    """Whether words and options are the same, white space aside; "which of these is right?" has many options."""
    one, other = ([" ".join(text.split()) for text in (each.text, *each.options)] for each in (first, second))
    return one == other


def fit_prompt(
    task: ChoiceTask,
    question: Question,
    shots: list[Question],
    chat: bool,
    count_tokens: Callable[[str, str], int],
    max_length: int,
) -> Prompt | None:
    """The prompt with the last shots with which it and its longest option have `max_length` tokens at most.

    None where it has more with no shot at all. `count_tokens(prompt, option)` says how many both have together.
    """
    for num_dropped in range(len(shots) + 1):
        prompt = make_prompt(task, question, shots[num_dropped:], chat)
        if max(count_tokens(prompt.text, prompt.delimiter + option) for option in prompt.options) <= max_length:
            return prompt._replace(num_dropped=num_dropped)
    return None
