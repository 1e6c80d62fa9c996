"""Classification: which label a checkpoint gives a passage, by what it writes and by what it finds likely."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.generation import generate, speaks_chat
from mini_qwen.metrics import confusion_matrix, macro_f1, standard_error
from mini_qwen.options import choose, score_options
from mini_qwen.passages import ClassificationTask, Passage, deal, read_passages
from mini_qwen.question_form import QuestionForm

# Asked about for the labels' prior. Source: Zhao et al. 2021, "Calibrate Before Use", arXiv:2102.09690.
NO_CONTENT = Passage(title="", text="N/A", label="")


def score_classification(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, ClassificationTask],
    max_length: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """The figures of each task, as plain JSON.

        {"bbc": {"labels": [...], "num_rows": 100, "num_shots": 5, "num_repeats_dropped": 98, "num_texts_cut": 83,
                 "num_shots_dropped": 0, "chance": 0.2,
                 "by_text": {"accuracy", "standard_error", "macro_f1", "matrix", "no_label"},
                 "by_likelihood": {"accuracy", "standard_error", "macro_f1", "matrix",
                                   "accuracy_length_corrected", "accuracy_prior_corrected"}}}

    Matrices have a row for each true label and a column for each answer, the last for answers without a label. Shots
    are dropped from the front of a prompt that would exceed `max_length`, the sum over all prompts is counted.

    Args:
        max_length: tokens of a prompt and its answer.
        batch_size: prompts in a batch; the figures do not depend on it.
        seed: of the choice of test rows and examples.
    """
    return {name: score_task(model, tokenizer, name, tasks[name], max_length, batch_size, seed) for name in tasks}


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    task: ClassificationTask,
    max_length: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    passages = read_passages(name, task)
    shots, rows = deal(name, task, passages, seed)
    form = QuestionForm(task, passages.labels, shots, tokenizer, speaks_chat(model))
    prompts = [form.prompt(row, max_length) for row in rows]
    truth = [row.label for row in rows]
    figures: dict[str, Any] = {
        "labels": passages.labels,
        "num_rows": len(rows),
        "num_shots": task.num_shots,
        "num_repeats_dropped": passages.num_repeats,
        "num_texts_cut": sum(prompt.cut for prompt in prompts),
        "num_shots_dropped": sum(prompt.num_shots_dropped for prompt in prompts),
        "chance": 1 / len(passages.labels),
    }
    print(
        f"{name}: {len(rows):,} of {len(passages.rows):,} different texts asked about, each after {task.num_shots} "
        f"examples; {passages.num_repeats:,} repeats left out, {figures['num_texts_cut']:,} texts cut, "
        f"{figures['num_shots_dropped']:,} examples dropped for max_length {max_length}"
    )
    ids = [prompt.ids for prompt in prompts]
    if "text" in task.by:
        answers = generate(model, tokenizer, ids, form.num_answer_tokens, batch_size, f"{name}, answers")
        labels = [form.read_label(answer.text) for answer in answers]
        figures["by_text"] = judge(truth, labels, passages.labels) | {"no_label": labels.count(None)}
    if "likelihood" in task.by:
        ids = [*ids, form.prompt(NO_CONTENT, max_length).ids]
        figures["by_likelihood"] = weigh(model, ids, form, truth, batch_size, f"{name}, labels")
    return figures


def weigh(
    model: PreTrainedModel, prompts: list[list[int]], form: QuestionForm, truth: list[str], batch_size: int, desc: str
) -> dict[str, Any]:
    """The figures of the labels that are most likely after the prompts, of which the last one asks about nothing.

    By log p(label | prompt); by the same for each byte of the label; and by how much more likely the label is after
    the prompt than after the one about nothing.
    """
    *scores, prior = score_options(model, prompts, [form.label_ids] * len(prompts), desc, batch_size)
    lengths = [len(label.encode()) for label in form.labels]
    chosen = [form.labels[choose(group)] for group in scores]
    by_length = [form.labels[choose(group, lengths=lengths)] for group in scores]
    by_prior = [form.labels[choose(group, prior=prior)] for group in scores]
    return judge(truth, chosen, form.labels) | {
        "accuracy_length_corrected": share_right(truth, by_length),
        "accuracy_prior_corrected": share_right(truth, by_prior),
    }


def judge(truth: list[str], predicted: list[str | None], labels: list[str]) -> dict[str, Any]:
    accuracy = share_right(truth, predicted)
    matrix = confusion_matrix(truth, predicted, labels)
    return {
        "accuracy": accuracy,
        "standard_error": standard_error(accuracy, len(truth)),
        "macro_f1": macro_f1(matrix),
        "matrix": matrix,
    }


def share_right(truth: list[str], predicted: list[str | None]) -> float:
    return sum(right == answer for right, answer in zip(truth, predicted, strict=True)) / len(truth)
