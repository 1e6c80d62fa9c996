"""mini_qwen/model.py: the sizes of the recipe, what cannot work refused with a cure, complete checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE_CONFIG, ROOT, SMALL
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config

from mini_qwen.model import (
    NewModel,
    TrainedModel,
    build_model,
    check_checkpoint,
    check_vocabulary,
    load_model,
    needs_flat_rows,
    resize_config,
)
from mini_qwen.recipe import load_yaml

BASE = json.loads((BASE_CONFIG / "config.json").read_text(encoding="utf-8"))
FULL = {
    "hidden_size": 1024,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}


def new_model(**changes: Any) -> NewModel:
    return NewModel(**({"base_config": str(BASE_CONFIG)} | SMALL | changes))


def num_parameters(config: Qwen2Config) -> int:
    """Without memory for the weights; tied ones count once."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def test_the_full_sizes_have_998_810_624_parameters() -> None:
    assert num_parameters(resize_config(BASE, FULL)) == 998_810_624


def test_the_full_recipe_has_the_full_sizes() -> None:
    recipe = load_yaml(ROOT / "recipes/pt.yaml")
    assert {key: recipe[key] for key in FULL} == FULL


def test_the_base_config_is_qwens() -> None:
    """Qwen2.5-0.5B has 0.49 billion parameters, 0.36 of them outside the embedding, says its model card."""
    whole = num_parameters(resize_config(BASE, {}))
    assert round(whole / 1e9, 2) == 0.49
    assert round((whole - 151936 * 896) / 1e9, 2) == 0.36


@pytest.mark.parametrize("num_layers", [1, 3, 24, 30])
def test_any_depth_builds_computes_and_saves(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, num_layers: int
) -> None:
    """The base has 24 layers; a config that remembered that would break when growing or at its first save."""
    model = build_model(new_model(num_hidden_layers=num_layers), tokenizer, "fp32", "pt")
    assert len(model.model.layers) == num_layers
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(again.model.layers) == again.config.num_hidden_layers == num_layers


@pytest.mark.parametrize("num_layers", [1, 5])
def test_the_base_may_be_a_config_that_transformers_saved(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, num_layers: int
) -> None:
    """Such a config lists the type of every one of its layers, here three."""
    resize_config(BASE, SMALL | {"num_hidden_layers": 3}).save_pretrained(tmp_path / "base")
    assert len(json.loads((tmp_path / "base/config.json").read_text(encoding="utf-8"))["layer_types"]) == 3
    args = new_model(base_config=str(tmp_path / "base"), num_hidden_layers=num_layers)
    model = build_model(args, tokenizer, "fp32", "pt")
    model.save_pretrained(tmp_path / "new")
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "new").model.layers) == num_layers


def nearest_that_work(message: str) -> list[int]:
    found = re.search(r"that work: \[([\d, ]+)\]", message)
    assert found, message
    return [int(number) for number in found[1].split(",")]


@given(hidden=st.integers(1, 200), heads=st.integers(1, 64), kv_heads=st.integers(1, 64))
def test_impossible_sizes_are_refused_with_the_numbers_and_sizes_that_work(
    hidden: int, heads: int, kv_heads: int
) -> None:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    works = hidden % heads == 0 and hidden // heads % 2 == 0 and heads % kv_heads == 0
    try:
        config = resize_config(BASE, sizes)
    except SystemExit as refusal:
        message = str(refusal)
        assert not works
    else:
        assert works
        assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (
            hidden,
            heads,
            kv_heads,
        )
        return
    assert "hidden_size" in message or "num_key_value_heads" in message
    wrong_heads = hidden % heads != 0 or hidden // heads % 2 != 0
    if hidden % 2:
        assert f"hidden_size {hidden}" in message
        return
    key = "num_attention_heads" if wrong_heads else "num_key_value_heads"
    for number in (hidden, heads) if wrong_heads else (heads, kv_heads):
        assert str(number) in message
    for number in nearest_that_work(message):
        resize_config(BASE, {**sizes, "num_key_value_heads": 1, key: number})


def test_a_size_with_no_cure_in_the_heads_names_another_cure() -> None:
    """No number of heads shares an odd hidden_size evenly; then the nearest hidden sizes help."""
    with pytest.raises(SystemExit) as error:
        resize_config(BASE, {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 1})
    assert "that work: []" not in str(error.value)
    assert re.search(r"\b(30|32|34|36)\b", str(error.value))


@pytest.mark.parametrize("key", [key for key in FULL if key != "vocab_size"])
@pytest.mark.parametrize("value", [0, -4])
def test_sizes_below_one_are_refused(key: str, value: int) -> None:
    with pytest.raises(SystemExit, match=rf"{key}.*{value}"):
        resize_config(BASE, {**FULL, key: value})


def test_a_model_smaller_than_the_tokenizer_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    check_vocabulary(len(tokenizer), tokenizer)
    with pytest.raises(SystemExit, match=r"\b400 tokens.*\b399\b.*\b448\b"):
        build_model(new_model(vocab_size=399), tokenizer, "fp32", "pt")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_are_fp32_whatever_it_computes_in(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, precision: str
) -> None:
    """The base config says bfloat16."""
    model = build_model(new_model(), tokenizer, precision, "pt")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(TrainedModel(str(tmp_path)), tokenizer, precision, "sft")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


def test_a_base_config_that_is_missing_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere"):
        build_model(new_model(base_config=str(tmp_path / "nowhere")), tokenizer, "fp32", "pt")


def test_a_checkpoint_is_complete_and_knows_its_stage(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = build_model(new_model(), tokenizer, "fp32", "pt").eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    check_checkpoint(str(tmp_path))
    stop, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.training_stage == "pt"
    # Versions before 5 read the one, those from 5 on the other.
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1_000_000
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == stop
    assert loaded.generation_config.pad_token_id == loaded.config.pad_token_id == pad
    assert loaded.config.bos_token_id is None
    assert loaded.generation_config.bos_token_id is None
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("Anna lives")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_next_stage_loads_the_same_weights_under_its_own_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = build_model(new_model(), tokenizer, "fp32", "pt")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(TrainedModel(str(tmp_path)), tokenizer, "fp32", "sft")
    assert loaded.config.training_stage == "sft"
    for (name, one), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_weights_that_are_cut_off_are_found_without_a_manifest(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    save_file({"weight": torch.zeros(100)}, tmp_path / "model.safetensors")
    check_checkpoint(str(tmp_path))
    content = (tmp_path / "model.safetensors").read_bytes()
    for length in (len(content) - 1, 20, 0):
        (tmp_path / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(SystemExit, match=r"model\.safetensors is damaged: .*Fetch it again"):
            check_checkpoint(str(tmp_path))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_checkpoint_says_what_it_lacks(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, missing: str
) -> None:
    build_model(new_model(), tokenizer, "fp32", "pt").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    lacking = missing.replace("model.", "*.")
    with pytest.raises(SystemExit, match=re.escape(str(tmp_path)) + rf".*lacks {re.escape(lacking)}\."):
        load_model(TrainedModel(str(tmp_path)), tokenizer, "fp32", "sft")


def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(SystemExit, match="'some-org/some-model' is not a checkpoint"):
        load_model(TrainedModel("some-org/some-model"), tokenizer, "fp32", "sft")


def test_only_flash_attention_needs_flat_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model(new_model(attn_implementation="eager"), tokenizer, "fp32", "pt")
    assert not needs_flat_rows(model)
    model.config._attn_implementation = "flash_attention_2"
    assert needs_flat_rows(model)


def test_the_same_seed_gives_the_same_weights(tokenizer: PreTrainedTokenizerBase) -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build_model(new_model(), tokenizer, "fp32", "pt").model.embed_tokens.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
