"""mini_qwen/resumption.py and fingerprint.py: a resumed run is the same run, bit for bit, or does not begin."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from programs import ROOT, STAGES, Programs, arguments, gradient_norms, losses, same_weights

from mini_qwen.checkpoint import read_manifest, verify, write_manifest
from mini_qwen.circumstances import versions
from mini_qwen.fingerprint import check_same_run

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "workers": {"dataloader_num_workers": 2},
    "dropout": {"attention_dropout": 0.2},
}
TRAJECTORIES = ROOT / "tests" / "trajectories.json"


@pytest.fixture(scope="module")
def stopped(road: Path, tmp_path_factory: pytest.TempPathFactory, programs: Programs) -> Path:
    """The output_dir of a PT run that was killed behind its checkpoint at step 2."""
    folder = tmp_path_factory.mktemp("stopped") / "pt"
    argv = arguments("pt", road, output_dir=folder, save_strategy="steps", save_steps=2)
    assert programs.run("pt", argv, kill_at_step={"step": 4}).code == -9
    return folder


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "pt"))


def resuming(road: Path, folder: Path, **changes: Any) -> list[str]:
    """The arguments of the run that was stopped, and of how it goes on."""
    shared = {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "true"}
    return arguments("pt", road, output_dir=folder, **(shared | changes))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_as_uninterrupted(
    road: Path, tmp_path: Path, programs: Programs, stage: str, setting: str
) -> None:
    """kill -9 at step 5, resumed from 4: every weight, loss and gradient norm."""
    shared = {"save_strategy": "steps", "save_steps": 2} | SETTINGS[setting]
    straight = arguments(stage, road, output_dir=tmp_path / "straight", **shared)
    broken = arguments(stage, road, output_dir=tmp_path / "broken", **shared)
    jobs: list[tuple[list[str], dict[str, Any]]] = [(straight, {}), (broken, {"kill_at_step": {"step": 5}})]
    assert programs.map(lambda job: programs.run(stage, job[0], **job[1]).code, jobs) == [0, -9]
    resumed = programs.run(stage, [*broken, "--resume_from_checkpoint", "true"])
    assert resumed.code == 0 and f"going on from {tmp_path}/broken/checkpoint-4" in resumed.output
    assert same_weights(tmp_path / "broken", tmp_path / "straight")
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert gradient_norms(tmp_path / "broken") == gradient_norms(tmp_path / "straight")
    ours, theirs = (
        json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))["metrics"]
        for name in ("broken", "straight")
    )
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"])
    assert ours["eval_loss"] == theirs["eval_loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_dropout_is_not_nothing(road: Path, tmp_path: Path, programs: Programs, stage: str) -> None:
    """Else the test above would say nothing about the states of the generators."""
    argv = arguments(stage, road, output_dir=tmp_path / stage, attention_dropout=0.2)
    assert programs.run(stage, argv).code == 0
    assert losses(tmp_path / stage) != losses(road / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_trajectory_is_the_pinned_one(road: Path, stage: str) -> None:
    """Losses and gradient norms of every step, pinned with the versions that gave them.

    Other processors add up in another order, hence the tolerance. When a new version of a library moves them, look
    why, then write down what it gives: python tests/test_resumption.py FOLDER_OF_THE_ROAD
    """
    pinned = json.loads(TRAJECTORIES.read_text(encoding="utf-8"))
    moved = {name: (version, versions().get(name)) for name, version in pinned["versions"].items()}
    moved = {name: pair for name, pair in moved.items() if pair[0] != pair[1]}
    assert losses(road / stage) == pytest.approx(pinned[stage]["loss"], rel=1e-3), moved
    assert gradient_norms(road / stage) == pytest.approx(pinned[stage]["grad_norm"], rel=2e-2), moved


CHANGES: dict[str, dict[str, Any]] = {
    "learning_rate": {"learning_rate": 2e-3},
    "muon_learning_rate": {"muon_learning_rate": 1e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "linear"},
    "warmup_steps": {"warmup_steps": 3},
    "max_steps": {"max_steps": 7},
    "seed": {"seed": 1, "data_seed": 42},
    "data_seed": {"data_seed": 1},
    "per_device_train_batch_size": {"per_device_train_batch_size": 8},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "attention": {"attn_implementation": "eager"},
    "precision": {"precision": "bf16"},
    "data": {"train_files": ROOT / "mini_data/pt/news_media"},
    "model.hidden_size": {"hidden_size": 64},
    "model.num_hidden_layers": {"num_hidden_layers": 3},
    "model.attention_dropout": {"attention_dropout": 0.1},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_with_both_values(road: Path, copied: Path, programs: Programs, name: str) -> None:
    done = programs.run("pt", resuming(road, copied, **CHANGES[name]))
    assert done.code == 1 and "Traceback" not in done.output
    assert f"This is not the run that wrote {copied}/checkpoint-2:" in done.output
    assert re.search(rf"[:;] {re.escape(name)} was .+?, is .+?[;.]", done.output), done.output
    assert re.search(rf"--allow_changes .*\b{re.escape(name)}", done.output)
    assert [path.name for path in copied.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("name", ["learning_rate", "max_steps", "per_device_train_batch_size", "attention"])
def test_a_change_that_is_meant_is_allowed_by_name(road: Path, copied: Path, programs: Programs, name: str) -> None:
    done = programs.run("pt", resuming(road, copied, allow_changes=name, **CHANGES[name]))
    assert done.code == 0, done.output
    fingerprint = verify(copied)["fingerprint"]
    assert fingerprint[name] == {"attention": "eager"}.get(name, CHANGES[name].get(name))


@pytest.mark.parametrize("name", ["learning_rate", "muon_learning_rate"])
def test_an_allowed_rate_is_the_rate_from_there_on(road: Path, copied: Path, programs: Programs, name: str) -> None:
    """The checkpoint's optimizer and scheduler bring their own; here 10 times the rate, on the same schedule."""
    before = {"learning_rate": 4e-3, "muon_learning_rate": 8e-3}[name]
    done = programs.run("pt", resuming(road, copied, allow_changes=name, **{name: 10 * before}))
    assert done.code == 0, done.output
    history = json.loads((copied / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    straight = json.loads((road / "pt" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    ours, theirs = ([entry["learning_rate"] for entry in each if "loss" in entry] for each in (history, straight))
    shown = 10 if name == "muon_learning_rate" else 1  # the log shows the first group's, which is Muon's
    assert ours == pytest.approx([*theirs[:2], *(shown * rate for rate in theirs[2:])])
    groups = torch.load(copied / "checkpoint-6" / "optimizer.pt", weights_only=True)["param_groups"]
    assert groups[0 if name == "muon_learning_rate" else 1]["initial_lr"] == pytest.approx(10 * before)


def test_what_the_optimizer_brings_cannot_be_changed(road: Path, copied: Path, programs: Programs) -> None:
    done = programs.run("pt", resuming(road, copied, allow_changes="weight_decay", weight_decay=0.5))
    assert done.code == 1 and "weight_decay cannot change when a run goes on" in done.output
    assert "Go back to weight_decay 0.01" in done.output


def test_what_does_not_change_the_run_may_change(road: Path, copied: Path, programs: Programs) -> None:
    other = {"save_steps": 3, "save_total_limit": 2, "logging_steps": 2, "dataloader_num_workers": 1}
    assert programs.run("pt", resuming(road, copied, **other)).code == 0
    assert same_weights(copied, road / "pt")


def test_other_versions_are_another_run(road: Path, copied: Path, programs: Programs) -> None:
    checkpoint = copied / "checkpoint-2"
    fingerprint = read_manifest(checkpoint)["fingerprint"]
    write_manifest(checkpoint, fingerprint | {"versions.torch": "1.0.0", "versions.trl": "0.1"}, 0.0)
    done = programs.run("pt", resuming(road, copied))
    assert "versions.torch was '1.0.0', is '2" in done.output and "versions.trl was '0.1'" in done.output
    assert programs.run("pt", resuming(road, copied, allow_changes="versions")).code == 0


def test_seconds_are_those_of_the_whole_run(road: Path, copied: Path, programs: Programs) -> None:
    """As steps and losses are."""
    checkpoint = copied / "checkpoint-2"
    assert 0 < read_manifest(checkpoint)["seconds"] < 1000
    write_manifest(checkpoint, read_manifest(checkpoint)["fingerprint"], seconds=5000)
    assert programs.run("pt", resuming(road, copied, save_steps=2)).code == 0
    assert 5000 < read_manifest(copied / "checkpoint-4")["seconds"] < 6000
    assert 5000 < json.loads((copied / "run.json").read_text(encoding="utf-8"))["seconds"] < 6000


def test_a_parent_of_other_weights_is_another_run(road: Path, tmp_path: Path, programs: Programs) -> None:
    """DPO takes its reference from the parent: a parent that was trained again would change it in silence."""
    argv = arguments("dpo", road, output_dir=tmp_path / "dpo", save_strategy="steps", save_steps=2)
    assert programs.run("dpo", argv, kill_at_step={"step": 4}).code == -9
    done = programs.run("dpo", [*argv, "--checkpoint", str(road / "pt"), "--resume_from_checkpoint", "true"])
    assert done.code == 1 and "start_weights was '" in done.output


def test_names_that_no_run_has_cannot_be_allowed() -> None:
    with pytest.raises(SystemExit, match=r"allow_changes names 'learning_rat'.*Did you mean 'learning_rate'"):
        check_same_run({"learning_rate": 1}, {"learning_rate": 2}, "x", ["learning_rat"])
    with pytest.raises(SystemExit, match=r"wrote x: a\.b was 1, is None; c was None, is 3\..*--allow_changes a\.b c"):
        check_same_run({"a.b": 1, "d": 1}, {"c": 3, "d": 1}, "x", [])
    check_same_run({"a.b": 1, "a.c": 1}, {"a.b": 2, "a.c": 3}, "x", ["a"])


def test_a_fingerprint_survives_json(stopped: Path) -> None:
    fingerprint = json.loads((stopped / "fingerprint.json").read_text(encoding="utf-8"))
    assert fingerprint == read_manifest(stopped / "checkpoint-2")["fingerprint"]
    assert {"data", "tokenizer", "seed", "attention", "processes", "learning_rate", "versions.torch"} <= set(
        fingerprint
    )
    assert not {"output_dir", "hub_token", "logging_steps"} & set(fingerprint)


def test_an_earlier_run_in_the_folder_is_refused(road: Path, copied: Path, programs: Programs) -> None:
    """With its checkpoints, and with its finished model; without either there is nothing to lose."""
    done = programs.run("pt", arguments("pt", road, output_dir=copied))
    assert done.code == 1 and "holds checkpoint-2 of an earlier run" in done.output
    finished = Path(shutil.copytree(road / "pt", copied / "finished"))
    done = programs.run("pt", arguments("pt", road, output_dir=finished))
    assert done.code == 1 and "holds the finished model of an earlier run" in done.output
    shutil.rmtree(copied / "checkpoint-2")
    assert programs.run("pt", arguments("pt", road, output_dir=copied)).code == 0


def test_one_writer_at_a_time(road: Path, copied: Path, programs: Programs) -> None:
    for folder, extra in ((copied, ["--resume_from_checkpoint", "true"]), (copied / "fresh", [])):
        folder.mkdir(exist_ok=True)
        with FileLock(folder / ".lock"):
            done = programs.run("pt", arguments("pt", road, output_dir=folder) + extra)
        assert done.code == 1 and f"Another program is training into {folder}" in done.output
        assert {path.name for path in folder.glob("checkpoint-*")} <= {"checkpoint-2"}


def test_where_to_begin(road: Path, tmp_path: Path, programs: Programs) -> None:
    """`true` needs a run that was begun, `auto` does not; neither needs a checkpoint."""
    argv = arguments("pt", road, output_dir=tmp_path / "pt", save_strategy="steps", save_steps=3)
    done = programs.run("pt", [*argv, "--resume_from_checkpoint", "true"])
    assert done.code == 1 and f"There is no checkpoint to resume from: {tmp_path}/pt." in done.output
    done = programs.run("pt", [*argv, "--resume_from_checkpoint", "auto"], kill_at_step={"step": 2})
    assert done.code == -9
    done = programs.run("pt", [*argv, "--resume_from_checkpoint", "true"])
    assert done.code == 0 and "has no checkpoint: from the beginning" in done.output
    assert same_weights(tmp_path / "pt", road / "pt")
    done = programs.run("pt", [*argv, "--resume_from_checkpoint", "nowhere"])
    assert done.code == 1 and "no checkpoint to resume from: nowhere: manifest.json is missing" in done.output


def test_a_named_checkpoint_is_used_or_refused_never_replaced(road: Path, copied: Path, programs: Programs) -> None:
    argv = arguments("pt", road, output_dir=copied, resume_from_checkpoint=copied / "checkpoint-2")
    assert programs.run("pt", argv).code == 0
    assert same_weights(copied, road / "pt")
    (copied / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    done = programs.run("pt", argv)
    assert done.code == 1 and "checkpoint-2: optimizer.pt has 0 bytes, not" in done.output
    assert (copied / "checkpoint-2").is_dir()


def test_going_back_to_an_earlier_checkpoint(road: Path, tmp_path: Path, programs: Programs) -> None:
    """What was saved behind it is set aside, not taken for the newest nor kept in place of the new ones."""
    shared = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    argv = arguments("pt", road, output_dir=tmp_path / "pt", **shared)
    assert programs.run("pt", argv, kill_at_step={"step": 6}).code == -9
    assert {path.name for path in (tmp_path / "pt").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    back = [*argv, "--resume_from_checkpoint", str(tmp_path / "pt" / "checkpoint-2")]
    done = programs.run("pt", back, kill_at_step={"step": 4})
    assert done.code == -9 and "checkpoint-4 is of a later step" in done.output
    assert [path.name for path in (tmp_path / "pt").glob("checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "pt" / "later-checkpoint-4").is_dir()
    assert programs.run("pt", [*argv, "--resume_from_checkpoint", "true"]).code == 0
    assert same_weights(tmp_path / "pt", road / "pt")


def test_a_checkpoint_of_elsewhere_does_not_open_a_folder_in_use(
    road: Path, copied: Path, tmp_path: Path, programs: Programs
) -> None:
    argv = arguments("pt", road, output_dir=road / "pt", resume_from_checkpoint=copied / "checkpoint-2")
    done = programs.run("pt", argv)
    assert done.code == 1 and "holds the finished model of an earlier run" in done.output
    argv = arguments("pt", road, output_dir=tmp_path / "new", resume_from_checkpoint=copied / "checkpoint-2")
    assert programs.run("pt", argv).code == 0
    assert same_weights(tmp_path / "new", road / "pt")


@pytest.mark.parametrize("wanted", ["true", "auto"])
def test_a_finished_run_without_checkpoints_is_not_begun_anew(
    road: Path, tmp_path: Path, programs: Programs, wanted: str
) -> None:
    """As a job would that is started again and again."""
    folder = Path(shutil.copytree(road / "pt", tmp_path / "pt"))
    done = programs.run("pt", arguments("pt", road, output_dir=folder, resume_from_checkpoint=wanted))
    assert done.code == 1 and "no checkpoint to resume from" in done.output and "the run is finished" in done.output
    verify(folder)


def test_the_best_checkpoint_stays_and_is_loaded_at_the_end(road: Path, tmp_path: Path, programs: Programs) -> None:
    """With a rate so high that the first evaluation is the best: checkpoint-2 outlives save_total_limit: 1."""
    best = {
        "load_best_model_at_end": "true",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
    }
    rates = {
        "learning_rate": 5,
        "muon_learning_rate": 5,
        "warmup_steps": 3,
        "lr_scheduler_type": "constant_with_warmup",
    }
    shared = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1} | best | rates
    argv = arguments("pt", road, output_dir=tmp_path / "pt", **shared)
    done = programs.run("pt", argv, send_signal={"step": 6, "name": "SIGTERM"})
    assert done.code == 75, done.output
    assert {path.name for path in (tmp_path / "pt").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    state = json.loads((tmp_path / "pt" / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_model_checkpoint"] == str(tmp_path / "pt" / "checkpoint-2")
    done = programs.run("pt", [*argv, "--resume_from_checkpoint", "true"])
    assert done.code == 0, done.output
    assert same_weights(tmp_path / "pt", tmp_path / "pt" / "checkpoint-2")


def test_resuming_a_run_at_its_end_trains_no_step_more(road: Path, tmp_path: Path, programs: Programs) -> None:
    """The Trainer alone would: it compares with max_steps behind a step only. Here the rate at the end is not 0."""
    shared = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    argv = arguments("pt", road, output_dir=tmp_path / "pt", **shared)
    assert programs.run("pt", argv).code == 0
    expected = Path(shutil.copytree(tmp_path / "pt", tmp_path / "expected"))
    done = programs.run("pt", [*argv, "--resume_from_checkpoint", "true"])
    assert done.code == 0 and same_weights(tmp_path / "pt", expected)
    assert losses(tmp_path / "pt") == losses(expected) and len(losses(expected)) == 6
    assert {path.name for path in (tmp_path / "pt").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


if __name__ == "__main__":
    import sys

    found: dict[str, Any] = {"versions": versions()}
    for stage in STAGES:
        folder = Path(sys.argv[1]) / stage
        found[stage] = {"loss": losses(folder), "grad_norm": gradient_norms(folder)}
    TRAJECTORIES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
