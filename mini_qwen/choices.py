"""Multiple choice: the option that a checkpoint finds most probable, in C-Eval, CMMLU, MMLU and files like theirs."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.exams import ChoiceTask, Question, has_empty_option, read_questions
from mini_qwen.generation import speaks_chat
from mini_qwen.metrics import standard_error
from mini_qwen.options import choose
from mini_qwen.scoring import Score
from mini_qwen.shots import ANSWER_WORDS, Prompt, fit_prompt, shots_of

if TYPE_CHECKING:
    from mini_qwen.harness import HarnessModel, Results


@dataclass
class Fitted:
    """The questions that fit into the context, each with its prompt, and what became of the others."""

    questions: list[Question] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    num_shots_equal_question: int = 0  # questions that stand among their own first shots, which skip them
    num_without_text: int = 0  # of a task that scores texts: an option has none
    too_long: list[str] = field(default_factory=list)  # places


def check_choices(tasks: dict[str, ChoiceTask]) -> None:
    """Read all files before any model is loaded, and print what is in them.

    Raises SystemExit for a file that is missing, empty, unreadable or lacks a column, a row that is no question, a
    label outside its options, and a subject with fewer shots than `num_shots`.
    """
    if tasks and find_spec("lm_eval") is None:
        raise SystemExit("'choices' is scored through lm-eval, which is not installed: pip install -e '.[harness]'")
    for name, task in tasks.items():
        if task.num_shots < 0 or (task.num_shots and not task.shots):
            raise SystemExit(
                f"The task '{name}' has num_shots {task.num_shots} and {len(task.shots)} files of shots. Name files "
                "of answered questions in 'shots', or set num_shots to 0."
            )
        questions = read_questions(task.questions)
        check_shots(name, task, questions)
        same = [question for question in questions if len(set(question.options)) < len(question.options)]
        empty = [question for question in questions if has_empty_option(question)]
        print(
            f"{name}: {len(questions):,} questions in {len({question.subject for question in questions}):,} subjects"
            + "".join(
                f", {len(found):,} with {what} (first: {found[0].place})"
                for found, what in [(same, "identical options"), (empty, "an empty option")]
                if found
            )
        )


def check_shots(name: str, task: ChoiceTask, questions: list[Question]) -> None:
    counts = Counter(shot.subject for shot in read_questions(task.shots)) if task.num_shots else Counter()
    for question in questions:
        if counts[question.subject] < task.num_shots:
            raise SystemExit(
                f"The task '{name}' wants {task.num_shots} shots, but its files {', '.join(task.shots)} have "
                f"{counts[question.subject]} of the subject '{question.subject}' ({question.place}). Add rows of this "
                "subject, or lower num_shots."
            )


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, ChoiceTask],
    max_length: int,
    batch_size: int,
) -> dict[str, Any]:
    """For each task its figures: accuracies as shares of the questions that fit into the context, and counts.

        accuracy                     the option with the highest log-probability, as lm-eval counts it
        accuracy_length_corrected    log-probability by the characters of the option (lm-eval's acc_norm)
        accuracy_without_question    by the log-probability of the option after the bare word "Answer:" alone
        accuracy_prior_corrected     less that of the option after the bare word "Answer:"; see `choose`
        chance                       mean of 1 / number of options

    All accuracies are None where no question fits.
    """
    # Not needed by who has no such task: lm-eval is an optional package, and takes a second to import.
    from mini_qwen.harness import HarnessModel, run_choices

    figures = {}
    for name, task in tasks.items():
        chat = task.chat and speaks_chat(model)
        harness = HarnessModel(model, tokenizer, chat, max_length, batch_size, name)
        fitted = fit_questions(name, task, harness)
        results = run_choices(harness, name, fitted.prompts, [question.right for question in fitted.questions])
        figures[name] = summarize(fitted, results, priors(harness, task, fitted.prompts))
    return figures


def fit_questions(name: str, task: ChoiceTask, harness: "HarnessModel") -> Fitted:
    """Give every question the shots that fit, and say how many did not."""
    fitted, shots_by_subject = Fitted(), defaultdict[str, list[Question]](list)
    for shot in read_questions(task.shots) if task.num_shots else []:
        shots_by_subject[shot.subject].append(shot)
    for question in read_questions(task.questions):
        if task.score == "text" and has_empty_option(question):
            fitted.num_without_text += 1
            continue
        shots, repeated = shots_of(task, question, shots_by_subject[question.subject])
        fitted.num_shots_equal_question += repeated
        prompt = fit_prompt(task, question, shots, harness.chat, harness.count_tokens, harness.max_length)
        if prompt is None:
            fitted.too_long.append(question.place)
        else:
            fitted.questions.append(question)
            fitted.prompts.append(prompt)
    for count, what in [
        (sum(prompt.num_dropped > 0 for prompt in fitted.prompts), "prompts lost shots from the front, to fit into"),
        (len(fitted.too_long), f"questions are left out (first: {fitted.too_long[:1]}): alone they exceed"),
    ]:
        if count:
            print(f"{name}: {count:,} {what} {harness.max_length:,} tokens")
    return fitted


def priors(harness: "HarnessModel", task: ChoiceTask, prompts: list[Prompt]) -> list[list[Score]]:
    """Scores of each prompt's options after the bare word for an answer."""
    pairs = [
        (ANSWER_WORDS[task.language], prompt.delimiter + option) for prompt in prompts for option in prompt.options
    ]
    rated = iter(harness.rate(pairs))
    return [[next(rated).score for _ in prompt.options] for prompt in prompts]


def summarize(fitted: Fitted, results: "Results", before: list[list[Score]]) -> dict[str, Any]:
    """Figures that json can hold, of the outcome for each of the fitted questions."""
    num = len(fitted.questions)
    by_subject = defaultdict[str, list[bool]](list)
    by_prior, without_question = [], []
    for question, right, scores, prior in zip(fitted.questions, results.right, results.scores, before, strict=True):
        by_subject[question.subject].append(right)
        by_prior.append(choose(scores, prior=prior) == question.right)
        without_question.append(choose(prior) == question.right)
    accuracy = results.accuracy
    return {
        "accuracy": accuracy,
        "standard_error": None if accuracy is None else standard_error(accuracy, num),
        "accuracy_length_corrected": results.accuracy_by_length,
        "accuracy_prior_corrected": fmean(by_prior) if num else None,
        "accuracy_without_question": fmean(without_question) if num else None,
        "chance": fmean(1 / len(question.options) for question in fitted.questions) if num else None,
        "macro_accuracy": fmean(fmean(flags) for flags in by_subject.values()) if num else None,
        "num_questions": num,
        "num_shots_dropped": sum(prompt.num_dropped for prompt in fitted.prompts),
        "num_prompts_shortened": sum(prompt.num_dropped > 0 for prompt in fitted.prompts),
        "num_too_long": len(fitted.too_long),
        "num_without_text": fitted.num_without_text,
        "num_shots_equal_question": fitted.num_shots_equal_question,
        "subjects": {
            subject: {"accuracy": fmean(flags), "num_questions": len(flags)} for subject, flags in by_subject.items()
        },
    }
