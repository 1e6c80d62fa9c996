"""mini_qwen/zero_muon.py: DeepSpeed's Muon moves the weights as torch's does, on one process and on two."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MakeModel
from programs import Programs, losses, same_weights
from test_launch import LINUX, Two, run
from test_optimizer import MUON_RATE, config, is_layer_matrix, weights_of
from transformers import PreTrainedModel

from mini_qwen.checkpoint import verify
from mini_qwen.optimizer import make_optimizer, rate_of
from mini_qwen.zero_muon import why_not_here

KEYS = {"muon_learning_rate": 8e-3, "max_grad_norm": 0.0}


@pytest.fixture(autouse=True)
def eagerly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """DeepSpeed compiles its Muon, which takes longer than all these tests."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with torch.compiler.set_stance("force_eager"):
        yield


def zero_optimizer(model: PreTrainedModel, folder: Path) -> tuple[torch.optim.Optimizer, Any]:
    args = config(folder)
    args.muon_learning_rate = MUON_RATE
    args.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    return make_optimizer(model, args, MUON_RATE), args


@LINUX
def test_steps_are_those_of_torch(tiny_model: MakeModel, tmp_path: Path) -> None:
    """For wide, high and square matrices, up to the rounding of bf16 in the orthogonalization, with one decay."""
    model = tiny_model()
    twin, start = copy.deepcopy(model), weights_of(model)
    ours, theirs = zero_optimizer(model, tmp_path)[0], make_optimizer(twin, config(tmp_path), MUON_RATE)
    for _ in range(3):
        for weight, same in zip(model.parameters(), twin.parameters(), strict=True):
            weight.grad = torch.randn_like(weight)
            same.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    expected = weights_of(twin)
    for name, weight in weights_of(model).items():
        way = (expected[name] - start[name]).norm()
        assert (weight - expected[name]).norm() <= (0.03 if is_layer_matrix(name) else 1e-6) * way, name


@LINUX
def test_each_parameter_is_in_one_group_at_its_rate(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model()
    optimizer, args = zero_optimizer(model, tmp_path)
    names = {id(weight): name for name, weight in model.named_parameters()}
    grouped = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    for group in optimizer.param_groups:
        assert {weight.use_muon for weight in group["params"]} == {group["use_muon"]}
        assert all(is_layer_matrix(names[id(weight)]) == group["use_muon"] for weight in group["params"])
        assert rate_of(group, args) == group["lr"]
        decayed = 0.1 * MUON_RATE if group["use_muon"] else 0.0
        assert group["lr"] * group["weight_decay"] == pytest.approx(decayed)


@pytest.mark.parametrize(
    ("stage", "norm", "cure"),
    [(2, 0.0, None), (1, 0.0, "set it to 2"), (3, 0.0, "set it to 2"), (2, 1.0, "max_grad_norm: 0")],
)
def test_what_deepspeed_cannot_do_is_refused_with_the_cure(stage: int, norm: float, cure: str | None) -> None:
    reason = why_not_here(SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage), max_grad_norm=norm))
    assert reason is None if cure is None else cure in reason


@pytest.fixture(scope="module")
def two(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Two:
    return Two(tmp_path_factory.mktemp("two"), road)


@pytest.fixture
def trained(two: Two) -> Path:
    """The folder of six steps on two processes; made once."""
    folder = two.folder / "pt"
    if not folder.exists():
        done = run(two.command("pt", folder, **KEYS))
        assert done.code == 0, done.output[-6000:]
    return folder


@LINUX
def test_zero_2_learns_as_one_process_does(two: Two, trained: Path, programs: Programs) -> None:
    done = programs.run("pt", two.arguments("pt", two.folder / "one", batch_size=8, **KEYS))
    assert done.code == 0, done.output
    assert losses(trained) == pytest.approx(losses(two.folder / "one"), abs=1e-4)


@LINUX
def test_zero_2_resumes_bit_for_bit(two: Two, trained: Path, tmp_path: Path) -> None:
    verify(trained / "checkpoint-3")
    shutil.copytree(trained / "checkpoint-3", tmp_path / "checkpoint-3")
    done = run(two.command("pt", tmp_path, resume_from_checkpoint="true", **KEYS))
    assert done.code == 0, done.output[-6000:]
    assert same_weights(tmp_path, trained)
    assert losses(tmp_path) == losses(trained)
