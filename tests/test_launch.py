"""The documented launch commands, run for real: plain python, and DeepSpeed ZeRO-2 on two CPU processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SHARED = ["--logging_steps", "1", "--max_steps", "5", "--precision", "fp32", "--muon_learning_rate", "null"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def first_losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def two_cpu_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """accelerate_config.yaml with nothing changed but the machine: two CPU processes."""
    config = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("accelerate") / "two_cpu_processes.yaml"
    path.write_text(yaml.safe_dump({**config, "num_processes": 2, "use_cpu": True}), encoding="utf-8")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed runs on Linux")
def test_zero_2_on_two_processes_learns_as_one_process_does(two_cpu_processes: Path, tmp_path: Path) -> None:
    """PT, SFT and DPO in turn: the same global batch on one process and on two gives the same losses."""
    tokenizer = ["mini_qwen_tokenizer.py", "--config", "recipes/demo/tokenizer.yaml", "--vocab_size", "512"]
    tokenizer += ["--train_files", "mini_data/pt/news_media", "--eval_rows", "50", "--compare_with", "nowhere"]
    done = run([sys.executable, *tokenizer, "--output_dir", str(tmp_path / "tokenizer")])
    assert done.returncode == 0, done.stderr
    sizes = ["--vocab_size", "512", "--hidden_size", "64", "--num_hidden_layers", "2", "--learning_rate", "1e-3"]
    data = ["--train_files", "mini_data/pt/news_media", "--tokenizer", str(tmp_path / "tokenizer"), *sizes]
    before = {"pt": data, "sft": ["--checkpoint", str(tmp_path / "one" / "pt")]}
    # The sigmoid loss alone, as in the full recipe: TRL averages its "sft" term over each process's own tokens.
    before["dpo"] = ["--checkpoint", str(tmp_path / "one" / "sft"), "--max_length", "320"]
    before["dpo"] += ["--loss_type", "sigmoid", "--loss_weights", "1.0"]
    for stage, arguments in before.items():
        cache = ["--cache_dir", str(tmp_path / "cache")]
        command = [f"mini_qwen_{stage}.py", "--config", f"recipes/demo/{stage}.yaml", *SHARED, *cache, *arguments]
        for processes, launcher, batch in [
            ("one", [sys.executable], "8"),
            (
                "two",
                [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(two_cpu_processes)],
                "4",
            ),
        ]:
            folder = tmp_path / processes / stage
            size = ["--per_device_train_batch_size", batch, "--output_dir", str(folder)]
            done = run([*launcher, *command, *size], DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        two = json.loads((tmp_path / "two" / stage / "run.json").read_text(encoding="utf-8"))
        assert two["device"].startswith("2 x")
        one_losses, two_losses = first_losses(tmp_path / "one" / stage), first_losses(tmp_path / "two" / stage)
        assert len(one_losses) == 5
        assert two_losses == pytest.approx(one_losses, abs=1e-4), stage


def test_demo_scripts_work_from_any_folder(tmp_path: Path) -> None:
    """They run the real stage with its demo recipe and hand on what follows; here a key that does not exist."""
    for stage in ("pt", "sft", "dpo"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "demo" / f"demo_{stage}.py"), "--no_such_key", "1"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "Unknown recipe key 'no_such_key'" in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_run_sh_explains_itself_and_refuses_what_it_does_not_know() -> None:
    done = run(["bash", "run.sh", "help"])
    assert done.returncode == 0 and "bash run.sh demo" in done.stdout
    done = run(["bash", "run.sh", "trian"])
    assert done.returncode == 1 and "unknown command 'trian'" in done.stderr


@pytest.mark.slow
def test_the_demo_meets_its_figures() -> None:
    """The whole road of the README, about three minutes on 2 idle cores; writes demo_results/."""
    done = subprocess.run(["bash", "run.sh", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((ROOT / "demo_results" / "results.json").read_text(encoding="utf-8"))
    pt, sft, dpo = results["checkpoints"]
    assert pt["bits_per_byte"] <= 0.6 * pt["unigram_bits_per_byte"]
    assert pt["accuracy_new_wording"] <= 0.05
    assert sft["accuracy_new_wording"] >= 0.8
    assert sft["stop_rate"] > pt["stop_rate"]
    assert sft["repetition_4gram"] < pt["repetition_4gram"]
    assert dpo["preference_accuracy"] > sft["preference_accuracy"]
    assert dpo["preference_margin"] > sft["preference_margin"]
    assert dpo["accuracy_new_wording"] >= sft["accuracy_new_wording"] - sft["standard_error_new_wording"]
