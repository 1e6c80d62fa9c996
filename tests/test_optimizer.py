"""mini_qwen/optimizer.py: exactly Muon on the matrices and AdamW on the rest, scheduled and saved as one."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import MakeModel, saved_and_loaded
from transformers import PreTrainedModel

from mini_qwen.optimizer import MuonWithAdamW, make_optimizer
from mini_qwen.training import PTConfig

RATES = {"learning_rate": 3e-3, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95}
MUON_RATE = 0.02
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [40, 41, 42, 43, 44, 45]])


def config(folder: Path) -> PTConfig:
    return PTConfig(output_dir=str(folder), report_to=[], **RATES)


def optimizer_of(model: PreTrainedModel, folder: Path) -> MuonWithAdamW:
    optimizer = make_optimizer(model, config(folder), MUON_RATE)
    assert isinstance(optimizer, MuonWithAdamW)
    return optimizer


def train_step(model: PreTrainedModel, *optimizers: torch.optim.Optimizer) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def is_layer_matrix(name: str) -> bool:
    return name.endswith("proj.weight")


def test_a_rate_of_none_leaves_the_choice_to_the_trainer(tiny_model: MakeModel, tmp_path: Path) -> None:
    assert make_optimizer(tiny_model(), config(tmp_path), None) is None


def test_one_step_moves_every_parameter(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model()
    before = weights_of(model)
    train_step(model, optimizer_of(model, tmp_path))
    for name, weight in weights_of(model).items():
        assert not torch.equal(weight, before[name]), name


def test_each_parameter_is_in_one_part(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model()
    names = {id(weight): name for name, weight in model.named_parameters()}
    matrices, others = (
        [names[id(weight)] for weight in group["params"]] for group in optimizer_of(model, tmp_path).param_groups
    )
    assert all(is_layer_matrix(name) for name in matrices)
    assert not any(is_layer_matrix(name) for name in others)
    assert len(matrices) == 2 * 7  # q, k, v, o, gate, up and down of two layers
    assert sorted(matrices + others) == sorted(names.values())


def test_updates_are_muons_and_adamws_own(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model()
    twin = copy.deepcopy(model)
    named = list(twin.named_parameters())
    muon = torch.optim.Muon(
        [weight for name, weight in named if is_layer_matrix(name)],
        lr=MUON_RATE,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    others = [weight for name, weight in named if not is_layer_matrix(name)]
    adamw = torch.optim.AdamW(others, lr=3e-3, betas=(0.8, 0.95), weight_decay=0.0)
    optimizer = optimizer_of(model, tmp_path)
    for _ in range(3):
        train_step(model, optimizer)
        train_step(twin, muon, adamw)
    expected = weights_of(twin)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("keys", [{"optim": "sgd"}, {"optim_args": "momentum=0.9"}])
def test_another_optimizer_beside_muon_is_refused(tmp_path: Path, keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="brings its own optimizers; leave optim and optim_args out"):
        PTConfig(output_dir=str(tmp_path), muon_learning_rate=MUON_RATE, **keys)
    assert PTConfig(output_dir=str(tmp_path), **keys).muon_learning_rate is None


def test_a_loaded_state_goes_on_bit_for_bit(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = optimizer_of(model, tmp_path)
    for _ in range(2):
        train_step(model, optimizer)
    resumed = copy.deepcopy(model)
    state = saved_and_loaded(optimizer.state_dict())
    fresh = optimizer_of(resumed, tmp_path)
    fresh.load_state_dict(state)
    for _ in range(3):
        train_step(model, optimizer)
        train_step(resumed, fresh)
    expected = weights_of(model)
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, expected[name]), name


def test_without_its_state_it_would_go_on_differently(tiny_model: MakeModel, tmp_path: Path) -> None:
    """So that the test above says something: both parts have a memory."""
    model = tiny_model()
    optimizer = optimizer_of(model, tmp_path)
    train_step(model, optimizer)
    forgetful = copy.deepcopy(model)
    fresh = optimizer_of(forgetful, tmp_path)
    train_step(model, optimizer)
    train_step(forgetful, fresh)
    other = weights_of(forgetful)
    assert all(not torch.equal(weight, other[name]) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("loaded", [False, True])
def test_a_schedule_changes_the_rates_of_both_parts(tiny_model: MakeModel, tmp_path: Path, loaded: bool) -> None:
    """A factor of 0 must stop every parameter, also after a state has been loaded."""
    model = tiny_model()
    optimizer = optimizer_of(model, tmp_path)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.0][step])
    assert [group["lr"] for group in optimizer.param_groups] == [MUON_RATE, 3e-3]
    train_step(model, optimizer)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [MUON_RATE / 2, 1.5e-3]
    if loaded:
        optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    schedule.step()
    before = weights_of(model)
    train_step(model, optimizer)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name]), name


def test_frozen_parameters_stay_out(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = weights_of(model)
    train_step(model, optimizer_of(model, tmp_path))
    stayed = {name for name, weight in weights_of(model).items() if torch.equal(weight, before[name])}
    assert stayed == {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
