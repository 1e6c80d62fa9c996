"""mini_qwen/training_logs.py: what a run printed comes back with its steps, or an error says why."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mini_qwen.training_logs import parse_entry, read_history

LOGS = Path(__file__).resolve().parents[1].parent / "shared/data/logs"


def bar(step: int, total: int = 90) -> str:
    return f"\r {step * 100 // total:2d}%|▍         | {step}/{total} [02:22<50:25,  6.86s/it]"


def write(folder: Path, *parts: str, name: str = "run.log") -> Path:
    path = folder / name
    path.write_text("".join(parts), encoding="utf-8")
    return path


def steps(history: list[dict[str, Any]]) -> list[int]:
    return [entry["step"] for entry in history]


@pytest.mark.parametrize(
    ("name", "num_losses", "first", "last", "num_steps"),
    [
        ("pt", 676, 12.123, 2.831, 13523),
        ("pt1", 4, 10.5551, 7.7607, 81),
        ("pt2", 5, 10.7111, 7.6913, 115),
        ("pt3", 11, 10.952, 6.3162, 232),
        ("dpo", 23, 0.6962, 0.5264, 462),
        ("dpo1", 23, 0.6939, 0.3762, 462),
        ("dpo2", 23, 0.6946, 0.5232, 462),
        ("dpo3", 23, 0.6951, 0.6647, 462),
    ],
)
def test_old_logs_come_out_as_their_pictures(
    name: str, num_losses: int, first: float, last: float, num_steps: int
) -> None:
    if not LOGS.is_dir():
        pytest.skip("the logs of the first runs are not beside this repository")
    history = read_history(LOGS / f"output_{name}.log")
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert len(losses) == num_losses
    assert losses[0] == (20, first)
    assert losses[-1] == (20 * num_losses, last)
    assert [step for step, _ in losses] == list(range(20, 20 * num_losses + 1, 20))
    summary = history[-1]
    assert (summary["step"], "loss" in summary, "train_loss" in summary) == (num_steps, False, True)
    assert len(history) == num_losses + 1


def test_the_step_is_that_of_the_bar_drawn_again_behind_the_entry(tmp_path: Path) -> None:
    """In a fast run the bar before an entry has not been drawn for some steps."""
    log = write(tmp_path, bar(1), bar(3), "\r   \r{'loss': 2.5, 'epoch': 0.1}\n", bar(7), bar(8), "\n")
    assert read_history(log) == [{"loss": 2.5, "epoch": 0.1, "step": 7}]


def test_bars_of_data_and_evaluation_are_no_steps(tmp_path: Path) -> None:
    log = write(
        tmp_path,
        "\rMap: 100%|██████████| 70/90 [00:00<00:00, 9.0 examples/s]\n",
        "[INFO] aio_config ... {'block_size': 1048576, 'num_epochs': 3}\n",
        bar(0),
        bar(10),
        "\r  \r{'loss': 3.0, 'epoch': 0.1}\n",
        bar(10),
        "\n",
        bar(1, 4),
        "\x1b[A",
        bar(4, 4),
        "\r  \r{'eval_loss': 2.75, 'epoch': 0.1}\n",
        bar(4, 4),
        "\x1b[A\n",
        bar(10),
        bar(11),
        "\r  \r{'train_runtime': 9.5, 'train_loss': 3.0, 'epoch': 0.2}\n",
        bar(11),
    )
    history = read_history(log)
    assert steps(history) == [10, 10, 11]
    assert [set(entry) & {"loss", "eval_loss", "train_loss"} for entry in history] == [
        {"loss"},
        {"eval_loss"},
        {"train_loss"},
    ]


def test_numbers_in_quotes_and_those_that_are_none() -> None:
    entry = parse_entry("{'loss': nan, 'grad_norm': -inf, 'learning_rate': '1e-05', 'x': np.float64(0.5), 'y': 'nan'}")
    assert entry is not None
    assert math.isnan(entry["loss"]) and math.isnan(entry["y"])
    assert (entry["grad_norm"], entry["learning_rate"], entry["x"]) == (-math.inf, 1e-5, 0.5)


@pytest.mark.parametrize("text", ["{'loss': 1.5, 'gr", "{'loss': open('x')}", "{'loss': 'high'}", "{'loss'}"])
def test_a_damaged_entry_is_none(text: str) -> None:
    assert parse_entry(text) is None


def test_a_log_cut_off_keeps_what_is_there_and_counts_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [bar(20), "\r \r{'loss': 3.0, 'epoch': 0.1}\n", bar(20), bar(40), "\r \r{'loss': 2.0, 'epoch': 0.2}"]
    assert steps(read_history(write(tmp_path, *whole))) == [20, 40]
    assert capsys.readouterr().out == ""
    for tail in ("{'lo", "{'loss': 1.5, 'gr"):
        log = write(tmp_path, *whole, "\n", bar(40), bar(60), "\r \r", tail)
        assert steps(read_history(log)) == [20, 40]
        assert "1 of 3 entries cannot be read" in capsys.readouterr().out


def test_a_torn_entry_in_the_middle_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path, bar(1), "\r{'loss': 3.0, 'ep\n", bar(1), bar(2), "\r{'loss': 2.0, 'epoch': 0.2}\n", bar(2))
    assert read_history(log) == [{"loss": 2.0, "epoch": 0.2, "step": 2}]
    assert "1 of 2 entries" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "{'loss': 3.0, 'epoch': 0.1}\n{'loss': 2.0, 'epoch': 0.2}\n",
        bar(9) + "\n{'loss': 3.0, 'epoch': 0.1}\n{'loss': 2.0, 'epoch': 0.2}\n" + bar(90),
    ],
    ids=["no bars", "written in blocks"],
)
def test_steps_are_never_guessed(tmp_path: Path, text: str) -> None:
    with pytest.raises(SystemExit, match="its step cannot be known"):
        read_history(write(tmp_path, text))


def test_a_state_is_its_log_history(tmp_path: Path) -> None:
    history = [{"step": 5, "loss": 2.0}, {"step": 5, "eval_loss": 1.0}]
    path = write(tmp_path, json.dumps({"log_history": history}), name="trainer_state.json")
    assert read_history(path) == read_history(tmp_path) == history


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trainer_state.json", '{"log_history": [{"st', "trainer_state.json:1: not JSON"),
        ("trainer_state.json", "[1, 2]", "no list 'log_history'"),
        ("trainer_state.json", '{"log_history": [{"step": 1}, {"loss": 2.0}]}', "entry 1 .*'loss': 2.0"),
        ("notes.txt", "# Notes\nnothing was {trained} here\n", "notes.txt' shows no training"),
        ("empty.log", "", "shows no training"),
    ],
)
def test_foreign_and_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        read_history(write(tmp_path, text, name=name))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="gone.log' cannot be read: No such file"):
        read_history(tmp_path / "gone.log")
    with pytest.raises(SystemExit, match="has no trainer_state.json"):
        read_history(tmp_path)
    for number in (900, 1000):
        (tmp_path / f"checkpoint-{number}").mkdir()
        write(tmp_path / f"checkpoint-{number}", "{}", name="trainer_state.json")
    with pytest.raises(SystemExit, match="name '.*checkpoint-1000'"):
        read_history(tmp_path)
