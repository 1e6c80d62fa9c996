"""The table of levers: every stage prints what was chosen, and each name can be set."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
from programs import STAGES, Programs, arguments

from mini_qwen.model import TrainedModel
from mini_qwen.training import AnswerConfig, PreferenceConfig, PTConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = dict(zip(STAGES, (PTConfig, AnswerConfig, PreferenceConfig), strict=True))
NOT_IN_RECIPES = {"distribution", "threads"}  # accelerate_config.yaml and OMP_NUM_THREADS


def read_table(output: str) -> dict[str, str]:
    """Of each lever, the words behind its name."""
    lines = output.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("lever "))
    rows = lines[start + 2 : next(index for index in range(start, len(lines)) if lines[index].startswith("first row"))]
    return dict(row.split(maxsplit=1) for row in rows)


@pytest.mark.parametrize("stage", STAGES)
def test_every_lever_is_shown_and_can_be_set(programs: Programs, road: Path, tmp_path: Path, stage: str) -> None:
    options = {"max_steps": 1, "output_dir": tmp_path / stage, "activation_checkpointing": "true"}
    done = programs.run(stage, arguments(stage, road, **options))
    assert done.code == 0, done.output[-3000:]
    table = read_table(done.output)
    keys = {field.name for config in (CONFIGS[stage], TrainedModel) for field in dataclasses.fields(config)}
    assert table.keys() - NOT_IN_RECIPES <= keys
    shown = {"loss_head", "attn_implementation", "precision", "compile_layers", "dataloader_num_workers"}
    assert table.keys() >= shown | NOT_IN_RECIPES
    assert ("precompute_ref_log_probs" in table) == (stage == "dpo")
    assert table["activation_checkpointing"].startswith("True")
    assert table["threads"].startswith("1 ")


def test_the_document_shows_what_was_measured() -> None:
    document = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    results = ROOT / "bench/results"
    rows = []
    for stage in ("pt", "pt_wide", "sft", "dpo"):
        record = json.loads((results / f"step_{stage}.json").read_text(encoding="utf-8"))
        rows += [[name, *ratios.values()] for name, ratios in record["ratios"].items()]
    head = json.loads((results / "head.json").read_text(encoding="utf-8"))
    rows += [list(line.values())[:5] for line in head["ratios_to_plain"]]
    gpu = json.loads((results / "gpu_step.json").read_text(encoding="utf-8"))
    for name, runs in gpu["measured"].items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "all_steps_s"}
        figures = f"{middle['tokens_per_s']:,.0f}", f"{middle['mfu']:.1%}", f"{middle['peak_allocated_gb']:.1f}"
        rows.append([name, *figures])
    gpu_head = json.loads((results / "gpu_head.json").read_text(encoding="utf-8"))
    columns = ("ms", "times_three_products", "peak_gb", "gradients_from_plain")
    rows += [[name, *(facts[column] for column in columns)] for name, facts in gpu_head["heads"].items()]
    assert len(rows) >= 40
    for row in rows:
        assert "| " + " | ".join(map(str, row)) + " |" in document, row


@pytest.mark.slow
def test_compiled_layers_train_as_others_do(programs: Programs, road: Path, tmp_path: Path) -> None:
    losses = {}
    for compiled in ("false", "true"):
        options = {"max_steps": 4, "logging_steps": 1, "output_dir": tmp_path / compiled, "compile_layers": compiled}
        done = programs.run("pt", arguments("pt", road, **options))
        assert done.code == 0, done.output[-3000:]
        history = json.loads((tmp_path / compiled / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        losses[compiled] = [line["loss"] for line in history if "loss" in line]
    assert len(losses["true"]) == 4
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
