"""A model with the chunked loss head learns what a plain one does, in all stages."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MakeModel
from programs import ROOT, STAGES, Programs, arguments, gradient_norms, losses
from transformers import PreTrainedModel

from mini_qwen.blocks import IGNORED
from mini_qwen.levers import choose_loss_head, fit_loss_head
from mini_qwen.loss_head import add_loss_head
from mini_qwen.rows import read_rows


@pytest.fixture
def models(tiny_model: MakeModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights twice: as transformers leaves them, and with the head."""
    plain = tiny_model()
    ours = copy.deepcopy(plain)
    add_loss_head(ours, equal_weights=True)
    return plain, ours


def make_batch(vocab: int) -> dict[str, torch.Tensor]:
    """Two rows of two documents each, half of the labels ignored."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (2, 24), generator=generator)
    labels = ids.masked_fill(torch.rand(2, 24, generator=generator) < 0.5, IGNORED)
    labels[:, [0, 10]] = IGNORED
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("num_items", [None, 31])
def test_loss_and_gradients_are_those_of_the_plain_model(
    models: tuple[PreTrainedModel, PreTrainedModel], num_items: int | None
) -> None:
    """With ignored labels, packed documents, and the Trainer's count of tokens over all micro-batches."""
    batch = make_batch(models[0].config.vocab_size) | ({} if num_items is None else {"num_items_in_batch": num_items})
    outputs = [model(**batch, use_cache=False) for model in models]
    for output in outputs:
        output["loss"].backward()
    assert outputs[1].loss.item() == pytest.approx(outputs[0].loss.item(), abs=1e-5)
    plain, ours = map(gradients, models)
    assert plain.keys() == ours.keys()
    for name in plain:
        assert torch.allclose(ours[name], plain[name], atol=1e-6), name


def test_scores_are_of_the_next_token(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    batch = make_batch(models[0].config.vocab_size)
    output = models[1](**batch, fused_lm_head=True)
    logits = models[0](**{name: batch[name] for name in ("input_ids", "position_ids")}, use_cache=False).logits
    log_probs = logits.log_softmax(dim=-1)
    labels = batch["labels"]
    for row in range(2):
        for place in range(23):
            label = labels[row, place + 1].item()
            if label == IGNORED:
                assert output.log_probs[row, place] == 0 and not output.label_mask[row, place]
                continue
            assert output.log_probs[row, place].item() == pytest.approx(log_probs[row, place, label].item(), abs=1e-5)
            mean = logits[row, place].mean().item()
            assert output.mean_logits[row, place].item() == pytest.approx(mean, abs=1e-5)


def test_without_labels_the_model_is_as_it_was(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    ids = make_batch(models[0].config.vocab_size)["input_ids"]
    plain, ours = (model(input_ids=ids).logits for model in models)
    assert torch.equal(plain, ours)
    generated = [model.generate(ids, max_new_tokens=4, do_sample=False) for model in models]
    assert torch.equal(*generated)


def test_a_batch_without_labels_to_learn_moves_nothing(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    batch = make_batch(models[1].config.vocab_size)
    batch["labels"][:] = IGNORED
    loss = models[1](**batch).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(models[1]).values())


@pytest.mark.parametrize("stage", STAGES)
def test_stages_learn_alike_with_the_libraries_own_heads(
    programs: Programs, road: Path, tmp_path: Path, stage: str
) -> None:
    options = {"precision": "fp32", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}

    def train(head: str) -> Path:
        folder = tmp_path / head
        done = programs.run(stage, arguments(stage, road, output_dir=folder, loss_head=head, **options))
        assert done.code == 0, done.output[-3000:]
        assert f"loss_head                 {head}" in done.output
        return folder

    ours, theirs = programs.map(train, ["chunked", "library"])
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-3)
    assert losses(ours)[0] == pytest.approx(losses(theirs)[0], abs=1e-5)
    assert gradient_norms(ours)[0] == pytest.approx(gradient_norms(theirs)[0], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reference_in_memory_is_scored_as_the_policy_is(
    programs: Programs, road: Path, tmp_path: Path, precision: str
) -> None:
    """Before the first update both are the same model, and the loss is that of a coin's toss."""
    options = {"precompute_ref_log_probs": "false", "loss_type": "sigmoid", "loss_weights": 1.0, "max_steps": 2}
    done = programs.run("dpo", arguments("dpo", road, output_dir=tmp_path, precision=precision, **options))
    assert done.code == 0, done.output[-3000:]
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_reference_scores_of_other_settings_are_not_taken(programs: Programs, road: Path, tmp_path: Path) -> None:
    """They lie in the cache of the same pairs and weights. Those that fit give a coin's toss before any update."""
    rows = list(read_rows([ROOT / "mini_data/dpo/train-00000-of-00001.parquet"], None))
    for name, some in (("train", rows[:40]), ("test", rows[40:60])):
        lines = "".join(json.dumps(row.values) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    options = {"cache_dir": tmp_path / "cache", "loss_type": "sigmoid", "loss_weights": 1.0, "max_steps": 1}
    options |= {f"{name}_files": tmp_path / f"{name}.jsonl" for name in ("train", "test")}
    changed: dict[str, dict[str, Any]] = {
        "plain": {},
        "ld_alpha": {"ld_alpha": 0.3},
        "precision": {"precision": "bf16"},
    }
    for name, keys in [*changed.items(), ("again", changed["ld_alpha"])]:
        done = programs.run("dpo", arguments("dpo", road, output_dir=tmp_path / name, **options, **keys))
        assert done.code == 0, done.output[-3000:]
        assert ("Computing reference log probs for train" in done.output) == (name != "again")
        assert losses(tmp_path / name)[0] == pytest.approx(math.log(2), abs=1e-6)


def recipe(**keys: object) -> SimpleNamespace:
    return SimpleNamespace(**({"loss_head": "auto", "deepspeed_plugin": None, "label_smoothing_factor": 0.0} | keys))


def test_a_head_that_cannot_serve_is_not_taken(tiny_model: MakeModel) -> None:
    model = tiny_model()
    assert choose_loss_head(model, recipe()).chosen == "chunked"
    assert choose_loss_head(model, recipe(loss_head="library")).chosen == "library"
    sharded = recipe(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    smoothed = recipe(label_smoothing_factor=0.1)
    for args, reason in (
        (sharded, "ZeRO-3"),
        (recipe(use_weighting=True), "use_weighting"),
        (smoothed, "label_smoothing_factor"),
    ):
        lever = choose_loss_head(model, args)
        assert lever.chosen == "library" and reason in lever.why
        args.loss_head = "chunked"
        with pytest.raises(SystemExit, match=f"(?s){reason}.*library"):
            fit_loss_head(model, args, equal_weights=True)
    model.config.final_logit_softcapping = 30.0
    assert "final_logit_softcapping" in choose_loss_head(model, recipe()).why
    model = tiny_model()
    model.lm_head = torch.nn.Linear(32, 448, bias=True)
    assert choose_loss_head(model, recipe()).chosen == "library"
