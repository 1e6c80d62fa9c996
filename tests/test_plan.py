"""The plan of a run: exact where it can be, checked against real models, real logs and recorded measurements."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.trainer.utils import compute_flops_per_token

from mini_qwen.disk import OTHER_FILES
from mini_qwen.plan import Machine, Run, sweep
from mini_qwen.plan_cures import Cure, cures
from mini_qwen.plan_memory import Compute, Step, activation_bytes, head_bytes, layer_bytes, memory
from mini_qwen.plan_parameters import count_parameters
from mini_qwen.plan_time import GPUS, Network, communication_seconds, flops_per_token, num_steps
from utils.plan import main

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench/results/plan.json"
FULL = Qwen2Config(
    hidden_size=1024,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=4,
    intermediate_size=4864,
    vocab_size=151936,
    tie_word_embeddings=True,
)
SMALL = Qwen2Config(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=176,
    vocab_size=512,
    tie_word_embeddings=True,
    use_cache=False,
)
# The run that the full recipe repeats, from its logs: blocks, pairs, micro-batches and times.
SEED = Run(
    FULL, rows=15_579_216, tokens=15_579_216 * 1024, micro=12, accumulation=16, length=1024, state_bytes=8 * 10**9
)
SEED_SECONDS, SEED_MFU = 88_784, 0.200
H800 = Machine(GPUS["H800"], gpus=6, zero=2)

Plan = Callable[..., str]


def resized(config: Qwen2Config, **changes: object) -> Qwen2Config:
    values = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    return Qwen2Config(**(values | changes))


def test_the_full_recipe_has_its_parameters() -> None:
    assert count_parameters(FULL) == 998_810_624


@settings(max_examples=25)
@given(
    head=st.sampled_from([2, 8, 10]),
    keys=st.integers(1, 3),
    groups=st.integers(1, 3),
    layers=st.integers(1, 3),
    inner=st.integers(1, 50),
    vocabulary=st.integers(2, 99),
    tied=st.booleans(),
    own_head=st.booleans(),
)
def test_parameters_are_exact(
    head: int, keys: int, groups: int, layers: int, inner: int, vocabulary: int, tied: bool, own_head: bool
) -> None:
    config = Qwen2Config(
        hidden_size=head * keys * groups,
        num_hidden_layers=layers,
        num_attention_heads=keys * groups,
        num_key_value_heads=keys,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        **({"head_dim": 2 * head} if own_head else {}),
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    assert count_parameters(config) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("length", [64, 1024])
def test_flops_are_those_of_the_palm_convention(length: int) -> None:
    assert flops_per_token(FULL, length) == compute_flops_per_token(FULL, length)
    assert flops_per_token(FULL, 1024) == pytest.approx(6.596e9, rel=1e-3)


def saved_bytes(config: Qwen2Config, compute: Compute, masked: bool, checkpointing: bool = False) -> int:
    """Counted: what autograd keeps of 2 rows of 128 tokens, each storage once, without weights and the head."""
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").train()
    model = model.bfloat16() if compute == "half" else model
    if checkpointing:
        model.activation_checkpointing_enable()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.ones(2, 128, dtype=torch.long)
    positions = torch.cat([torch.arange(50), torch.arange(78)]) if masked else torch.arange(128)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        last = model.base_model(input_ids=ids, position_ids=positions.expand(2, 128)).last_hidden_state
    assert last.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("compute", ["fp32", "autocast", "half"])
def test_a_layer_saves_what_the_plan_says(compute: Compute, masked: bool) -> None:
    """To the byte: the difference that one layer more makes, with the weights that autocast casts for it."""
    deeper = resized(SMALL, num_hidden_layers=3)
    counted = saved_bytes(deeper, compute, masked) - saved_bytes(SMALL, compute, masked)
    step = Step(rows=2, length=128, compute=compute, masked=masked)
    cast_weights = 2 * 64 * (2 * 64 + 2 * 32 + 3 * 176) if compute == "autocast" else 0
    assert counted == step.tokens * layer_bytes(SMALL, step) + cast_weights


@pytest.mark.parametrize("compute", ["fp32", "half"])
def test_checkpointing_saves_what_enters_each_layer(compute: Compute) -> None:
    step = Step(rows=2, length=128, compute=compute, checkpointing=True)
    # Beside it, the sines and cosines of all positions, and the tokens' ids.
    assert saved_bytes(SMALL, compute, False, checkpointing=True) == pytest.approx(
        activation_bytes(SMALL, step), abs=256 * (2 * 16 * 4 + 16)
    )


def test_bytes_worked_out_by_hand() -> None:
    config = resized(SMALL, hidden_size=4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=6)
    config = resized(config, vocab_size=10, num_hidden_layers=1)
    # A token: two norms of 4 numbers twice and one more, the inputs of q, k, v and of gate, up (4 + 4), queries and
    # the attention's result (4 + 4), key and value (2 + 2), the MLP (4 x 6), sums of two heads.
    token = 4 * (2 * (8 + 1) + 8 + 8 + 4 + 24 + 2)
    step = Step(rows=1, length=3, compute="fp32", chunk_numbers=20)
    assert layer_bytes(config, step) == token
    assert activation_bytes(config, step) == 3 * (token + 4 * 9)
    # Full: three fp32 copies of 3 x 10 logits, and the head's input. Chunked, 2 tokens at a time: their logits, and
    # without Triton's kernels their probabilities; the head's gradient; four copies of 3 x 4 numbers.
    assert head_bytes(config, replace(step, loss_head="full")) == 3 * 4 * 30 + 4 * 12
    assert head_bytes(config, step) == 4 * 20 + 4 * 40 + 16 * 12
    assert head_bytes(config, replace(step, row_kernels=False)) == 8 * 20 + 4 * 40 + 16 * 12
    assert head_bytes(config, replace(step, chunk_numbers=30)) == 4 * 30 + 4 * 40 + 16 * 12


def test_zero_shares_what_it_says() -> None:
    step = Step(rows=1, length=128, compute="half", accumulation=2)
    weights = count_parameters(FULL)
    plain = memory(FULL, replace(step, compute="autocast"), 8 * weights)
    assert (plain["weights"], plain["gradients"], plain["optimizer"]) == (4 * weights, 4 * weights, 8 * weights)
    assert plain["weights cast to 2 bytes"] == 2 * 998_637_568
    for zero, shares in ((1, (1, 1)), (2, (1, 8)), (3, (8, 8))):
        parts = memory(FULL, step, 8 * weights, zero, gpus=8)
        assert parts["weights"] == 2 * weights // shares[0], zero
        assert parts["gradients"] == 2 * weights // shares[1], zero
        assert parts["optimizer"] == 12 * weights // 8, zero
    static = memory(FULL, step, 8 * weights, zero=2, gpus=6)
    assert sum(static[part] for part in ("weights", "gradients", "optimizer")) == pytest.approx(4.33e9, rel=1e-3)


def test_low_memory_is_seven_bytes_a_weight() -> None:
    """Nine in fp16, whose gradients are fp32; weights are cast for each product, and the stream is fp32."""
    weights = count_parameters(FULL)
    run = replace(SEED, half_weights=True, state_bytes=3 * weights, micro=1, accumulation=192)
    bf16, fp16 = (run.memory(Machine(GPUS[name])) for name in ("H100", "T4"))
    for parts, width in ((bf16, 7), (fp16, 9)):
        assert parts["weights"] + parts["gradients"] + parts["optimizer"] == width * weights
    assert [parts["weights cast to 2 bytes"] for parts in (bf16, fp16)] == [0, 2 * 998_637_568]
    assert fp16["activations"] > bf16["activations"]
    assert replace(run, precision="fp16").memory(Machine(GPUS["H100"])) == fp16
    spared = replace(run, checkpointing=True).memory(Machine(GPUS["T4"]))
    layer = 2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4864
    assert spared["weights cast to 2 bytes"] == 2 * (layer + 151_936 * 1024)


def test_more_work_never_needs_less() -> None:
    for compute in ("fp32", "autocast", "half"):
        totals = [
            sum(memory(SMALL, Step(rows, 128, compute, accumulation=2, loss_head=head), 8).values())  # type: ignore
            for head in ("chunked", "full")
            for rows in (64, 128, 256)
        ]
        assert totals[:3] == sorted(totals[:3]) and totals[3:] == sorted(totals[3:])
        assert all(full >= chunked for chunked, full in zip(totals[:3], totals[3:], strict=True))


def test_the_record_is_of_this_plan_and_within_a_tenth() -> None:
    """Peaks of three sizes and both heads, measured by bench/plan.py."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    peaks = record["peaks"]
    assert len({peak["size"] for peak in peaks}) >= 3 and {peak["loss_head"] for peak in peaks} == {"full", "chunked"}
    for peak in peaks:
        config = Qwen2Config(**peak["config"])
        options = {key: peak[key] for key in ("rows", "length", "masked", "checkpointing", "loss_head")}
        step = Step(compute="fp32", accumulation=2, chunk_numbers=2**25, row_kernels=False, **options)
        forecast = sum(memory(config, step, 8 * count_parameters(config)).values()) / 1e6
        assert forecast == pytest.approx(peak["forecast_mb"], abs=0.1), "run bench/plan.py again"
        assert 0.9 < forecast / peak["measured_mb"] < 1.1, peak
    assert all(0.99 < saved["ratio"] < 1.01 for saved in record["saved_by_autograd"])


@pytest.mark.parametrize(
    ("rows", "micro", "epochs", "steps"),
    [
        (15_579_216, 12, 1, 13_523),
        (94_201, 12, 1, 81),
        (132_801, 12, 1, 115),
        (267_888, 12, 1, 232),
        (59_438, 4, 3, 462),
    ],
)
def test_steps_of_the_logged_runs(rows: int, micro: int, epochs: int, steps: int) -> None:
    """Rows, micro-batch and steps of five runs of the seed: 6 GPUs, 16 micro-batches a step, transformers 4.45."""
    assert num_steps(rows, micro, 16, 6, epochs, drop_rest=True) == steps
    assert num_steps(rows, micro, 16, 6, epochs) == steps + epochs


def test_the_seed_run_comes_out_on_paper() -> None:
    assert SEED.rows_a_step(6) == 1152
    assert SEED.steps(6, drop_rest=True) == 13_523
    seconds = 3600 * SEED.hours(H800, SEED_MFU)
    assert seconds == pytest.approx(SEED_SECONDS, rel=0.15)
    assert seconds == pytest.approx(SEED_SECONDS, rel=0.01)
    # It ran with the full logits and flash attention, 12 blocks at a time on 80 GB.
    full = replace(SEED, loss_head="full")
    assert full.fits(H800) and not replace(full, micro=16).fits(H800)


def test_a_reference_costs_a_forward_pass() -> None:
    run = replace(SEED, sides=2, epochs=3)
    plain = run.all_flops(6)
    assert replace(run, reference="ahead").all_flops(6) == pytest.approx(plain * (1 + 1 / 9))
    assert replace(run, reference="each step").all_flops(6) == pytest.approx(plain * 4 / 3)
    ahead, second = (sum(replace(run, reference=when).memory(H800).values()) for when in ("ahead", "each step"))
    assert second - ahead == 2 * count_parameters(FULL)


def test_communication_worked_out_by_hand() -> None:
    network = Network(gpus_per_node=8, node=100, between=10, share=0.5, hop=1e-3)
    assert network.collective(8e9, gpus=8, calls=1) == pytest.approx(7e9 / 50e9 + 7e-3)
    assert network.collective(8e9, gpus=16, calls=2) == pytest.approx(7.5e9 / 5e9 + 30e-3)
    once = network.collective(2 * count_parameters(FULL), 8, calls=2)
    for zero, passes in ((0, 2), (1, 2), (2, 17), (3, 48)):
        assert communication_seconds(FULL, network, 8, zero, 16, width=2) == pytest.approx(passes * once)
    assert communication_seconds(FULL, network, 1, 2, 16, width=2) == 0


def test_sweep() -> None:
    scales = sweep(SEED, H800, Network(node=200), mfu=0.2)
    assert [scale.gpus for scale in scales] == [2**power for power in range(11)]
    assert scales[0].efficiency == 1 and scales[0].hours == pytest.approx(SEED_SECONDS * 6 / 3600, rel=0.01)
    assert all(scale.rows_a_step >= 1152 and scale.micro <= 12 for scale in scales)
    assert all(scale.rows_a_step == 1152 for scale in scales[:8])
    assert scales[-1].rows_a_step == 2048  # a GPU cannot have less than a row, and 1.125 of them round to 2
    hours = [scale.hours for scale in scales]
    assert hours == sorted(hours, reverse=True)
    costs = [scale.gpus * scale.hours for scale in scales]
    assert costs == sorted(costs)


def test_cures_fit_and_keep_the_batch() -> None:
    machine = Machine(GPUS["RTX4090"])
    run = replace(SEED, masked=True, loss_head="full")
    assert not run.fits(machine)
    found = cures(run, machine)
    assert found and all(cure.num_bytes <= machine.room for cure in found)
    for cure in found:
        gpus = int(next(iter(re.findall(r"--gpus (\d+)", cure.change)), 1))
        batch = re.search(r"train_batch_size: (\d+), gradient_accumulation_steps: (\d+)", cure.change)
        if batch:
            assert int(batch[1]) * int(batch[2]) * gpus == 192, cure
    keys = " ".join(cure.change for cure in found)
    assert "activation_checkpointing: true" in keys and "low_memory: true" in keys and "--gpus" in keys
    assert not cures(replace(run, length=1_000_000), machine)


def test_low_memory_takes_the_place_of_muon_and_deepspeed() -> None:
    """As the programs ask for it: alone, and without their optimizer keys."""
    run, machine = replace(SEED, masked=True, loss_head="full"), Machine(GPUS["RTX4090"])

    def low(run: Run, machine: Machine) -> Cure:
        return next(cure for cure in cures(run, machine) if "low_memory" in cure.change)

    plain = low(run, machine)
    assert "muon" not in plain.change and "--zero" not in plain.change
    muon = low(replace(run, muon=True), machine)
    assert "low_memory: true, muon_learning_rate: null, " in muon.change and muon.num_bytes == plain.num_bytes
    sharded = low(run, replace(machine, zero=2))
    assert "--zero 0 in place of 2" in sharded.change and sharded.num_bytes == plain.num_bytes


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(ROOT)

    def run(*words: str) -> str:
        main([*words])
        return capsys.readouterr().out

    return run


def test_the_command_tells_the_plan(plan: Plan) -> None:
    said = plan("recipes/pt.yaml", "--gpus", "6", "--gpu", "H800", "--rows", "15579216", "--drop_rest", "--sweep")
    for fact in ("998,810,624", "6 x 32 x 6 GPUs = 1,152 blocks", "13,523", "24.6 hours", "16.00 GB", "ZeRO-3"):
        assert fact in said, fact
    assert "fit 80 GB" in said and re.search(r"\| +1,024 \|", said)
    blocks = "15,579,216 blocks, 15,953,117,184 tokens"
    assert blocks in said


def test_overrides_and_the_loss_head(plan: Plan) -> None:
    words = ("recipes/pt.yaml", "--gpu", "H200", "--tokens", "1e9", "--per_device_train_batch_size", "12")
    heads = [plan(*words, *more) for more in ((), ("--loss_head", "full"))]
    values = [float(re.search(r"loss head +\| +([\d.]+)", said)[1]) for said in heads]  # type: ignore[index]
    assert values[0] < 4 and values[1] == pytest.approx(22.4, abs=0.1)
    assert "1 x 192" not in heads[0] and "12 x 32 x 1 GPUs = 384 blocks" in heads[0]


def test_what_does_not_fit_ends_with_its_cures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main(["recipes/pt.yaml", "--gpu", "RTX4090", "--tokens", "15.95e9"])
    said = capsys.readouterr().out
    assert end.value.code == 1
    assert "do not fit 24 GB" in said and "what makes it fit" in said and "activation_checkpointing: true" in said


def test_sft_and_dpo(plan: Plan, tmp_path: Path) -> None:
    said = plan("recipes/sft.yaml", "--model", "recipes/pt.yaml", "--tokens", "3.3e9", "--gpus", "6")
    assert "998,810,624" in said and "3,222,657 rows" in said  # ceil(3.3e9 / 1024)
    ledger = {"rows_kept": 1000, "tokens_trained": 800_000, "tokens_masked": 200_000}
    (tmp_path / "data_ledger.json").write_text(json.dumps(ledger), encoding="utf-8")
    said = plan("recipes/dpo.yaml", "--model", "models/Qwen2.5-0.5B-Instruct", "--output_dir", str(tmp_path))
    assert "1,000 pairs, 1,000,000 tokens" in said and "494,032,768" in said
    assert "4 x 16 x 1 GPUs = 64 pairs" in said


def test_muon_is_planned_for_what_it_works_under(plan: Plan) -> None:
    said = plan("recipes/pt_fast.yaml", "--gpus", "6", "--gpu", "H800", "--tokens", "15.95e9")
    assert "this run, ZeRO-2" in said and "ZeRO-1" not in said and "ZeRO-3" not in said


def test_smoothed_labels_need_all_logits(plan: Plan) -> None:
    words = ("recipes/pt.yaml", "--gpu", "H200", "--tokens", "1e9", "--per_device_train_batch_size", "12")
    assert plan(*words, "--label_smoothing_factor", "0.1") == plan(*words, "--loss_head", "full")


def test_disk_is_that_of_a_run(plan: Plan) -> None:
    said = plan("recipes/pt.yaml", "--gpu", "H200", "--tokens", "1e9")
    each = 12 * 998_810_624 + OTHER_FILES
    assert f"{each / 1e9:,.2f} GB" in said
    assert f"{(4 * each + 4 * 998_810_624) / 1e9:,.2f} GB: 3 and one" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes/pt.yaml"], r"recipes/pt.yaml: .*'results/nowhere' has no data_ledger.json.*--tokens N"),
        (["recipes/dpo.yaml", "--model", "recipes/pt.yaml"], r"--tokens N, of both sides .* and --rows N, the pairs"),
        (["recipes/sft.yaml", "--checkpoint", "results/nothing"], r"'results/nothing' has no config.json.*--model"),
        (["recipes/pt.yaml", "--tokens", "1e9", "--blocksize", "3"], "Unknown recipe key 'blocksize'.*'block_size'"),
        (["recipes/pt.yaml", "--tokens", "1e9", "--num_attention_heads", "15"], "heads 15.*that work: "),
        (["recipes/pt.yaml", "--tokens", "1e9", "--gpu", "T4", "--precision", "bf16"], "precision is bf16.*fp16"),
        (["recipes/demo/pt.yaml", "--tokens", "1e6", "--gpus", "2"], "muon_learning_rate is 0.008.*does not clip"),
        (
            ["recipes/demo/pt.yaml", "--tokens", "1e6", "--sweep"],
            "muon_learning_rate with max_grad_norm, work on one process",
        ),
        (["recipes/low_memory/pt.yaml", "--tokens", "1e6", "--gpus", "2"], "low_memory is true.*one process"),
        (
            ["recipes/pt_fast.yaml", "--tokens", "1e9", "--gpus", "6", "--zero", "1"],
            "muon_learning_rate is 0.0008.*not under ZeRO-1",
        ),
        (["recipes/eval.yaml"], "which stage it is for"),
    ],
)
def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(ROOT)
    nowhere = [] if "eval" in words[0] else ["--output_dir", "results/nowhere"]
    with pytest.raises(SystemExit, match=message):
        main([*words, *nowhere])


@pytest.mark.parametrize("words", [["--tokens", "0.5"], ["--mfu", "20"], ["--gpu", "H900"]])
def test_numbers_that_cannot_be(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipes/pt.yaml", *words])
    assert words[1] in capsys.readouterr().err


def test_the_recipe_still_says_the_batch_of_the_seed() -> None:
    recipe = yaml.safe_load((ROOT / "recipes/pt.yaml").read_text(encoding="utf-8"))
    product = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * 6
    assert product == SEED.rows_a_step(6) and math.isclose(product * recipe["block_size"], 1_179_648)


def table_rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_document_shows_what_the_command_says(plan: Plan) -> None:
    document = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    said = plan("recipes/pt.yaml", "--gpus", "6", "--gpu", "H800", "--tokens", "15.95e9", "--sweep")
    rows = table_rows(said)
    assert len(rows) == 33 and [row for row in rows if row not in document] == []
    words = "--gpus 1024 --gpu H100 --zero 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --sweep"
    for tokens, name in (("15.95e9", "15.95e9"), ("1e11", "1e11"), ("1e12", "1e12"), ("15e12", "15e12")):
        cells = [
            [cell.strip() for cell in row.split("|")]
            for row in table_rows(plan("recipes/pt.yaml", "--tokens", tokens, *words.split()))
        ]
        hours = {row[1]: row[8] for row in cells if len(row) == 13}
        line = f"| {name} | {hours['8']} | {hours['64']} | {hours['1,024']} |"
        assert line in document, line


def test_the_document_shows_what_was_measured() -> None:
    document = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    for peak in json.loads(RECORD.read_text(encoding="utf-8"))["peaks"]:
        figures = f"| {peak['forecast_mb']:,.1f} | {peak['measured_mb']:,.1f} | {peak['ratio']:.3f} |"
        assert figures in document, figures
