"""mini_qwen/curves.py: what a trainer_state.json says is what is drawn."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import colors, image
from matplotlib.figure import Figure

from mini_qwen.curves import plot_curves, read_losses

HISTORY = [
    {"step": 20, "loss": 4.5, "grad_norm": 1.5, "learning_rate": 1e-3},
    {"step": 40, "loss": 3.25, "grad_norm": 0.5, "learning_rate": 5e-4},
    {"step": 40, "eval_loss": 3.5, "eval_runtime": 1.0},
    {"step": 60, "loss": 2.0, "grad_norm": 0.25, "learning_rate": 0.0},
    {"step": 60, "eval_loss": 2.5, "eval_runtime": 1.0},
    {"step": 60, "train_loss": 3.0, "train_runtime": 9.0},
]


def state(folder: Path, history: list[dict[str, Any]] = HISTORY) -> Path:
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"global_step": 60, "log_history": history}), encoding="utf-8")
    return path


def drawn(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()]
        for axes in figure.axes
        for line in axes.get_lines()
    }


@pytest.mark.parametrize(
    ("key", "steps", "values"),
    [
        ("loss", [20, 40, 60], [4.5, 3.25, 2.0]),
        ("eval_loss", [40, 60], [3.5, 2.5]),
        ("grad_norm", [20, 40, 60], [1.5, 0.5, 0.25]),
        ("rewards/margins", [], []),
    ],
)
def test_values_are_read_back_with_their_steps(
    tmp_path: Path, key: str, steps: list[int], values: list[float]
) -> None:
    assert read_losses(state(tmp_path), key) == (steps, values)


def test_training_is_a_line_and_held_out_are_dots_of_its_colour(tmp_path: Path, figures: list[Figure]) -> None:
    plot_curves({"one": state(tmp_path)}, tmp_path / "loss.png")
    (figure,) = figures
    assert drawn(figure) == {
        "one": [(20, 4.5), (40, 3.25), (60, 2.0)],
        "one, held out": [(40, 3.5), (60, 2.5)],
    }
    line, dots = figure.axes[0].get_lines()
    assert colors.to_rgb(line.get_color()) == colors.to_rgb(dots.get_color())
    assert (line.get_linestyle(), dots.get_linestyle()) == ("-", "None")


@pytest.mark.parametrize("panels", [False, True])
def test_several_runs_share_a_picture(tmp_path: Path, figures: list[Figure], panels: bool) -> None:
    states = {}
    for number, label in enumerate(("a", "b", "c"), start=1):
        (tmp_path / label).mkdir()
        states[label] = state(tmp_path / label, [{"step": 1, "loss": float(number)}, {"step": 2, "loss": 0.0}])
    target = tmp_path / "loss.png"
    plot_curves(states, target, panels=panels)
    (figure,) = figures
    assert len(figure.axes) == (3 if panels else 1)
    assert drawn(figure) == {label: [(1, number), (2, 0)] for number, label in enumerate(states, start=1)}
    pixels = image.imread(target)
    assert pixels.ndim == 3
    assert pixels.std() > 0


def test_a_run_that_logged_nothing_gives_an_empty_picture(tmp_path: Path) -> None:
    plot_curves({"short": state(tmp_path, [])}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_every_key_has_a_panel_with_all_runs(tmp_path: Path, figures: list[Figure]) -> None:
    runs = {"a": HISTORY, "b": HISTORY[:2]}
    plot_curves(dict(runs), tmp_path / "a.png", keys=("loss", "grad_norm", "eval_loss"))
    (figure,) = figures
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "grad_norm", "eval_loss"]
    drawn_in = [[line.get_ydata().tolist() for line in axes.get_lines()] for axes in figure.axes]
    assert drawn_in == [[[4.5, 3.25, 2.0], [4.5, 3.25]], [[1.5, 0.5, 0.25], [1.5, 0.5]], [[3.5, 2.5]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_another_axis_than_steps() -> None:
    history = [{"step": 20, "epoch": 0.5, "loss": 2.0}, {"step": 40, "epoch": 1.0, "loss": 1.0}]
    assert read_losses(history, "loss", "epoch") == ([0.5, 1.0], [2.0, 1.0])


def test_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="trainer_state.json: 'loss' is 'high' at step 3"):
        read_losses(state(tmp_path, [{"step": 3, "loss": "high"}]))


def plot_losses(folder: Path, *arguments: str, target: str = "out.png") -> subprocess.CompletedProcess[str]:
    program = Path(__file__).resolve().parents[1] / "utils/plot_losses.py"
    return subprocess.run(
        [sys.executable, str(program), *arguments, "--target", target], cwd=folder, capture_output=True, text=True
    )


def test_the_tool_draws_folders_files_and_logs(tmp_path: Path) -> None:
    (tmp_path / "pt").mkdir()
    state(tmp_path / "pt")
    log = "\r 4%|# | 20/90 [0:01<0:02]\r{'loss': 2.0, 'epoch': 0.1}\n\r 4%|# | 20/90 [0:01<0:02]"
    (tmp_path / "old.log").write_text(log, encoding="utf-8")
    done = plot_losses(tmp_path, "pt", "pt/trainer_state.json", "old.log", "--keys", "loss", "grad_norm")
    assert done.returncode == 0, done.stderr
    assert "old.log: no 'grad_norm' was logged" in done.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_tool_says_which_keys_there_are(tmp_path: Path) -> None:
    state(tmp_path)
    done = plot_losses(tmp_path, ".", "--keys", "los")
    assert done.returncode == 1
    assert "'los' was logged by none of the runs. They logged: eval_loss, eval_runtime, grad_norm" in done.stderr


@pytest.mark.parametrize("target", ["out.csv", "out", "out.png.gz"])
def test_the_tool_says_which_pictures_there_are(tmp_path: Path, target: str) -> None:
    state(tmp_path)
    done = plot_losses(tmp_path, ".", target=target)
    assert done.returncode == 1
    assert done.stderr.startswith(f"'{target}' is no picture") and ".png" in done.stderr
    assert done.stderr.count("\n") == 1
