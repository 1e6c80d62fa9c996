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


def make_table(records: list[dict[str, Any]]) -> str:
    """The figures as a markdown table. Accuracies of question groups follow the stage's own figures."""
    columns = dict(COLUMNS)
    groups = sorted({key for record in records for key in record if key.startswith("accuracy_")})
    columns |= {key: (key.removeprefix("accuracy_").replace("_", " "), "{:.1%}") for key in groups}
    present = [key for key in columns if any(record.get(key) is not None for record in records)]
    rows = [
        ["" if record.get(key) is None else columns[key][1].format(record[key]) for key in present]
        for record in records
    ]
    return tabulate(rows, headers=[columns[key][0] for key in present], tablefmt="github", disable_numparse=True)


def make_answers(prompts: list[str], records: list[dict[str, Any]], width: int = 160) -> str:
    """For each prompt what every checkpoint answered, long answers cut."""
    lines = []
    for number, prompt in enumerate(prompts):
        lines.append(f"\n**{prompt}**\n")
        for record in records:
            text = record["answers"][number].replace("\n", " ")
            cut = text if len(text) <= width else text[:width] + " ..."
            lines.append(f"- {record['stage']}: {cut}")
    return "\n".join(lines)


def write_report(folder: Path, prompts: list[str], records: list[dict[str, Any]]) -> str:
    """Write results.json, results.md and the loss curves of all checkpoints; return the text of results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    text = make_table(records) + "\n" + make_answers(prompts, records) + "\n"
    (folder / "results.md").write_text(text, encoding="utf-8")
    (folder / "results.json").write_text(
        json.dumps({"prompts": prompts, "checkpoints": records}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    states = {record["stage"]: Path(record["checkpoint"]) / "trainer_state.json" for record in records}
    states = {stage: state for stage, state in states.items() if state.is_file()}
    if states:
        plot_curves(states, folder / "training_loss.png", panels=True)
    return text
