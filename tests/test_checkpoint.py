"""mini_qwen/checkpoint.py: a folder is complete or not there, and any damage to it is found."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import Programs, arguments, losses, same_weights

from mini_qwen.checkpoint import (
    MANIFEST,
    UNFINISHED,
    clear_unfinished,
    find_newest,
    publish,
    publish_files,
    read_manifest,
    remove,
    rotate,
    verify,
    write_manifest,
)


@pytest.fixture(scope="module")
def run_folder(road: Path, tmp_path_factory: pytest.TempPathFactory, programs: Programs) -> Path:
    """The output_dir of a finished run with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run") / "pt"
    done = programs.run("pt", arguments("pt", road, output_dir=folder, save_strategy="steps", save_steps=2))
    assert done.code == 0, done.output
    return folder


@pytest.fixture
def copied(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "pt"))


def make_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_checkpoint_holds_what_resuming_needs_and_no_pickle_of_settings(run_folder: Path) -> None:
    names = set(verify(run_folder / "checkpoint-4")["files"])
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    present = {path.name for path in (run_folder / "checkpoint-4").iterdir()}
    assert present == names | {MANIFEST}
    assert not list(run_folder.rglob("training_args.bin"))
    assert {path.name for path in run_folder.iterdir() if path.name.startswith(".")} == set()


def test_the_finished_model_has_a_manifest_of_all_its_files(run_folder: Path) -> None:
    names = set(verify(run_folder)["files"])
    assert {"model.safetensors", "run.json", "trainer_state.json", "training_loss.png", "tokenizer.json"} <= names


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def delete(file: Path) -> None:
    file.unlink()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0x10
    file.write_bytes(content)


DAMAGES: list[Callable[[Path], None]] = [truncate, empty, delete, flip_a_bit]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damage_to_every_file_is_found_and_the_checkpoint_before_is_used(
    run_folder: Path, copied: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [path.name for path in (copied / "checkpoint-6").iterdir()]
    assert len(names) >= 11
    for name in names:
        damage(copied / "checkpoint-6" / name)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            verify(copied / "checkpoint-6")
        assert find_newest(copied) == copied / "checkpoint-4"
        (line,) = capsys.readouterr().out.splitlines()
        assert f"checkpoint-6 is not used: {name}" in line and line.endswith("It is now broken-checkpoint-6")
        assert not (copied / "checkpoint-6").exists()
        shutil.rmtree(copied / "broken-checkpoint-6")
        shutil.copytree(run_folder / "checkpoint-6", copied / "checkpoint-6")
    assert find_newest(copied) == copied / "checkpoint-6"


def test_every_bit_of_a_manifest(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "checkpoint-1", {"a": b"1234", "deep/b": b""})
    write_manifest(folder, {"seed": 1, "learning_rate": 1e-4}, 0.0)
    content = (folder / MANIFEST).read_bytes()
    assert read_manifest(folder)["fingerprint"] == {"seed": 1, "learning_rate": 1e-4}
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            (folder / MANIFEST).write_bytes(flipped)
            with pytest.raises(ValueError, match=MANIFEST):
                read_manifest(folder)


@given(content=st.binary(min_size=1, max_size=64), place=st.integers(0), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: int, bit: int
) -> None:
    folder = make_folder(tmp_path_factory.mktemp("flip"), {"weights": content})
    write_manifest(folder, {}, 0.0)
    flipped = bytearray(content)
    flipped[place % len(content)] ^= 1 << bit
    (folder / "weights").write_bytes(flipped)
    with pytest.raises(ValueError, match="weights is not as it was written"):
        verify(folder)


def test_a_broken_checkpoint_of_the_same_name_is_set_aside_beside_the_first(copied: Path) -> None:
    for _ in range(2):
        (copied / "checkpoint-6").mkdir(exist_ok=True)
        delete(copied / "checkpoint-6" / MANIFEST) if (copied / "checkpoint-6" / MANIFEST).exists() else None
        find_newest(copied)
    assert {path.name for path in copied.glob("broken-*")} == {"broken-checkpoint-6", "broken-checkpoint-6-2"}


def test_no_whole_checkpoint_at_all(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in copied.glob("checkpoint-*"):
        empty(folder / "optimizer.pt")
    for _ in range(2):  # asked again, the run is not begun anew either
        with pytest.raises(ValueError, match="none of its 3 checkpoints can be used"):
            find_newest(copied)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert find_newest(copied / "checkpoint-2") is None


def test_a_file_that_cannot_be_read_is_damage_too(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a disk that fails."""
    read = hashlib.file_digest

    def fail(stream: Any, algorithm: str) -> Any:
        if "checkpoint-6/optimizer.pt" in stream.name:
            raise OSError(5, "Input/output error", stream.name)
        return read(stream, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(ValueError, match=r"optimizer.pt cannot be read \(Input/output error\)"):
        verify(copied / "checkpoint-6")
    assert find_newest(copied) == copied / "checkpoint-4"


def test_publishing_replaces_an_older_folder_of_that_name(tmp_path: Path) -> None:
    make_folder(tmp_path / "checkpoint-2", {"old": b"1"})
    publish(make_folder(tmp_path / UNFINISHED / "checkpoint-2", {"new": b"2"}), tmp_path / "checkpoint-2")
    assert [path.name for path in (tmp_path / "checkpoint-2").iterdir()] == ["new"]


def test_files_of_a_finished_model_are_moved_manifest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = os.replace

    def note(source: Path, target: Path) -> None:
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    whole = make_folder(tmp_path / UNFINISHED / "finished", {"z": b"", "a": b"", MANIFEST: b""})
    publish_files(whole, tmp_path)
    assert sorted(moved[:-1]) == ["a", "z"] and moved[-1] == MANIFEST


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        make_folder(tmp_path / f"checkpoint-{step}", {"a": b""})
    newest = tmp_path / "checkpoint-12"
    rotate(tmp_path, limit=2, newest=newest, best=str(tmp_path / "checkpoint-4"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-12"}
    rotate(tmp_path, limit=1, newest=newest, best=str(tmp_path / "checkpoint-4"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-12"}
    rotate(tmp_path, limit=1, newest=newest, best=None)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-12"}
    rotate(tmp_path, limit=None, newest=newest, best=None)
    assert (tmp_path / "checkpoint-12").exists()


def test_what_is_half_deleted_is_no_checkpoint_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "checkpoint-2", {"a": b""})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed here
        remove(folder)
    assert not list(tmp_path.glob("checkpoint-*")) and list((tmp_path / UNFINISHED).iterdir())
    clear_unfinished(tmp_path)
    assert not (tmp_path / UNFINISHED).exists()


def test_a_kill_behind_any_write_of_a_save_loses_nothing(
    road: Path, run_folder: Path, tmp_path: Path, programs: Programs
) -> None:
    """One save with the deletion of an older checkpoint, then the finished model: kill -9 behind each of its writes.

    The run resumes without help, from the checkpoint before or the new one, to the weights of the run without a kill.
    """
    shared = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    before = tmp_path / "before"
    until_four = programs.run("pt", arguments("pt", road, output_dir=before, **shared), kill_at_step={"step": 6})
    assert until_four.code == -9
    assert [path.name for path in before.glob("checkpoint-*")] == ["checkpoint-4"]

    def kill_and_resume(number: int) -> tuple[str, str]:
        folder = Path(shutil.copytree(before, tmp_path / f"at-{number}"))
        argv = arguments("pt", road, output_dir=folder, resume_from_checkpoint="true", **shared)
        killed = programs.run("pt", argv, kill_at_write={"folder": str(folder), "number": number})
        if killed.code == 0:
            return "", ""
        where = killed.output.rpartition(f"killed at write {number}: ")[2].strip()
        resumed = programs.run("pt", argv)
        good = resumed.code == 0 and same_weights(folder, run_folder) and losses(folder) == losses(run_folder)
        verify(folder)
        verify(folder / "checkpoint-6")
        shutil.rmtree(folder)
        return where, "" if good else resumed.output

    results: list[tuple[str, str]] = []
    while all(where for where, _ in results):
        results += programs.map(kill_and_resume, range(len(results) + 1, len(results) + 9))
    kills = [where for where, _ in results if where]
    assert [failure for _, failure in results if failure] == []
    assert len(kills) > 60, kills
    for file in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert f"half {file}" in kills and f"whole {file}" in kills
    assert "os.rename checkpoint-6" in kills and "os.rename checkpoint-4" in kills and "open manifest.json" in kills
    assert "os.remove optimizer.pt" in kills  # in the midst of the deletion of the older one


def test_a_checkpoint_without_the_optimizer_is_not_resumed_from(
    road: Path, tmp_path: Path, programs: Programs
) -> None:
    """The Trainer alone would go on with a fresh optimizer and another learning rate, and say nothing."""
    shared = {"output_dir": tmp_path / "pt", "save_strategy": "steps", "save_steps": 3}
    assert programs.run("pt", arguments("pt", road, save_only_model="true", **shared)).code == 0
    done = programs.run("pt", arguments("pt", road, resume_from_checkpoint=tmp_path / "pt/checkpoint-3", **shared))
    assert done.code == 1 and "without the optimizer's state (save_only_model)" in done.output


def test_a_damaged_finished_model_is_not_gone_on_from(road: Path, tmp_path: Path, programs: Programs) -> None:
    parent = Path(shutil.copytree(road / "pt", tmp_path / "pt"))
    flip_a_bit(parent / "model.safetensors")
    done = programs.run("sft", arguments("sft", road, checkpoint=parent, output_dir=tmp_path / "sft"))
    assert done.code == 1
    assert "pt' is damaged: model.safetensors is not as it was written (its SHA-256 differs)" in done.output
    manifest = json.loads((parent / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["fingerprint"]["seed"] == 42
