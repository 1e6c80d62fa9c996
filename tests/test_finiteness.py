"""mini_qwen/finiteness.py: a NaN or an infinity stops the run, by name, before it reaches a checkpoint."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_rows, toy_texts
from programs import STAGES, Programs, arguments, losses, same_weights
from safetensors.torch import load_file

from mini_qwen.checkpoint import verify

SHARED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "gradient_accumulation_steps": 2}
# Step 3 has the backward passes 5 and 6.
FAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "nan loss": {"nan_loss": {"step": 3, "micro_batch": 2}},
    "infinite loss": {"nan_loss": {"step": 3, "micro_batch": 2, "value": float("inf")}},
    "nan gradient": {"nan_gradient": {"backward_pass": 6}},
    "infinite gradient": {"nan_gradient": {"backward_pass": 5, "value": float("-inf")}},
    "nan weight": {"nan_weight": {"step": 3}},
}


@pytest.fixture(scope="module")
def straight(road: Path, tmp_path_factory: pytest.TempPathFactory, programs: Programs) -> dict[str, Path]:
    """The output_dir of each stage without a fault."""
    folders = {stage: tmp_path_factory.mktemp("straight") / stage for stage in STAGES}
    for stage, folder in folders.items():
        done = programs.run(stage, arguments(stage, road, output_dir=folder, **SHARED))
        assert done.code == 0, done.output
    return folders


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_finite_stops_the_run_and_is_never_saved(
    road: Path, straight: dict[str, Path], tmp_path: Path, programs: Programs, stage: str, fault: str
) -> None:
    folder = tmp_path / stage
    done = programs.run(stage, arguments(stage, road, output_dir=folder, **SHARED), **FAULTS[fault])
    assert done.code == 1, done.output
    assert "Step 3, rank 0" in done.output and "--resume_from_checkpoint true" in done.output
    assert "Traceback" not in done.output
    if fault != "nan weight":
        assert re.search(r"This came from rows \d+ \('.+'\), \d+ \(", done.output)
        assert re.search(r"the loss is [^,]+, (nan|inf)" if "loss" in fault else r"norm (nan|inf)", done.output)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]  # never rotated away
    verify(folder / "checkpoint-2")
    for file in folder.rglob("*.safetensors"):
        assert all(torch.isfinite(weight).all() for weight in load_file(file).values())
    assert not (folder / "manifest.json").exists() and not (folder / ".unfinished").exists()

    resumed = programs.run(stage, arguments(stage, road, output_dir=folder, resume_from_checkpoint="true", **SHARED))
    assert resumed.code == 0, resumed.output
    assert same_weights(folder, straight[stage]) and losses(folder) == losses(straight[stage])


@pytest.mark.parametrize("resumed", [False, True])
def test_the_row_that_caused_it_is_named(road: Path, tmp_path: Path, programs: Programs, resumed: bool) -> None:
    """In the second epoch too, and behind a resume."""
    file = save_rows(tmp_path / "documents.jsonl", [{"text": text} for text in toy_texts() * 3])
    shared = SHARED | {"save_total_limit": 99, "num_train_epochs": 2, "max_steps": -1, "eval_rows": 4}
    argv = arguments("pt", road, train_files=file, output_dir=tmp_path / "pt", cache_dir=tmp_path / "cache", **shared)
    prepared = programs.run("pt", [*argv, "--prepare_only", "true"]).output
    steps_per_epoch = int(re.findall(r"blocks: (\d+)", prepared)[0]) // 8
    done = programs.run("pt", argv, poisoned_row={"row": 17, "from_step": steps_per_epoch + 2 if resumed else 1})
    assert done.code == 1, done.output
    (step,) = re.findall(r"Step (\d+), rank 0", done.output)
    named = re.findall(r"(\d+) \('", done.output.rpartition("This came from rows")[2])
    assert "17" in named and len(named) == 4
    assert (int(step) > steps_per_epoch) == resumed
    if resumed:
        again = [*argv, "--resume_from_checkpoint", "true"]
        done = programs.run("pt", again, poisoned_row={"row": 17, "from_step": 1})
        assert f"Step {step}, rank 0" in done.output
        assert re.findall(r"(\d+) \('", done.output.rpartition("This came from rows")[2]) == named


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_last_rows_of_an_epoch_are_named_rightly(
    road: Path, tmp_path: Path, programs: Programs, num_workers: int
) -> None:
    """The next epoch's order may have been drawn by then. A row that is named spoils the step it was named for."""
    texts = [f"{number}: {text}" for number, text in enumerate(toy_texts() * 3)]  # no block is another's beginning
    file = save_rows(tmp_path / "documents.jsonl", [{"text": text} for text in texts])
    options = {"num_train_epochs": 2, "max_steps": -1, "eval_rows": 4, "dataloader_num_workers": num_workers}
    options |= {"train_files": file, "cache_dir": tmp_path / "cache"}
    argv = arguments("pt", road, output_dir=tmp_path / "one", **options)
    prepared = programs.run("pt", [*argv, "--prepare_only", "true"]).output
    last = math.ceil(int(re.findall(r"blocks: (\d+)", prepared)[0]) / 4)
    said = programs.run("pt", argv, nan_loss={"step": last}).output
    assert f"Step {last}, rank 0" in said
    row = int(re.findall(r"This came from rows (\d+) \('", said)[0])
    again = arguments("pt", road, output_dir=tmp_path / "two", **options)
    assert f"Step {last}, rank 0" in programs.run("pt", again, poisoned_row={"row": row, "from_step": 1}).output


def test_a_dead_worker_names_the_rows_it_was_reading(road: Path, tmp_path: Path, programs: Programs) -> None:
    argv = arguments("pt", road, output_dir=tmp_path / "pt", dataloader_num_workers=1, max_steps=200)
    done = programs.run("pt", argv, dying_worker={"row": 17})
    assert done.code == 1 and "Traceback" not in done.output
    assert re.search(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)", done.output)
    (line,) = (line for line in done.output.splitlines() if line.startswith("It was reading rows"))
    assert re.search(r"\b17\b", re.sub(r"'[^']*'", "", line)), line
