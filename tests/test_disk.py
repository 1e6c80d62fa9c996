"""mini_qwen/disk.py: room is reckoned before the first step, and a disk that fills up takes no checkpoint with it."""

import errno
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from programs import Programs, arguments, same_weights

import mini_qwen_pt
from mini_qwen import disk
from mini_qwen.checkpoint import verify
from mini_qwen.disk import OTHER_FILES, explain_full_disk, most_checkpoints
from mini_qwen.training import PTConfig

LARGE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "block_size": 32}


def figures(message: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) GB", message)]


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd", "low_memory"])
def test_the_estimate_is_what_a_checkpoint_takes(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Programs, optimizer: str
) -> None:
    """Within 3% of the weights and the optimizer's state of 3 million parameters, written for real."""
    options: dict[str, Any] = LARGE | {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {} if optimizer == "muon" else {"muon_learning_rate": "null"}
    options |= {"low_memory": "true"} if optimizer == "low_memory" else {}
    options |= {"optim": "sgd"} if optimizer == "sgd" else {}
    options |= {"optim": "adamw_torch"} if optimizer == "adamw" else {}
    argv = arguments("pt", road, output_dir=tmp_path / "pt", **options)
    assert programs.run("pt", argv).code == 0
    sizes = {name: entry["bytes"] for name, entry in verify(tmp_path / "pt" / "checkpoint-1")["files"].items()}
    estimates = []
    monkeypatch.setattr(disk, "checkpoint_bytes", note(disk.checkpoint_bytes, estimates))
    mini_qwen_pt.main(arguments("pt", road, output_dir=tmp_path / "again", **options))
    weights = sizes["model.safetensors"] + sizes["optimizer.pt"]
    assert estimates[0] - OTHER_FILES == pytest.approx(weights, rel=0.03)
    assert sum(sizes.values()) < estimates[0]


def note(function: Any, results: list[Any]) -> Any:
    def call(*args: Any) -> Any:
        results.append(function(*args))
        return results[-1]

    return call


@pytest.mark.parametrize(
    ("settings", "num_steps", "expected"),
    [
        ({"save_strategy": "no"}, 1000, 1),
        ({"save_strategy": "steps", "save_steps": 100}, 1000, 10),
        ({"save_strategy": "steps", "save_steps": 100}, 1001, 11),  # the Trainer saves at the end too
        ({"save_strategy": "steps", "save_steps": 0.25}, 1000, 4),
        ({"save_strategy": "steps", "save_steps": 100, "save_total_limit": 3}, 1000, 3),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, 1000, 3),
        ({"save_strategy": "epoch", "num_train_epochs": 3, "save_total_limit": 1}, 1000, 1),
    ],
)
def test_how_many_checkpoints_there_will_be(settings: dict[str, Any], num_steps: int, expected: int) -> None:
    args = PTConfig(output_dir="x", **settings)
    trainer: Any = SimpleNamespace(args=args, checkpoint_limit=args.save_total_limit)
    assert most_checkpoints(trainer, num_steps) == expected


def test_too_small_a_disk_is_refused_before_the_first_step(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=30_000_000))
    argv = arguments("pt", road, output_dir=tmp_path / "pt", save_strategy="steps", save_steps=2, **LARGE)
    with pytest.raises(SystemExit, match=r"3 checkpoints of .* GB, one more .*lower save_total_limit") as stopped:
        mini_qwen_pt.main(argv)
    need, each, model, free = figures(str(stopped.value))
    assert need == pytest.approx(4 * each + model, abs=0.05) and free == 0.03
    assert not list((tmp_path / "pt").rglob("*.safetensors"))
    with pytest.raises(SystemExit, match=r"needs .* GB more: 1 checkpoint of"):
        mini_qwen_pt.main([*argv, "--save_total_limit", "1"])


def test_checkpoints_that_are_there_take_no_room_twice(road: Path, tmp_path: Path, programs: Programs) -> None:
    argv = arguments("pt", road, output_dir=tmp_path / "pt", save_strategy="steps", save_steps=2, **LARGE)
    assert programs.run("pt", argv, kill_at_step={"step": 5}).code == -9
    with pytest.MonkeyPatch.context() as patch:  # 4 x 0.055 GB are needed, of which 2 x 0.035 are there
        patch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=190_000_000))
        mini_qwen_pt.main([*argv, "--resume_from_checkpoint", "true"])
        with pytest.raises(SystemExit, match="GB more: 3 checkpoints"):
            mini_qwen_pt.main([*argv, "--output_dir", str(tmp_path / "other")])


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_a_disk_that_fills_up_leaves_whole_checkpoints(
    road: Path, tmp_path: Path, programs: Programs, stage: str
) -> None:
    """No room from each of 12 writes on, in the second save: the message has the figures, and resuming works."""
    shared = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    before = tmp_path / "before"
    argv = arguments(stage, road, output_dir=before, **shared)
    assert programs.run(stage, argv, kill_at_step={"step": 4}).code == -9

    def fill(number: int) -> str:
        folder = Path(shutil.copytree(before, tmp_path / f"full-{number}"))
        again = arguments(stage, road, output_dir=folder, resume_from_checkpoint="true", **shared)
        done = programs.run(stage, again, full_disk={"folder": str(folder), "number": number})
        if done.code == 0:
            return "had room"
        assert done.code == 1 and "Traceback" not in done.output, done.output
        assert f"The disk of {folder} is full: a checkpoint needs" in done.output
        assert len(figures(done.output.rpartition("The disk of")[2])) == 2
        assert not (folder / ".unfinished").exists() and not (folder / "manifest.json").exists()
        (left,) = folder.glob("checkpoint-*")
        verify(left)
        assert programs.run(stage, again).code == 0
        assert same_weights(folder, road / stage)
        return left.name

    left = programs.map(fill, range(10, 70, 5))
    assert {"checkpoint-2", "checkpoint-4"} <= set(left)


def test_another_error_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    assert explain_full_disk(PermissionError(13, "Permission denied"), tmp_path, tmp_path, need=1) is None
    full = explain_full_disk(RuntimeError("enforce fail at inline_container.cc:672"), tmp_path, tmp_path, need=10**18)
    assert "1,000,000,000.00 GB" in str(full)
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "is full" in str(explain_full_disk(quota, tmp_path, tmp_path, need=1))


def test_what_the_save_has_written_so_far_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every error in the second half of a save would be the disk's fault."""
    (tmp_path / "half").write_bytes(bytes(600_000))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=500_000))
    assert explain_full_disk(RuntimeError("CUDA out of memory"), tmp_path, tmp_path, need=10**6) is None
