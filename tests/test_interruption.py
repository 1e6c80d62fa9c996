"""mini_qwen/interruption.py: a run that is asked to stop leaves a checkpoint, code 75, and nothing half done."""

import os
import signal
from pathlib import Path

import pytest
from programs import STAGES, Programs, arguments, losses, same_weights

from mini_qwen.checkpoint import MANIFEST, verify
from mini_qwen.interruption import EXIT_CODE, Interruption


@pytest.fixture
def interruption() -> Interruption:
    fresh = Interruption()
    fresh.listen(speaks=False)
    yield fresh
    fresh.leave()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_the_run_behind_a_checkpoint_and_resuming_is_exact(
    road: Path, tmp_path: Path, programs: Programs, stage: str, name: str
) -> None:
    """With losses logged every 4 steps: the one that is logged after the resume is of the right steps too."""
    shared = {"save_strategy": "steps", "save_steps": 5, "logging_steps": 4, "gradient_accumulation_steps": 2}
    argv = arguments(stage, road, output_dir=tmp_path / stage, **shared)
    done = programs.run(stage, argv, send_signal={"step": 3, "name": name})
    assert done.code == EXIT_CODE == 75, done.output
    assert f"{name}: stopping at the next step border, with a checkpoint" in done.output
    assert "stopped at step 3; --resume_from_checkpoint true goes on" in done.output
    assert [path.name for path in (tmp_path / stage).glob("checkpoint-*")] == ["checkpoint-3"]
    verify(tmp_path / stage / "checkpoint-3")
    for file in (MANIFEST, "model.safetensors", "run.json", ".unfinished"):
        assert not (tmp_path / stage / file).exists()  # nothing that looks like a finished model

    straight, resumed = arguments(stage, road, output_dir=tmp_path / "straight", **shared), [*argv]
    resumed += ["--resume_from_checkpoint", "true"]
    assert programs.map(lambda words: programs.run(stage, words).code, [straight, resumed]) == [0, 0]
    assert same_weights(tmp_path / stage, tmp_path / "straight")
    # The stop logged steps 1 to 3; the straight run 1 to 4 and, at its save, 5.
    (first, fourth, *rest), (mean, *others) = losses(tmp_path / stage), losses(tmp_path / "straight")
    assert (3 * first + fourth) / 4 == pytest.approx(mean, rel=1e-6)
    assert rest == others


@pytest.mark.parametrize("settings", [{"save_strategy": "epoch"}, {"save_strategy": "best"}], ids=str)
def test_a_stop_within_an_epoch_saves_once_and_evaluates_not(
    road: Path, tmp_path: Path, programs: Programs, settings: dict[str, str]
) -> None:
    settings = settings | {"eval_strategy": "steps", "eval_steps": "3", "metric_for_best_model": "loss"}
    argv = arguments("pt", road, output_dir=tmp_path / "pt", **settings)
    done = programs.run("pt", argv, send_signal={"step": 3, "name": "SIGTERM"})
    assert done.code == 75, done.output
    assert done.output.count("Writing model shards: 100%") == 1 and "eval_loss" not in done.output
    verify(tmp_path / "pt" / "checkpoint-3")
    assert programs.run("pt", [*argv, "--resume_from_checkpoint", "true"]).code == 0
    assert same_weights(tmp_path / "pt", road / "pt")


def test_resuming_into_an_epochs_end_logs_what_a_straight_run_does(
    road: Path, tmp_path: Path, programs: Programs
) -> None:
    """Saves at the ends of epochs, between two log entries; killed behind the first."""
    shared = {"save_strategy": "epoch", "logging_steps": 30, "max_steps": 170, "per_device_train_batch_size": 8}
    straight = arguments("pt", road, output_dir=tmp_path / "straight", **shared)
    broken = arguments("pt", road, output_dir=tmp_path / "broken", **shared)
    assert programs.run("pt", straight).code == 0
    assert programs.run("pt", broken, kill_at_step={"step": 100}).code == -9
    assert [path.name for path in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-78"]
    assert programs.run("pt", [*broken, "--resume_from_checkpoint", "true"]).code == 0
    assert same_weights(tmp_path / "broken", tmp_path / "straight")
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def test_data_workers_live_through_a_signal_to_the_whole_group(road: Path, tmp_path: Path, programs: Programs) -> None:
    """As schedulers send it. torch's workers would end at once, and the training with them, without a checkpoint."""
    argv = arguments("pt", road, output_dir=tmp_path / "pt", dataloader_num_workers=2)
    done = programs.run("pt", argv, send_signal={"step": 3, "name": "SIGTERM", "to_group": True})
    assert done.code == 75, done.output
    assert done.output.count("SIGTERM: stopping") == 1
    again = [*argv, "--resume_from_checkpoint", "true"]
    assert programs.run("pt", again, send_signal={"step": 5, "name": "SIGINT", "to_group": True}).code == 75
    assert programs.run("pt", again).code == 0
    assert same_weights(tmp_path / "pt", road / "pt")


def test_without_a_save_strategy_a_checkpoint_is_left_too(road: Path, tmp_path: Path, programs: Programs) -> None:
    argv = arguments("pt", road, output_dir=tmp_path / "pt", save_strategy="no")
    assert programs.run("pt", argv, send_signal={"step": 2, "name": "SIGTERM"}).code == 75
    assert (tmp_path / "pt" / "checkpoint-2").is_dir()
    assert programs.run("pt", [*argv, "--resume_from_checkpoint", "true"]).code == 0
    assert same_weights(tmp_path / "pt", road / "pt")


@pytest.mark.parametrize("kind", ["open data_ledger.json", "open run.json"])
def test_before_and_behind_the_training_there_is_nothing_to_save(
    road: Path, tmp_path: Path, programs: Programs, kind: str
) -> None:
    """While the data is prepared, and while the finished model is written."""
    folder = tmp_path / "pt"
    argv = arguments("pt", road, output_dir=folder, save_strategy="steps", save_steps=6)
    done = programs.run("pt", argv, signal_at_write={"folder": str(folder), "kind": kind, "name": "SIGTERM"})
    assert done.code == 75, done.output
    assert not (folder / MANIFEST).exists() and not (folder / "run.json").exists()
    again = programs.run("pt", [*argv, "--resume_from_checkpoint", "auto"])
    assert again.code == 0, again.output
    assert same_weights(folder, road / "pt") and not (folder / ".unfinished").exists()


def test_a_second_ctrl_c_does_not_wait_for_the_step(interruption: Interruption) -> None:
    interruption.training = True
    os.kill(os.getpid(), signal.SIGINT)
    assert interruption.requested == "SIGINT"
    os.kill(os.getpid(), signal.SIGINT)  # the terminal and run.sh may both send one
    interruption.asked_at -= 1.5
    with pytest.raises(SystemExit) as leaving:
        os.kill(os.getpid(), signal.SIGINT)
    assert leaving.value.code == 130


def test_a_second_sigterm_waits(interruption: Interruption) -> None:
    interruption.training = True
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
        interruption.asked_at -= 5
    assert interruption.requested == "SIGTERM"


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ours = Interruption()
        ours.listen(speaks=False)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        ours.leave()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_of_before_come_back(interruption: Interruption) -> None:
    assert signal.getsignal(signal.SIGTERM) == interruption.handle
    interruption.leave()
    assert signal.getsignal(signal.SIGTERM) != interruption.handle
