"""The documented launch commands, run for real: what they train, and how they end."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from programs import STAGES, Done, Programs, gradient_norms, losses, same_weights
from programs import arguments as small_arguments
from safetensors.torch import load_file

from mini_qwen.checkpoint import verify
from mini_qwen.launch import exit_code

ROOT = Path(__file__).resolve().parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed runs on Linux")
SHARED = {"logging_steps": 1, "max_steps": 6, "precision": "fp32", "muon_learning_rate": "null"}
SHARED |= {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(command: list[str], timeout: float = 300) -> Done:
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, env=environment()
    )
    return Done(done.returncode, done.stdout.decode(errors="replace"))


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that have the folder among their arguments and have not ended."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if str(folder) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_for_end_of_all(folder: Path, seconds: float = 10) -> list[psutil.Process]:
    """Those of the folder that are still there after so long."""
    ends_at = time.monotonic() + seconds
    while (left := processes_of(folder)) and time.monotonic() < ends_at:
        time.sleep(0.1)
    return left


class Two:
    """Stages on two CPU processes under DeepSpeed ZeRO-2, with accelerate_config.yaml but for the machine."""

    def __init__(self, folder: Path, road: Path, **machine: Any) -> None:
        self.folder, self.road = folder, road
        config = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text(encoding="utf-8"))
        self.machine = folder / "machine.yaml"
        text = yaml.safe_dump(config | {"num_processes": 2, "use_cpu": True} | machine)
        self.machine.write_text(text, encoding="utf-8")

    def arguments(self, stage: str, output_dir: Path, batch_size: int, **options: Any) -> list[str]:
        # The sigmoid loss alone, as in the full recipe: TRL averages its "sft" term over each process's own tokens.
        dpo = {"loss_type": "sigmoid", "loss_weights": 1.0} if stage == "dpo" else {}
        sizes = {"output_dir": output_dir, "per_device_train_batch_size": batch_size}
        return small_arguments(stage, self.road, **(SHARED | dpo | sizes | options))

    def command(self, stage: str, output_dir: Path, faults: dict[str, Any] | None = None, **options: Any) -> list[str]:
        script = f"mini_qwen_{stage}.py"
        words = [script] if faults is None else ["tests/faults.py", json.dumps(faults), script]
        launcher = [sys.executable, "-m", "mini_qwen.launch", "--num_processes", "2"]
        return [
            *launcher,
            "--config_file",
            str(self.machine),
            *words,
            *self.arguments(stage, output_dir, 4, **options),
        ]


@pytest.fixture(scope="module")
def two(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Two:
    return Two(tmp_path_factory.mktemp("two"), road)


@pytest.fixture(scope="module")
def trained(two: Two, programs: Programs) -> Path:
    """Folders one/STAGE and two/STAGE: the same global batch on one process and on two."""
    for stage in STAGES:
        done = programs.run(stage, two.arguments(stage, two.folder / "one" / stage, batch_size=8))
        assert done.code == 0, done.output
        done = run(two.command(stage, two.folder / "two" / stage))
        assert done.code == 0, done.output[-6000:]
    return two.folder


@LINUX
@pytest.mark.parametrize("stage", STAGES)
def test_zero_2_on_two_processes_learns_as_one_process_does(trained: Path, stage: str) -> None:
    record = json.loads((trained / "two" / stage / "run.json").read_text(encoding="utf-8"))
    assert record["device"].startswith("2 x")
    one_losses, two_losses = losses(trained / "one" / stage), losses(trained / "two" / stage)
    assert len(one_losses) == 6
    assert two_losses == pytest.approx(one_losses, abs=1e-4)


@LINUX
@pytest.mark.parametrize("stage", STAGES)
def test_zero_2_resumes_bit_for_bit(two: Two, trained: Path, tmp_path: Path, stage: str) -> None:
    """From a checkpoint in which DeepSpeed's own files were read without running code from them."""
    checkpoint = trained / "two" / stage / "checkpoint-3"
    names = set(verify(checkpoint)["files"])
    assert len([name for name in names if name.endswith("optim_states.pt")]) == 2
    assert not [name for name in names if name.endswith((".py", "training_args.bin"))]
    shutil.copytree(checkpoint, tmp_path / stage / "checkpoint-3")
    done = run(two.command(stage, tmp_path / stage, resume_from_checkpoint="true"))
    assert done.code == 0, done.output[-6000:]
    assert f"going on from {tmp_path}/{stage}/checkpoint-3" in done.output
    assert same_weights(tmp_path / stage, trained / "two" / stage)
    assert losses(tmp_path / stage) == losses(trained / "two" / stage)
    assert gradient_norms(tmp_path / stage) == gradient_norms(trained / "two" / stage)


@LINUX
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.soak)])
def test_two_processes_stop_together_behind_one_checkpoint(two: Two, trained: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "pt"
    done = run(two.command("pt", folder, faults={"signal_launcher": {"step": 2, "name": name}}))
    assert done.code == 75, done.output[-6000:]
    assert not wait_for_end_of_all(folder)
    assert "Traceback" not in done.output
    assert f"{name}: stopping at the next step border" in done.output
    (checkpoint,) = folder.glob("checkpoint-*")
    assert checkpoint.name in ("checkpoint-2", "checkpoint-3")
    verify(checkpoint)
    assert not (folder / "manifest.json").exists() and not (folder / "model.safetensors").exists()
    if name == "SIGINT":
        return
    done = run(two.command("pt", folder, resume_from_checkpoint="true"))
    assert done.code == 0, done.output[-6000:]
    assert same_weights(folder, trained / "two" / "pt")


@LINUX
def test_no_process_outlives_a_launcher_that_is_killed(two: Two, tmp_path: Path) -> None:
    folder = tmp_path / "pt"
    kill = {"signal_launcher": {"step": 3, "name": "SIGKILL"}}
    done = run(two.command("pt", folder, faults=kill, max_steps=100_000, save_total_limit=2))
    assert done.code == -9
    assert not wait_for_end_of_all(folder)
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    verify(newest)


@LINUX
def test_what_is_not_finite_on_any_rank_stops_all(two: Two, tmp_path: Path) -> None:
    folder = tmp_path / "pt"
    done = run(two.command("pt", folder, faults={"nan_loss": {"step": 4, "rank": 1}}))
    assert done.code == 1, done.output[-6000:]
    assert not wait_for_end_of_all(folder)
    assert re.search(r"Step 4, rank 1: the loss is nan.*This came from rows \d+", done.output)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    verify(folder / "checkpoint-3")
    weights = load_file(folder / "checkpoint-3" / "model.safetensors").values()
    assert all(torch.isfinite(weight).all() for weight in weights)


def test_fewer_processes_than_asked_for_is_an_error(road: Path, tmp_path: Path) -> None:
    """accelerate starts one process for this machine file, whatever number it is given, and says nothing."""
    two = Two(tmp_path, road, distributed_type="MULTI_CPU", deepspeed_config={})
    done = run(two.command("pt", tmp_path / "pt"))
    assert done.code == 1
    assert "2 processes were asked for, and this one is 1 of 1" in done.output
    assert not (tmp_path / "pt").exists()


def test_codes_of_several_processes() -> None:
    assert exit_code([75, 75]) == exit_code([75, -15]) == exit_code([-15]) == 75
    assert exit_code([-15, 1]) == exit_code([75, 1]) == 1
    assert exit_code([-9]) == exit_code([-9, 75]) == 137  # out of memory: starting it again would not help


COMMANDS = {
    "python": [sys.executable, "mini_qwen_pt.py"],
    "demo": [sys.executable, "demo/demo_pt.py"],
    "launch": [sys.executable, "-m", "mini_qwen.launch", "--num_processes", "1", "mini_qwen_pt.py"],
    "run.sh": ["bash", "run.sh", "pt"],
}


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Programs that are ended with the test, if they have not ended before."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def stop_under_way(
    command: list[str], argv: list[str], send: Any, started: list[subprocess.Popen[str]]
) -> tuple[int, str]:
    """Start a program as a shell does, wait for its first losses, `send` it a signal; its exit code and words."""
    process = subprocess.Popen(
        [*command, *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment(),
        start_new_session=True,
    )
    started.append(process)
    assert process.stdout is not None
    said = ""
    while said.count("'loss'") < 3 and (line := process.stdout.readline()):
        said += line
    send(process.pid)
    rest = process.stdout.read()
    return process.wait(timeout=30), said + rest


def test_every_command_stops_behind_a_checkpoint_with_code_75(
    road: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """`kill` reaches the command that was typed, Ctrl-C all its processes."""
    ways = [(way, name) for way in COMMANDS for name in ("kill", "Ctrl-C")]
    if not (ROOT / ".venv" / "installed").is_file():  # run.sh would install it
        ways = [(way, name) for way, name in ways if way != "run.sh"]

    def stop(way_and_name: tuple[str, str]) -> None:
        way, name = way_and_name
        folder = tmp_path / f"{way} {name}"
        argv = small_arguments("pt", road, output_dir=folder, max_steps=100_000, dataloader_num_workers=1)
        kill, number = (os.kill, signal.SIGTERM) if name == "kill" else (os.killpg, signal.SIGINT)
        code, said = stop_under_way(COMMANDS[way], argv, lambda pid: kill(pid, number), started)
        assert code == 75, said[-3000:]
        assert not wait_for_end_of_all(folder)
        (step,) = re.findall(r"stopped at step ([\d,]+)", said)
        (checkpoint,) = folder.glob("checkpoint-*")
        assert checkpoint.name == f"checkpoint-{step.replace(',', '')}"
        verify(checkpoint)
        assert not (folder / "manifest.json").exists()

    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(stop, ways))) >= 6


def test_a_stage_does_not_outlive_run_sh(road: Path, tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    if not (ROOT / ".venv" / "installed").is_file():
        pytest.skip("run.sh has not made .venv")
    argv = small_arguments("pt", road, output_dir=tmp_path / "pt", max_steps=100_000)
    code, _ = stop_under_way(COMMANDS["run.sh"], argv, lambda pid: os.kill(pid, signal.SIGKILL), started)
    assert code == -9
    assert not wait_for_end_of_all(tmp_path / "pt")
    verify(next((tmp_path / "pt").glob("checkpoint-*")))


def test_a_terminal_that_is_closed(road: Path, tmp_path: Path) -> None:
    """Its program gets SIGHUP, and an error for every word that it says from then on."""
    argv = small_arguments("pt", road, output_dir=tmp_path / "pt", max_steps=100_000, dataloader_num_workers=1)
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "mini_qwen_pt.py", *argv], environment())
    said = b""
    while said.count(b"'loss'") < 3:
        said += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert not wait_for_end_of_all(tmp_path / "pt")
    (checkpoint,) = (tmp_path / "pt").glob("checkpoint-*")
    verify(checkpoint)


def run_sh_with(python: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start `bash run.sh pt --seed 7` in a folder of its own, where two GPUs are seen and python is this script."""
    for name in ("run.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / ".venv" / "bin" / "python").write_text("#!/bin/bash\n" + python)
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    stamp = "cat pyproject.toml constraints.txt | cksum >.venv/installed"
    subprocess.run(["bash", "-c", stamp], cwd=folder, check=True)
    gpus = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    return subprocess.Popen(["bash", "run.sh", "pt", "--seed", "7"], cwd=folder, env=gpus, start_new_session=True)


@pytest.mark.parametrize("code", [0, 1, 75])
def test_run_sh_prepares_before_it_launches_one_process_for_each_gpu(tmp_path: Path, code: int) -> None:
    """Data that is refused, or a preparation that is stopped, ends it."""
    python = f'echo "$@" >>called\n[[ "$*" == *prepare_only* ]] && exit {code}\nexit 0\n'
    assert run_sh_with(python, tmp_path).wait(timeout=20) == code
    called = (tmp_path / "called").read_text().splitlines()
    assert called[0] == "mini_qwen_pt.py --seed 7 --prepare_only true"
    assert called[1:] == ["-m mini_qwen.launch --num_processes 2 mini_qwen_pt.py --seed 7"] * (code == 0)


def test_a_second_ctrl_c_to_run_sh_does_not_wait(tmp_path: Path) -> None:
    process = run_sh_with("trap 'touch asked' TERM\ntouch begun\nwhile true; do sleep 0.1; done\n", tmp_path)
    for file in ("begun", "asked"):  # the first Ctrl-C asks, as `kill` does
        while not (tmp_path / file).exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=5) == 128 + signal.SIGKILL


def test_demo_scripts_work_from_any_folder(tmp_path: Path) -> None:
    """They run the real stage with its demo recipe and hand on what follows; here a key that does not exist."""

    def start(stage: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "demo" / f"demo_{stage}.py"), "--no_such_key", "1"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(start, STAGES):
            assert done.returncode == 1
            assert "Unknown recipe key 'no_such_key'" in done.stderr
            assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_run_sh_explains_itself_and_refuses_what_it_does_not_know() -> None:
    done = run(["bash", "run.sh", "help"])
    assert done.code == 0 and "bash run.sh demo" in done.output
    done = run(["bash", "run.sh", "trian"])
    assert done.code == 1 and "unknown command 'trian'" in done.output


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
    assert dpo["bits_per_byte"] <= 1.1 * sft["bits_per_byte"]
