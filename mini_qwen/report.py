"""The report of an evaluation: one markdown file, one page, one file of figures, and the pictures they show."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mini_qwen.chapters import (
    answers_chapter,
    choices_chapter,
    documents_chapter,
    forgetting_chapter,
    manners_chapter,
    measurement_chapter,
    questions_chapter,
    stage_table,
    verdict_chapter,
)
from mini_qwen.comparison import Record, add_reward_accuracy, compare, find_parents, read_run
from mini_qwen.curves import read_losses
from mini_qwen.evaluation import EvalData
from mini_qwen.illustrations import classification_chapter, decoding_chapter, training_chapter
from mini_qwen.page import Section, render_markdown, render_page
from mini_qwen.prompts import read_prompts
from mini_qwen.training_logs import STATE

TITLE = "Evaluation"


def write_report(args: EvalData, records: list[Record], circumstances: dict[str, Any]) -> str:
    """Write report.md, report.html, results.json and the pictures into the output_dir; return the stage table."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    records = [record | training_facts(Path(record["checkpoint"])) for record in records]
    parents = find_parents(records)
    add_reward_accuracy(records, parents)
    changes = compare(records, parents, args.limits)
    records = [{key: value for key, value in record.items() if key != "pair_log_probs"} for record in records]
    prompts = read_prompts(args.prompts)
    named = dict(zip(labels(records), records, strict=True))
    overview = stage_table(named)
    chapters = [
        Section("In short", [*verdict_chapter(named, changes), overview]),
        Section("Forgetting", forgetting_chapter(named, changes)),
        Section("Held-out documents", documents_chapter(named)),
        Section("Questions and pairs", questions_chapter(named)),
        Section("Multiple choice", choices_chapter(named)),
        Section("Classification", classification_chapter(named, folder)),
        Section("How answers behave", manners_chapter(named)),
        Section("Decoding", decoding_chapter(named, folder)),
        Section("Training", training_chapter(named, folder)),
        Section("Answers", answers_chapter(named, prompts) if all("answers" in record for record in records) else []),
        Section("How this was measured", measurement_chapter(asdict(args), circumstances)),
    ]
    chapters = [chapter for chapter in chapters if chapter.parts]
    (folder / "report.md").write_text(render_markdown(TITLE, chapters, folder), encoding="utf-8")
    (folder / "report.html").write_text(render_page(TITLE, chapters), encoding="utf-8")
    results = circumstances | {"recipe": asdict(args), "prompts": prompts, "checkpoints": records}
    results["changes"] = [change._asdict() for change in changes]
    written = json.dumps(as_json(results), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(written + "\n", encoding="utf-8")
    words = render_markdown(TITLE, [chapters[0]], folder).split("\n\n", 2)[2]
    return f"{words}\nThe whole report: {folder / 'report.html'}"


def training_facts(checkpoint: Path) -> dict[str, Any]:
    """Steps, seconds and last loss, from the records beside the checkpoint where there are any.

    Raises SystemExit for a record that is damaged, or whose losses cannot be drawn.
    """
    facts: dict[str, Any] = {}
    file = checkpoint / STATE
    if file.is_file():
        (_, losses), _ = (read_losses(file, key) for key in ("loss", "eval_loss"))
        steps = json.loads(file.read_text(encoding="utf-8", errors="replace")).get("global_step")
        facts |= {"steps": steps, "last_loss": losses[-1] if losses else None}
    facts["seconds"] = read_run(checkpoint).get("seconds")
    return {key: value for key, value in facts.items() if is_number(value)}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_records(checkpoints: list[str]) -> None:
    """Raises SystemExit for a record beside a checkpoint that the report could not be written with."""
    for checkpoint in checkpoints:
        training_facts(Path(checkpoint))


def as_json(value: Any) -> Any:
    """The same for JSON, which has no infinity and no number that is none: null stands for them."""
    if isinstance(value, dict):
        return {key: as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def labels(records: list[Record]) -> list[str]:
    """The stage of each checkpoint; its folder too where a stage occurs twice."""
    stages = [record["stage"] for record in records]
    return [
        stage if stages.count(stage) == 1 else f"{stage} {record['checkpoint']}"
        for stage, record in zip(stages, records, strict=True)
    ]
