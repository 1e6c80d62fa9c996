"""Chapters of the report in words and tables: empty where nothing was measured."""

import json
from typing import Any

from mini_qwen.comparison import Change, Record
from mini_qwen.held_out import MASK
from mini_qwen.page import Answers, Notice, Part, Table, Text

Named = dict[str, Record]  # label of a checkpoint -> its record
Columns = dict[str, tuple[str, str]]  # key of a record -> heading and format

STAGE_COLUMNS: Columns = {
    "parameters": ("parameters", "{:,}"),
    "steps": ("steps", "{:,}"),
    "seconds": ("seconds", "{:.0f}"),
    "last_loss": ("last loss", "{:.3f}"),
    "bits_per_byte": ("bits/byte", "{:.3f}"),
    "unigram_bits_per_byte": ("unigram bits/byte", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "stop_rate": ("stops", "{:.0%}"),
    "repetition_4gram": ("4-gram repetition", "{:.1%}"),
    "preference_accuracy": ("pairs right", "{:.1%}"),
    "preference_margin": ("pair margin", "{:.1f}"),
}
DOCUMENT_COLUMNS: Columns = {
    "loss": ("loss, nats a token", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "bits_per_byte": ("bits/byte", "{:.3f}"),
    "chinese_bits_per_character": ("Chinese, bits/character", "{:.3f}"),
    "scored_tokens": ("tokens", "{:,}"),
    "scored_bytes": ("bytes", "{:,}"),
    "num_documents": ("documents", "{:,}"),
    "num_documents_cut": ("cut", "{:,}"),
    "num_rows_empty": ("rows without text", "{:,}"),
    "chinese_characters": ("Chinese characters", "{:,}"),
}
MANNERS: Columns = {
    "stop_rate": ("stops", "{:.1%}"),
    "answer_length": ("length, tokens", "{:.1f}"),
    "repetition_4gram": ("4-gram repetition", "{:.1%}"),
    "repetition_near": ("nearby repetition (WnR)", "{:.1%}"),
    "distinct_2": ("distinct-2", "{:.1%}"),
}


CORRECTIONS = (
    "Without the question: the option that is likeliest where no question stands before it; far above chance, the "
    "options alone give the answer away. Prior-corrected: less that log-probability. Length-corrected: by the length."
)


def make_table(named: dict[str, Any], columns: Columns, caption: str = "") -> list[Table]:
    """A row for each label, a column for each key that any of them has; no table where there is none."""
    present = [key for key in columns if any(record.get(key) is not None for record in named.values())]
    if not present:
        return []
    rows = [
        [label, *("" if record.get(key) is None else columns[key][1].format(record[key]) for key in present)]
        for label, record in named.items()
    ]
    return [Table(["stage", *(columns[key][0] for key in present)], rows, caption)]


def stage_table(named: Named) -> Table:
    """The figures that matter most, accuracies of the question groups last."""
    accuracies = {f"accuracy_{group}": (group.replace("_", " "), "{:.1%}") for group in question_groups(named)}
    records = {label: record.get("prompt_manners", {}) | record for label, record in named.items()}
    return make_table(records, STAGE_COLUMNS | accuracies)[0]


def question_groups(named: Named) -> list[str]:
    prefix = "accuracy_"
    return sorted({key.removeprefix(prefix) for record in named.values() for key in record if key.startswith(prefix)})


def verdict_chapter(named: Named, changes: list[Change]) -> list[Part]:
    """Whether a stage made its parent worse."""
    if not changes:
        return []
    label = {record["checkpoint"]: name for name, record in named.items()}
    worse = [change for change in changes if change.is_worse]
    said = [
        f"{label[change.checkpoint]} regressed: {change.figure} {change.before:.3f} in {label[change.parent]}, "
        f"{change.after:.3f} now (limit {change.limit:.3f})."
        for change in worse
    ]
    return [Notice("\n\n".join(said)) if said else Text("No stage made a figure of its parent worse.")]


def forgetting_chapter(named: Named, changes: list[Change]) -> list[Part]:
    """Every figure of a stage beside its parent's."""
    if not changes:
        return []
    label = {record["checkpoint"]: name for name, record in named.items()}
    rows = [
        [label[change.parent], label[change.checkpoint], change.figure, "regressed" if change.is_worse else ""]
        + [f"{value:.3f}" for value in (change.before, change.after, change.limit)]
        for change in changes
    ]
    header = ["parent", "stage", "figure", "", "before", "after", "limit"]
    caption = "What each stage did to the one it was trained from. A figure beyond its limit has regressed."
    return [Table(header, rows, caption)]


def documents_chapter(named: Named) -> list[Part]:
    return list(make_table(named, DOCUMENT_COLUMNS, f"Mask: {MASK}."))


def questions_chapter(named: Named) -> list[Part]:
    columns: Columns = {}
    for group in question_groups(named):
        name = group.replace("_", " ")
        columns |= {f"accuracy_{group}": (name, "{:.1%}"), f"standard_error_{group}": ("±", "{:.1%}")}
    columns |= {"rouge_l": ("ROUGE-L", "{:.3f}"), "num_questions": ("questions", "{:,}")}
    exact = make_table(
        named,
        columns,
        "Exact match with its standard error. ROUGE-L: F1, a Chinese character or a lower-case word as one token.",
    )
    pairs = make_table(
        named,
        {
            "preference_accuracy": ("pairs right", "{:.1%}"),
            "preference_standard_error": ("±", "{:.1%}"),
            "preference_margin": ("margin, nats", "{:.1f}"),
            "reward_accuracy": ("margin above the parent's", "{:.1%}"),
            "num_pairs": ("pairs", "{:,}"),
            "num_pairs_dropped": ("dropped", "{:,}"),
        },
        "Pairs right: the chosen answer is the likelier one. Against the parent, the reference of DPO: share of pairs "
        "whose margin became larger.",
    )
    return [*exact, *pairs]


def choices_chapter(named: Named) -> list[Part]:
    columns: Columns = {
        "accuracy": ("accuracy", "{:.1%}"),
        "standard_error": ("±", "{:.1%}"),
        "chance": ("chance", "{:.1%}"),
        "accuracy_without_question": ("without the question", "{:.1%}"),
        "accuracy_length_corrected": ("length-corrected", "{:.1%}"),
        "accuracy_prior_corrected": ("prior-corrected", "{:.1%}"),
        "macro_accuracy": ("mean of subjects", "{:.1%}"),
        "num_questions": ("questions", "{:,}"),
        "num_shots_dropped": ("shots dropped", "{:,}"),
        "num_too_long": ("too long", "{:,}"),
        "num_without_text": ("option empty", "{:,}"),
    }
    parts: list[Part] = []
    for name in tasks(named, "choices"):
        results = {label: record["choices"][name] for label, record in named.items()}
        parts += make_table(results, columns, f"{name}: the option with the highest log-probability, by lm-eval.")
        subjects = list(dict.fromkeys(subject for result in results.values() for subject in result["subjects"]))
        if len(subjects) > 1:
            shares = [[result["subjects"].get(subject) for result in results.values()] for subject in subjects]
            rows = [
                [subject, *("" if share is None else f"{share['accuracy']:.1%}" for share in row)]
                for subject, row in zip(subjects, shares, strict=True)
            ]
            parts.append(Table(["subject", *results], rows, f"{name}, by subject."))
    if parts:
        parts.append(Text(CORRECTIONS))
    return parts


def manners_chapter(named: Named) -> list[Part]:
    caption = "The most likely tokens, in answer to {}. Lengths and n-grams are of the checkpoint's own tokens."
    columns = MANNERS | {"num_beyond_context": ("beyond the context", "{:,}")}
    asked = make_table(named, columns, caption.format("the questions"))
    prompted = {label: record.get("prompt_manners", {}) for label, record in named.items()}
    return [*asked, *make_table(prompted, columns, caption.format("the prompts below"))]


def answers_chapter(named: Named, prompts: list[str]) -> list[Part]:
    return [
        Answers(prompt, {label: record["answers"][number] for label, record in named.items()})
        for number, prompt in enumerate(prompts)
    ]


def measurement_chapter(recipe: dict[str, Any], circumstances: dict[str, Any]) -> list[Part]:
    """Command, versions, machine and recipe, so that the figures can be had again."""
    return [Table(["", "value"], plain_rows(circumstances)), Table(["recipe key", "value"], plain_rows(recipe))]


def plain_rows(values: dict[str, Any]) -> list[list[str]]:
    """A row for each key; a value of several parts as JSON."""
    return [
        [key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        for key, value in values.items()
    ]


def tasks(named: Named, kind: str) -> list[str]:
    return list(next(iter(named.values())).get(kind, {}))
