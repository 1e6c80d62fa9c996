"""The real stage programs, in this process, on mini_data with a model of a few thousand weights."""

import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from programs import ROOT, STAGES, VOCAB, arguments, losses, same_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import mini_qwen_dpo
import mini_qwen_eval
import mini_qwen_pt
import mini_qwen_sft
from mini_qwen.ledger import Ledger

MODULES = {"pt": mini_qwen_pt, "sft": mini_qwen_sft, "dpo": mini_qwen_dpo}


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoint_is_complete_and_loads_as_it_is(road: Path, stage: str) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(road / stage, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(road / stage)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.config.training_stage == stage
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.use_cache
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    names = {path.name for path in (road / stage).iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert {"generation_config.json", "run.json", "data_ledger.json", "training_loss.png"} <= names


def test_first_losses_are_those_of_a_model_that_knows_nothing(road: Path) -> None:
    assert losses(road / "pt")[0] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert losses(road / "dpo")[0] < 2 * math.log(2) + math.log(VOCAB)


def test_dpo_starts_at_ln_2(road: Path, tmp_path: Path) -> None:
    mini_qwen_dpo.main(arguments("dpo", road, output_dir=tmp_path / "dpo", loss_type="sigmoid", loss_weights=1.0))
    assert losses(tmp_path / "dpo")[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_ledger_and_record_add_up(road: Path, stage: str) -> None:
    record = json.loads((road / stage / "run.json").read_text(encoding="utf-8"))
    ledger = record["ledger"]
    Ledger.from_dict(ledger).check(max_drop_share=0.1)
    assert ledger["rows_read"] >= ledger["rows_kept"] > 0
    assert ledger["tokens_read"] > ledger["tokens_trained"] > 0
    assert record["recipe"] and record["versions"]["torch"] and record["seconds"] > 0
    assert all(math.isfinite(loss) for loss in losses(road / stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one(road: Path, tmp_path: Path, stage: str) -> None:
    """Bit for bit, with Muon, packing, gradient accumulation and a schedule under way."""
    shared = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "warmup_steps": 2}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    MODULES[stage].main(arguments(stage, road, output_dir=straight, **shared))
    shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    MODULES[stage].main(arguments(stage, road, output_dir=resumed, resume_from_checkpoint="true", **shared))
    assert same_weights(straight, resumed)
    assert losses(resumed) == losses(straight)


def test_an_output_folder_in_use_is_refused(road: Path, tmp_path: Path) -> None:
    (tmp_path / "pt" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"holds checkpoint-3 of an earlier run.*--resume_from_checkpoint"):
        mini_qwen_pt.main(arguments("pt", road, output_dir=tmp_path / "pt"))
    with pytest.raises(SystemExit, match="no checkpoint to resume from"):
        mini_qwen_pt.main(arguments("pt", road, output_dir=tmp_path / "new", resume_from_checkpoint="true"))


def test_the_libraries_report_nothing_home(road: Path) -> None:
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY is True


def test_prepare_only_prepares_and_leaves(road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        mini_qwen_sft.main(arguments("sft", road, output_dir=tmp_path / "sft", prepare_only="true"))
    assert leaving.value.code == 0
    assert "rows:" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["data_ledger.json"]


BAD_INPUT = {
    "missing folder": ("pt", {"train_files": "no/such/folder"}, r"no data at 'no/such/folder'"),
    "unknown key": ("pt", {"learning_rat": 1}, r"'learning_rat'.*Did you mean 'learning_rate'"),
    "wrong type": ("sft", {"max_length": 12.5}, r"'max_length' is 12.5 on the command line, but must be int"),
    "impossible heads": ("pt", {"num_attention_heads": 5}, r"hidden_size 32.*num_attention_heads 5.*\[4, 2\]"),
    "small vocabulary": ("pt", {"vocab_size": 100}, r"tokenizer has 512 tokens.*vocab_size is 100"),
    "no tokenizer": ("pt", {"tokenizer": "nowhere"}, r"no tokenizer at 'nowhere'"),
    "no checkpoint": ("sft", {"checkpoint": "mini_qwen"}, r"no tokenizer at 'mini_qwen'"),
    "no answers": ("sft", {"train_files": ROOT / "mini_data/pt"}, r"lacks the column 'conversations' or 'messages'"),
    "no pairs": ("dpo", {"train_files": ROOT / "mini_data/sft"}, r"lacks the column 'chosen' \+ 'rejected'"),
    "block too long": ("pt", {"block_size": 10_000_000}, r"fewer than one block of 10,000,000"),
    "too few rows": ("pt", {"eval_rows": 100_000}, r"eval_rows is 100,000, but the data has only"),
    "no such recipe": ("pt", {"config": "recipes/nothing.yaml"}, r"no recipe 'recipes/nothing.yaml'"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_paragraph_before_anything_is_written(road: Path, tmp_path: Path, case: str) -> None:
    stage, overrides, message = BAD_INPUT[case]
    with pytest.raises(SystemExit, match=message) as stopped:
        MODULES[stage].main(arguments(stage, road, output_dir=tmp_path / "out", **overrides))
    assert stopped.value.code not in (0, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("stage", STAGES)
def test_a_gpu_recipe_without_a_gpu_says_so(stage: str) -> None:
    with pytest.raises(SystemExit, match=r"needs_gpu: true.*recipes/demo"):
        MODULES[stage].main([])


def test_eval_writes_one_row_for_each_checkpoint(
    road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = [str(road / stage) for stage in STAGES]
    recipe = ["--config", str(ROOT / "recipes/demo/eval.yaml"), "--output_dir", str(tmp_path / "eval")]
    folders = ["--documents", str(ROOT / "mini_data/eval/documents.parquet"), "--unigram_documents"]
    folders += [
        str(ROOT / "mini_data/pt/tourism_geography"),
        "--questions",
        str(ROOT / "mini_data/eval/questions.jsonl"),
    ]
    folders += ["--preferences", str(ROOT / "mini_data/dpo/test-00000-of-00001.parquet"), "--max_new_tokens", "8"]
    mini_qwen_eval.main([*recipe, "--checkpoints", *checkpoints, *folders])
    results = json.loads((tmp_path / "eval" / "results.json").read_text(encoding="utf-8"))
    records = results["checkpoints"]
    assert [record["stage"] for record in records] == list(STAGES)
    for record in records:
        assert 0 < record["bits_per_byte"] < 8
        for share in ("stop_rate", "repetition_4gram", "preference_accuracy", "accuracy_new_wording"):
            assert 0 <= record[share] <= 1
        assert len(record["answers"]) == len(results["prompts"])
    table = (tmp_path / "eval" / "results.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert (tmp_path / "eval" / "training_loss.png").stat().st_size > 1000


def test_eval_of_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"is not a checkpoint: it lacks config.json, tokenizer.json"):
        mini_qwen_eval.main(["--checkpoints", str(tmp_path), "--output_dir", str(tmp_path / "eval")])
    assert not (tmp_path / "eval").exists()
