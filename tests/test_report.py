"""mini_qwen/report.py: the table says what was measured, for every checkpoint, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from mini_qwen import report
from mini_qwen.report import make_answers, make_table, write_report

PT = {
    "checkpoint": "results/pt",
    "stage": "pt",
    "parameters": 1000,
    "steps": 12345,
    "seconds": 61.7,
    "last_loss": 2.8349,
    "bits_per_byte": 1.2344,
    "answers": ["and then\nit rained " + "x" * 300, "去"],
}
SFT = {
    "checkpoint": "results/sft",
    "stage": "sft",
    "parameters": 1000,
    "last_loss": None,
    "bits_per_byte": 1.5,
    "accuracy_two_hops": 0.25,
    "accuracy_facts": 1.0,
    "stop_rate": 0.996,
    "answers": ["In Paris.", "北京"],
}


def cells(table: str) -> list[dict[str, str]]:
    """A markdown table as one dict a row."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    header, rule, *rows = lines
    assert set("".join(rule)) <= set("-: ")
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_figures_stand_in_their_columns_and_gaps_stay_empty() -> None:
    pt, sft = cells(make_table([PT, SFT]))
    assert (pt["stage"], sft["stage"]) == ("pt", "sft")
    assert (pt["steps"], sft["steps"]) == ("12,345", "")
    assert (pt["seconds"], sft["seconds"]) == ("62", "")
    assert (pt["last loss"], sft["last loss"]) == ("2.835", "")
    assert (pt["bits/byte"], sft["bits/byte"]) == ("1.234", "1.500")
    assert (pt["stops"], sft["stops"]) == ("", "100%")


def test_every_group_of_questions_has_a_column_in_a_fixed_order() -> None:
    pt, sft = cells(make_table([PT, SFT]))
    assert (sft["facts"], sft["two hops"]) == ("100.0%", "25.0%")
    assert (pt["facts"], pt["two hops"]) == ("", "")
    assert [name for name in sft if name in ("facts", "two hops")] == ["facts", "two hops"]


def test_what_no_checkpoint_has_is_no_column() -> None:
    (row,) = cells(make_table([SFT]))
    assert not {"steps", "last loss", "perplexity"} & set(row)


@pytest.mark.parametrize("value", [0, 0.0])
def test_a_figure_of_zero_is_shown(value: float) -> None:
    (row,) = cells(make_table([{**SFT, "stop_rate": value, "accuracy_facts": value, "steps": 0}]))
    assert (row["stops"], row["facts"], row["steps"]) == ("0%", "0.0%", "0")


def test_checkpoints_of_the_same_stage_can_be_told_apart(tmp_path: Path) -> None:
    """Two runs of one stage side by side is what an evaluation is for."""
    records = [{**SFT, "checkpoint": f"results/sft_{name}", "answers": [f"from {name}"]} for name in ("old", "new")]
    text = write_report(tmp_path, ["Where?"], records, {})
    table, _, answers = text.partition("**Where?**")
    assert "old" in table
    assert "new" in table
    old, new = (line for line in answers.splitlines() if line.startswith("- "))
    assert old.removesuffix("from old") != new.removesuffix("from new")


def test_answers_stand_under_their_prompt() -> None:
    text = make_answers(["Where?", "小明去哪里？"], [PT, SFT], width=20)
    assert text.split("\n") == [
        "",
        "**Where?**",
        "",
        "- pt: and then it rained x ...",
        "- sft: In Paris.",
        "",
        "**小明去哪里？**",
        "",
        "- pt: 去",
        "- sft: 北京",
    ]


def test_files_hold_all_that_was_measured(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    text = write_report(folder, ["Where?", "去？"], [PT, SFT], {"device": "1 x cpu"})
    assert (folder / "results.md").read_text(encoding="utf-8") == text
    assert make_table([PT, SFT]) in text
    assert make_answers(["Where?", "去？"], [PT, SFT]) in text
    saved = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert saved == {"device": "1 x cpu", "prompts": ["Where?", "去？"], "checkpoints": [PT, SFT]}
    assert not (folder / "training_loss.png").exists()  # neither checkpoint has a record of its training


def test_curves_of_the_checkpoints_that_have_them(tmp_path: Path) -> None:
    history = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    records: list[dict[str, Any]] = []
    for record in (PT, SFT):
        checkpoint = tmp_path / record["stage"]
        checkpoint.mkdir()
        records.append({**record, "checkpoint": str(checkpoint)})
    (tmp_path / "sft/trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    write_report(tmp_path / "out", ["Where?", "去？"], records, {})
    assert (tmp_path / "out/training_loss.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_of_the_same_stage_keep_a_curve_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(report, "plot_curves", lambda states, *_, **__: drawn.extend(states.values()))
    records = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text('{"log_history": []}', encoding="utf-8")
        records.append({**SFT, "checkpoint": str(tmp_path / name), "answers": []})
    write_report(tmp_path / "out", [], records, {})
    assert drawn == [tmp_path / "old/trainer_state.json", tmp_path / "new/trainer_state.json"]
