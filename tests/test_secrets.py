"""No secret that a program is given turns up in what it writes, says, or calls other programs with."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from programs import ROOT, STAGES, Programs, arguments

SECRET = "hf_PlantedSecretPlantedSecretPlanted"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "MODELSCOPE_API_TOKEN")


def run_and_watch(command: list[str], folder: Path) -> tuple[str, set[str]]:
    """Run a program with secrets in its environment; what it said, and all command lines of its processes."""
    lines: set[str] = set()
    with (folder / "said").open("w") as said:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict.fromkeys(VARIABLES, SECRET)}
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    lines.add(" ".join(member.cmdline()))
                except psutil.Error:
                    continue
            time.sleep(0.02)
    assert process.returncode == 0, (folder / "said").read_text()
    return (folder / "said").read_text(encoding="utf-8"), lines


def test_a_run_writes_and_says_no_secret(road: Path, tmp_path: Path) -> None:
    argv = arguments("sft", road, output_dir=tmp_path / "sft", save_strategy="steps", save_steps=3)
    said, lines = run_and_watch([sys.executable, "mini_qwen_sft.py", *argv], tmp_path)
    assert len(lines) >= 1 and "wrote" in said
    assert not any(SECRET in text for text in [said, *lines])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"run.json", "manifest.json", "fingerprint.json", "optimizer.pt"} <= {file.name for file in files}
    for file in files:
        assert SECRET.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("key", ["hub_token", "api_key", "api_keys", "wandb_token", "password"])
def test_a_secret_as_an_argument_is_refused_and_not_repeated(
    road: Path, programs: Programs, stage: str, key: str
) -> None:
    done = programs.run(stage, [*arguments(stage, road), f"--{key}", SECRET])
    assert done.code == 1
    assert f"ecipe key '{key}'" in done.output
    assert SECRET not in done.output


def test_a_value_that_is_no_secret_is_still_shown(road: Path, programs: Programs) -> None:
    done = programs.run("pt", [*arguments("pt", road), "--learning_rat", "3"])
    assert "'learning_rat' (value '3')" in done.output
