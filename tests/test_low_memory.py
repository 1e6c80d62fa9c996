"""mini_qwen/low_memory.py and rounding.py: right on average, no update lost, the same after a resume."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MakeModel, saved_and_loaded
from hypothesis import given
from hypothesis import strategies as st
from programs import ROOT, STAGES, Programs, arguments, gradient_norms, losses, same_weights
from safetensors.torch import load_file
from transformers import PreTrainedModel

from bench.low_memory import plan
from mini_qwen.disk import optimizer_bytes
from mini_qwen.linear_head import CHUNK_NUMBERS
from mini_qwen.loss_head import add_loss_head
from mini_qwen.low_memory import LowMemoryAdamW, adds_without_bias, low_memory_optimizer, state_bytes, widen
from mini_qwen.rounding import BLOCK, MEAN, SQUARE, Code, decode, encode, join, round_to_bf16, split
from mini_qwen.run import check_launch
from mini_qwen.training import PTConfig

DRAWS = 20_000
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [40, 41, 42, 43, 44, 45]])
COMPUTED = ROOT / "bench" / "results" / "low_memory.json"
LOW_MEMORY = {"low_memory": "true", "muon_learning_rate": "null", "activation_checkpointing": "true"}


def mean_is_right(draws: torch.Tensor, value: float) -> bool:
    """Within five standard errors; where all draws are the same, exactly."""
    error = draws.double().std() / math.sqrt(len(draws))
    return abs(draws.double().mean() - value) <= 5 * error


def bf16_model(make: MakeModel, **sizes: int) -> PreTrainedModel:
    return make(**sizes).to(torch.bfloat16)


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(one.parameters(), other.parameters(), strict=True))


# Rounding


@pytest.mark.parametrize("value", [0.02, -0.0213, 1.001, -1.37, 3.1e-5, -4e-30, 0.0, 1.0, 60_000.5])
def test_bf16_rounded_at_random_is_right_on_average(value: float) -> None:
    torch.manual_seed(0)
    value = torch.tensor(value).item()  # as fp32 has it
    draws = round_to_bf16(torch.full((DRAWS,), value))
    assert draws.dtype == torch.bfloat16 and len(draws.unique()) <= 2
    assert mean_is_right(draws, value)
    assert (draws.float() - value).abs().max() <= abs(value) / 128


@pytest.mark.parametrize("value", [0.02, -0.0213, 1.001, -1.37, 3.1e-5, 0.0, 1 + 2**-8, -1 - 2**-8, 60_000.5])
def test_24_bits_are_right_on_average(value: float) -> None:
    torch.manual_seed(0)
    value = torch.tensor(value).item()
    high, low = split(torch.full((DRAWS,), value))
    draws = join(high, low)
    assert mean_is_right(draws, value)
    assert (draws - value).abs().max() <= abs(value) / 2**15
    assert (high.float() - draws).abs().max() <= abs(value) / 2**8  # high is the nearest bf16 number
    assert not (draws.view(torch.int32) & 0xFF).any()


@given(st.integers(-(2**15), 2**15 - 1), st.integers(0, 255))
def test_what_has_24_bits_stays_exactly(high: int, low: int) -> None:
    values = torch.tensor([(high << 16) + (low << 8)], dtype=torch.int32).view(torch.float32)
    if values.isfinite() and values.abs() < 3e38:
        assert torch.equal(join(*split(values)), values)


def test_the_worked_example() -> None:
    high, low = split(torch.tensor([1 + 2**-8]))
    assert (high.item(), low.item()) == (1.0078125, -128)


@pytest.mark.parametrize("code", [MEAN, SQUARE])
def test_codes_are_right_on_average(code: Code) -> None:
    torch.manual_seed(0)
    shares = [1.0, 0.97, 0.5, 0.1, 3e-3, 2.0**-code.octaves * 1.01]
    for share in shares:
        values = torch.full((DRAWS // 10, BLOCK), share * 7e-5)
        values[:, 0] = 7e-5
        codes, scale = encode(values, code, lowest=0)
        assert codes.max() == code.levels and torch.equal(scale, values[:, :1])
        assert len(codes[:, 1:].unique()) <= 2
        assert mean_is_right(decode(codes, scale, code)[:, 1], values[0, 1].item()), share


def test_below_the_lowest_code() -> None:
    """On average right where it may become 0; never 0 where one divides by it. What is 0 is 0 in both."""
    torch.manual_seed(0)
    values = torch.full((DRAWS, BLOCK), 2.0**-MEAN.octaves / 3)
    values[:, 0], values[:, 1] = 1.0, 0.0
    codes, scale = encode(values, MEAN, lowest=0)
    assert set(codes[:, 2].tolist()) == {0, 1} and not codes[:, 1].any()
    assert mean_is_right(decode(codes, scale, MEAN)[:, 2], values[0, 2].item())
    codes, _ = encode(values * 1e-9, SQUARE, lowest=1)
    assert codes[:, 2:].min() >= 1 and not codes[:, 1].any()
    codes, scale = encode(torch.zeros(2, BLOCK), SQUARE, lowest=1)
    assert not codes.any() and not decode(codes, scale, SQUARE).any()


def test_a_moment_follows_what_changes_by_less_than_a_step() -> None:
    """A squared gradient falls to a hundredth in all but one of a block's weights, at beta 0.999 by 0.1% a step.

    Rounded to the nearest code, 6.8% apart, such a moment would stay where it was for ever.
    """
    torch.manual_seed(0)
    square = torch.ones(1, BLOCK)
    now = torch.full((1, BLOCK), 0.01)
    now[:, 0] = 1.0
    codes, scale = encode(square, SQUARE, lowest=1)
    for _ in range(2000):
        square.lerp_(now, 1e-3)
        codes, scale = encode(decode(codes, scale, SQUARE).lerp_(now, 1e-3), SQUARE, lowest=1)
    found = decode(codes, scale, SQUARE)
    assert square[0, 1] < 0.15 and scale.item() == pytest.approx(1.0, rel=1e-3)
    assert found[0, 1:].mean().item() == pytest.approx(square[0, 1].item(), rel=0.1)


# Updates


@pytest.mark.parametrize("rate", [5e-7, 1e-5])
def test_no_update_is_lost(rate: float) -> None:
    """Weights as large as a model's, a gradient that always points the same way: each step is the learning rate."""
    torch.manual_seed(0)
    start = (torch.randn(64, 256) * 0.02).bfloat16()
    moved = {}
    for name, kind in {"plain": torch.optim.AdamW, "ours": LowMemoryAdamW}.items():
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=rate, weight_decay=0.0)
        for _ in range(50):
            weight.grad = torch.full_like(weight, 1e-3)
            optimizer.step()
        low = optimizer.state[weight].get("low")
        end = weight.detach().float() if low is None else join(weight.detach(), low)
        moved[name] = (start.float() - end).mean().item() / (50 * rate)
    assert moved["ours"] == pytest.approx(1.0, abs=0.02)
    assert moved["plain"] < 0.5


def test_vectors_follow_adamw_to_24_bits() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(1000).bfloat16(), torch.randn(20, 1000).bfloat16()
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    settings = {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer, reference = LowMemoryAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.float()
        optimizer.step()
        reference.step()
    found = join(ours.detach(), optimizer.state[ours]["low"].view_as(ours))
    assert ((found - theirs).abs() <= theirs.abs() * 20 * 2**-15 + 1e-6).all()


def test_matrices_follow_adamw(tiny_model: MakeModel) -> None:
    """Where AdamW with fp32 weights goes, at a rate at which plain bf16 hardly moves."""
    reference = bf16_model(tiny_model).float()
    start = [weight.detach().clone() for weight in reference.parameters()]
    ends = {}
    for name, kind in {"ours": LowMemoryAdamW, "plain": torch.optim.AdamW, "fp32": torch.optim.AdamW}.items():
        torch.manual_seed(0)
        model = copy.deepcopy(reference) if name == "fp32" else copy.deepcopy(reference).to(torch.bfloat16)
        optimizer = kind(model.parameters(), lr=1e-5, weight_decay=0.0)
        for _ in range(30):
            train_step(model, optimizer)
        if isinstance(optimizer, LowMemoryAdamW):
            widen(model, optimizer)
        ends[name] = [weight.detach().float() for weight in model.parameters()]

    def length(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        return torch.cat([(a - b).flatten() for a, b in zip(one, other, strict=True)]).norm().item()

    way = length(ends["fp32"], start)
    assert length(ends["ours"], ends["fp32"]) < 0.35 * way
    assert length(ends["plain"], ends["fp32"]) > 0.8 * way


def test_large_weights_are_updated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end within a part, too; each part gets its own gradient."""
    ends = []
    for chunk in (2**20, 3 * BLOCK):
        monkeypatch.setattr("mini_qwen.low_memory.CHUNK", chunk)
        weight = torch.nn.Parameter(torch.ones(10, BLOCK).bfloat16())
        optimizer = LowMemoryAdamW([weight], lr=0.5)
        weight.grad = torch.arange(10.0).sub(4.5)[:, None].expand(10, BLOCK).bfloat16()
        optimizer.step()
        ends.append(weight.detach().clone())
    assert torch.equal(*ends) and set(ends[0].unique().tolist()) == {0.5, 1.5}


def test_only_bf16_weights() -> None:
    with pytest.raises(ValueError, match=r"for bf16 weights, not torch\.float32"):
        LowMemoryAdamW([torch.nn.Parameter(torch.ones(2))], lr=1e-3)


@pytest.mark.parametrize("intermediate_size", [256, 99])
def test_state_bytes_are_exact(tiny_model: MakeModel, tmp_path: Path, intermediate_size: int) -> None:
    """Also of matrices without whole blocks."""
    model = bf16_model(tiny_model, hidden_size=64, intermediate_size=intermediate_size)
    optimizer = optimizer_of(model, tmp_path)
    train_step(model, optimizer)
    stored = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    trainer = SimpleNamespace(args=SimpleNamespace(low_memory=True), model=model, optimizer=optimizer)
    assert stored == state_bytes(model.parameters()) == optimizer_bytes(trainer)


def test_seven_bytes_a_weight(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = bf16_model(tiny_model, hidden_size=64, intermediate_size=256)
    optimizer = optimizer_of(model, tmp_path)
    train_step(model, optimizer)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    stored = sum(
        value.nbytes for weight in matrices for name, value in optimizer.state[weight].items() if name != "step"
    )
    count = sum(weight.numel() for weight in matrices)
    assert stored == count * 3 + count // BLOCK * 8


# Sums of gradients


def test_gradients_add_up_without_bias() -> None:
    """1 and then 1,000 times 1/1000: rounded to the nearest, all but the first few are lost."""
    torch.manual_seed(0)
    sums = {}
    for name in ("plain", "ours"):
        weight = torch.nn.Parameter(torch.zeros(40, BLOCK, dtype=torch.bfloat16))
        if name == "ours":
            weight.register_hook(adds_without_bias(weight))
        for number in range(1001):
            (weight * (1e-3 if number else 1.0)).sum().backward()
        assert weight.grad is not None
        sums[name] = weight.grad.float().mean().item()
    addend = torch.tensor(1e-3).bfloat16().item()
    assert sums["ours"] == pytest.approx(1 + 1000 * addend, rel=2e-3)
    assert sums["plain"] < 1.01


def optimizer_of(model: PreTrainedModel, folder: Path, **keys: Any) -> LowMemoryAdamW:
    args = PTConfig(output_dir=str(folder), report_to=[], learning_rate=1e-3, low_memory=True, **keys)
    return low_memory_optimizer(model, args)


def test_a_model_of_one_micro_batch_has_its_plain_gradients(tiny_model: MakeModel, tmp_path: Path) -> None:
    plain, hooked = bf16_model(tiny_model), bf16_model(tiny_model)
    optimizer_of(hooked, tmp_path)
    for model in (plain, hooked):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for ours, theirs in zip(hooked.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


def test_groups(tiny_model: MakeModel, tmp_path: Path) -> None:
    optimizer = optimizer_of(bf16_model(tiny_model), tmp_path, weight_decay=0.1)
    matrices, vectors = optimizer.param_groups
    assert {weight.ndim for weight in matrices["params"]} == {2} and {w.ndim for w in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


# fp16, as on a GPU without bf16


def fp16_args(precision: str) -> SimpleNamespace:
    rates = {"learning_rate": 1e-3, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    return SimpleNamespace(precision=precision, **rates)


def scaled_losses(model: PreTrainedModel, precision: str, steps: int, infinite_at: int | None = None) -> list[float]:
    """Of a training with two micro-batches a step, in the order in which the Trainer calls the parts."""
    torch.manual_seed(0)
    optimizer = low_memory_optimizer(model, fp16_args(precision))
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    losses = []
    for number in range(steps):
        for _ in range(2):
            with torch.autocast("cpu", torch.float16 if precision == "fp16" else torch.bfloat16):
                loss = model(input_ids=IDS, labels=IDS).loss
            scaler.scale(loss / 2).backward()
        if number == infinite_at:
            model.model.norm.weight.grad[0] = math.inf
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if number == infinite_at:
            torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fp16_trains_as_bf16_does(tiny_model: MakeModel) -> None:
    """With the loss scaled up, in autocast; a step whose gradient is infinite changes nothing."""
    bf16 = scaled_losses(bf16_model(tiny_model, hidden_size=64), "bf16", steps=12)
    fp16 = scaled_losses(bf16_model(tiny_model, hidden_size=64), "fp16", steps=13, infinite_at=5)
    assert bf16[-1] < 0.8 * bf16[0]
    assert fp16[5] == fp16[6]
    assert fp16[:6] + fp16[7:] == pytest.approx(bf16, rel=0.05)


def test_fp16_sums_up_in_fp32(tiny_model: MakeModel) -> None:
    model = bf16_model(tiny_model)
    low_memory_optimizer(model, fp16_args("fp16"))
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            model(input_ids=IDS, labels=IDS).loss.backward()
    assert {weight.grad.dtype for weight in model.parameters() if weight.grad is not None} == {torch.float32}


def test_fp16_gradients_of_the_chunked_head_are_the_plain_ones(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, of bf16 weights, with the loss scaled up; the chunks have 2 tokens."""
    plain, chunked = bf16_model(tiny_model), bf16_model(tiny_model)
    monkeypatch.setitem(CHUNK_NUMBERS, "cpu", 2 * plain.config.vocab_size)
    add_loss_head(chunked, equal_weights=True)
    for model in (plain, chunked):
        low_memory_optimizer(model, fp16_args("fp16"))
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=IDS, labels=IDS).loss
        (1024 * loss).backward()
    for ours, theirs in zip(chunked.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() <= 0.01 * theirs.grad.norm()


# Resuming


def test_a_loaded_state_goes_on_bit_for_bit(tiny_model: MakeModel, tmp_path: Path) -> None:
    """With torch's generator where it was."""
    model, resumed = bf16_model(tiny_model), bf16_model(tiny_model)
    optimizer, fresh = optimizer_of(model, tmp_path), optimizer_of(resumed, tmp_path)
    for _ in range(2):
        train_step(model, optimizer)
    resumed.load_state_dict(model.state_dict())
    fresh.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for one, its in ((model, optimizer), (resumed, fresh)):
        torch.manual_seed(8)
        for _ in range(3):
            train_step(one, its)
    assert same(model, resumed)
    ours, theirs = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # of the same types too


def test_another_state_of_the_generator_goes_on_differently(tiny_model: MakeModel, tmp_path: Path) -> None:
    """So that the test above says something of the generator."""
    ends = []
    for seed in (1, 2):
        model = bf16_model(tiny_model)
        optimizer = optimizer_of(model, tmp_path)
        torch.manual_seed(seed)
        train_step(model, optimizer)
        widen(model, optimizer)
        ends.append(model)
    assert not same(*ends)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_to_the_same_weights(road: Path, tmp_path: Path, programs: Programs, stage: str) -> None:
    shared = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 3} | LOW_MEMORY
    straight = arguments(stage, road, output_dir=tmp_path / "straight", **shared)
    broken = arguments(stage, road, output_dir=tmp_path / "broken", **shared)
    jobs: list[tuple[list[str], dict[str, Any]]] = [(straight, {}), (broken, {"kill_at_step": {"step": 5}})]
    done = programs.map(lambda job: programs.run(stage, job[0], **job[1]), jobs)
    assert [one.code for one in done] == [0, -9], done[0].output
    assert "bf16 weights and a byte more" in done[0].output
    resumed = programs.run(stage, [*broken, "--resume_from_checkpoint", "true"])
    assert resumed.code == 0 and f"going on from {tmp_path}/broken/checkpoint-4" in resumed.output
    assert same_weights(tmp_path / "broken", tmp_path / "straight")
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert gradient_norms(tmp_path / "broken") == gradient_norms(tmp_path / "straight")
    finished = load_file(tmp_path / "straight" / "model.safetensors")
    checkpoint = load_file(tmp_path / "straight" / "checkpoint-6" / "model.safetensors")
    for name, weight in finished.items():
        assert weight.dtype == torch.float32 and checkpoint[name].dtype == torch.bfloat16
        torch.testing.assert_close(weight, checkpoint[name].float(), rtol=2**-8, atol=0)
    assert any(not torch.equal(weight, checkpoint[name].float()) for name, weight in finished.items())
    assert json.loads((tmp_path / "straight" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


def test_reference_scores_out_of_the_cache_lead_to_the_same_weights(
    road: Path, tmp_path: Path, programs: Programs
) -> None:
    """Computing them draws a number, and low_memory rounds at random."""
    for name in ("computed", "cached"):
        argv = arguments("dpo", road, output_dir=tmp_path / name, cache_dir=tmp_path / "cache", **LOW_MEMORY)
        done = programs.run("dpo", argv)
        assert done.code == 0, done.output
        assert ("Computing reference log probs" in done.output) == (name == "computed")
    assert same_weights(tmp_path / "computed", tmp_path / "cached")


def test_evaluating_changes_nothing_of_what_is_learnt(road: Path, tmp_path: Path, programs: Programs) -> None:
    """Its rows are drawn by torch's generator, as the roundings are."""

    def train(strategy: str) -> Path:
        options = {"eval_strategy": strategy, "eval_steps": 2, "output_dir": tmp_path / strategy} | LOW_MEMORY
        assert programs.run("pt", arguments("pt", road, **options)).code == 0
        return tmp_path / strategy

    with_evaluations, without = programs.map(train, ["steps", "no"])
    history = json.loads((with_evaluations / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert sum("eval_loss" in entry for entry in history) > 2
    assert same_weights(with_evaluations, without)


def test_a_run_cannot_change_its_memory(road: Path, tmp_path: Path, programs: Programs) -> None:
    shared = {"save_strategy": "steps", "save_steps": 2}
    argv = arguments("pt", road, output_dir=tmp_path / "pt", **(shared | LOW_MEMORY))
    assert programs.run("pt", argv, kill_at_step={"step": 4}).code == -9
    plain = arguments("pt", road, output_dir=tmp_path / "pt", resume_from_checkpoint="true", **shared)
    done = programs.run("pt", plain)
    assert done.code == 1 and "low_memory was True, is False" in done.output
    changes = ["low_memory", "muon_learning_rate", "activation_checkpointing", "precision"]
    done = programs.run("pt", [*plain, "--allow_changes", *changes])
    assert done.code == 1 and "low_memory cannot change when a run goes on" in done.output


# Recipes


@pytest.mark.parametrize("name", ["pt", "sft", "dpo", "pt_t4"])
def test_receipts_tell_the_memory_as_it_is_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the planner, in the benchmark's record too; below the goals of 10 GB, for DPO 11."""
    monkeypatch.chdir(ROOT)
    receipt = (ROOT / "recipes" / "low_memory" / f"{name}.yaml").read_text(encoding="utf-8").partition("# Launch")[0]
    parts = json.loads(COMPUTED.read_text(encoding="utf-8"))["1B_computed_gb"][name]
    assert all(f"{size:.2f}" in receipt for size in parts.values())
    assert parts == plan(name)
    assert parts["sum"] + 0.5 < {"pt_t4": 14.5, "dpo": 11.0}.get(name, 10.0)


# Refusals


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"muon_learning_rate": 8e-3}, "leave muon_learning_rate and optim out"),
        ({"optim": "adamw_torch_4bit"}, "leave muon_learning_rate and optim out"),
        ({"precision": "fp32"}, "precision can be auto, bf16 or fp16"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PTConfig(output_dir=str(tmp_path), low_memory=True, **keys)


@pytest.mark.parametrize(("world_size", "plugin"), [(2, None), (1, object()), (2, object())])
def test_one_process_without_deepspeed(world_size: int, plugin: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINI_QWEN_NUM_PROCESSES", raising=False)
    args = SimpleNamespace(n_gpu=1, prepare_only=False, world_size=world_size, deepspeed_plugin=plugin)
    args.muon_learning_rate, args.low_memory = None, True
    with pytest.raises(SystemExit, match="low_memory works on one process, without DeepSpeed"):
        check_launch(args)
