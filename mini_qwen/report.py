"""The result table: one row for each checkpoint, and the answers to the same prompts side by side."""

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mini_qwen.curves import plot_curves

COLUMNS = {
    "stage": ("stage", "{}"),
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


def training_facts(checkpoint: Path) -> dict[str, Any]:
    """Steps, trained tokens, seconds and last loss, from the records beside the checkpoint where there are any."""
    facts: dict[str, Any] = {}
    if (checkpoint / "trainer_state.json").is_file():
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        facts |= {"steps": state["global_step"], "last_loss": losses[-1] if losses else None}
    if (checkpoint / "run.json").is_file():
        facts["seconds"] = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))["seconds"]
    return facts


def make_table(records: list[dict[str, Any]]) -> str:
    """The figures as a markdown table. Accuracies of question groups follow the stage's own figures."""
    columns = dict(COLUMNS)
    groups = sorted({key for record in records for key in record if key.startswith("accuracy_")})
    columns |= {key: (key.removeprefix("accuracy_").replace("_", " "), "{:.1%}") for key in groups}
    present = [key for key in columns if any(record.get(key) is not None for record in records)]
    records = [record | {"stage": name} for name, record in zip(labels(records), records, strict=True)]
    rows = [
        ["" if record.get(key) is None else columns[key][1].format(record[key]) for key in present]
        for record in records
    ]
    return tabulate(rows, headers=[columns[key][0] for key in present], tablefmt="github", disable_numparse=True)


def labels(records: list[dict[str, Any]]) -> list[str]:
    """The stage of each checkpoint; its folder too where a stage occurs twice."""
    stages = [record["stage"] for record in records]
    return [
        stage if stages.count(stage) == 1 else f"{stage} {record['checkpoint']}"
        for stage, record in zip(stages, records, strict=True)
    ]


def make_answers(prompts: list[str], records: list[dict[str, Any]], width: int = 160) -> str:
    """For each prompt what every checkpoint answered, long answers cut."""
    lines = []
    for number, prompt in enumerate(prompts):
        lines.append(f"\n**{prompt}**\n")
        for label, record in zip(labels(records), records, strict=True):
            text = record["answers"][number].replace("\n", " ")
            cut = text if len(text) <= width else text[:width] + " ..."
            lines.append(f"- {label}: {cut}")
    return "\n".join(lines)


def write_report(
    folder: Path, prompts: list[str], records: list[dict[str, Any]], circumstances: dict[str, Any]
) -> str:
    """Write results.json, results.md and the loss curves of all checkpoints; return the text of results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    text = make_table(records) + "\n" + make_answers(prompts, records) + "\n"
    (folder / "results.md").write_text(text, encoding="utf-8")
    (folder / "results.json").write_text(
        json.dumps(circumstances | {"prompts": prompts, "checkpoints": records}, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    folders = [Path(record["checkpoint"]) for record in records]
    states = {label: folder / "trainer_state.json" for label, folder in zip(labels(records), folders, strict=True)}
    states = {stage: state for stage, state in states.items() if state.is_file()}
    if states:
        plot_curves(states, folder / "training_loss.png", panels=True)
    return text
