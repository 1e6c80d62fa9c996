"""The real stage programs, in this process, on mini_data with a model of a few thousand weights."""

import json
import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from conftest import save_rows
from programs import ROOT, STAGES, VOCAB, arguments, losses, same_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import mini_qwen_dpo
import mini_qwen_eval
import mini_qwen_pt
import mini_qwen_sft
from mini_qwen import evaluation
from mini_qwen.comparison import read_parent
from mini_qwen.ledger import Ledger
from mini_qwen.rows import read_rows

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
    "block too long": ("pt", {"block_size": 1_000_000}, r"fewer than one block of 1,000,000"),
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


MANNERS = ("stop_rate", "answer_length", "repetition_4gram", "repetition_near", "distinct_2")


def first_rows(file: str, count: int) -> list[dict[str, Any]]:
    return [row.values for row in islice(read_rows([ROOT / "mini_data" / file], None), count)]


@pytest.fixture(scope="module")
def study(road: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small recipe with all parts, for the three checkpoints of the road."""
    folder = tmp_path_factory.mktemp("study")
    passages = [
        {"text": f"{word} {at}", "category": label} for label, word in (("a", "dog"), ("b", "海")) for at in range(3)
    ]
    files = {
        "documents.jsonl": first_rows("eval/documents.parquet", 10),
        "questions.jsonl": first_rows("eval/questions.jsonl", 8),
        "choices.jsonl": first_rows("eval/choices.jsonl", 4),
        "pairs.parquet": first_rows("dpo/test-00000-of-00001.parquet", 6),
        "passages.csv": passages,
        "prompts.txt": [{"text": "Where does Anna live?"}, {"text": "小明在哪里？"}],
    }
    for name, rows in files.items():
        save_rows(folder / name, rows)
    return {
        "checkpoints": [str(road / stage) for stage in STAGES],
        "output_dir": str(folder / "eval"),
        "documents": [str(folder / "documents.jsonl")],
        "unigram_documents": [str(ROOT / "mini_data/pt/tourism_geography")],
        "questions": [str(folder / "questions.jsonl")],
        "preferences": [str(folder / "pairs.parquet")],
        "choices": {"facts": {"questions": str(folder / "choices.jsonl"), "score": "text", "language": "en"}},
        "classification": {"toy": {"files": [str(folder / "passages.csv")], "num_shots": 2}},
        "prompts": ["Who has a dog?", str(folder / "prompts.txt")],
        "decoding": {"temperatures": [0.5, 1.0], "top_ps": [0.5, 1.0], "samples": 2, "max_new_tokens": 6},
        "max_new_tokens": 8,
        "max_length": 320,
    }


def run_eval(recipe: dict[str, Any], **changed: Any) -> Path:
    """The program on this recipe, which is written beside its output; returns the folder of the report."""
    recipe = recipe | changed
    folder = Path(recipe["output_dir"])
    file = folder.with_name(f"{folder.name}.yaml")
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    mini_qwen_eval.main(["--config", str(file)])
    return folder


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(study: dict[str, Any]) -> Path:
    """The folder of a finished evaluation."""
    return run_eval(study)


def test_eval_measures_all_parts_of_every_checkpoint(study: dict[str, Any], report: Path) -> None:
    results = read_results(report)
    assert results["prompts"] == ["Who has a dog?", "Where does Anna live?", "小明在哪里？"]
    assert results["recipe"]["max_new_tokens"] == 8 and results["versions"]["torch"] and results["seconds"] > 0
    records = results["checkpoints"]
    assert [record["checkpoint"] for record in records] == study["checkpoints"]
    assert [record["stage"] for record in records] == list(STAGES)
    for record in records:
        assert record["steps"] == 6 and record["parameters"] > 1000 and record["num_documents"] == 10
        assert 0 < record["bits_per_byte"] < 8 and 0 < record["unigram_bits_per_byte"] < 8
        assert (record["num_questions"], record["num_pairs"]) == (8, 6)
        for group in [key for key in record if key.startswith("accuracy_")]:
            assert 0 <= record[group] <= 1
        for manners in (record, record["prompt_manners"], *record["decoding"]):
            assert all(0 <= manners[key] <= (8 if key == "answer_length" else 1) for key in MANNERS)
        assert len(record["answers"]) == 3
        assert [cell["num_answers"] for cell in record["decoding"]] == [3, 6, 6, 6, 6]
        assert record["choices"]["facts"]["num_questions"] == 4
        toy = record["classification"]["toy"]
        assert toy["num_rows"] == 4
        assert all(sum(map(sum, toy[way]["matrix"])) == 4 for way in ("by_text", "by_likelihood"))


def test_eval_compares_each_stage_with_the_one_it_was_trained_from(road: Path, report: Path) -> None:
    """As the records of the runs name it, not as the order of the recipe has it."""
    results = read_results(report)
    pairs = {(change["parent"], change["checkpoint"]) for change in results["changes"]}
    assert pairs == {(str(road / "pt"), str(road / "sft")), (str(road / "sft"), str(road / "dpo"))}
    assert all(read_parent(road / child) == road / parent for parent, child in (("pt", "sft"), ("sft", "dpo")))
    assert read_parent(road / "pt") is None
    rewards = [record.get("reward_accuracy") for record in results["checkpoints"]]
    assert rewards[0] is None and all(0 <= share <= 1 for share in rewards[1:])


def test_eval_writes_a_report_with_its_pictures(report: Path) -> None:
    names = {path.name for path in report.iterdir()}
    manners = {f"decoding_{key}{ending}.png" for key in MANNERS for ending in ("", "_by_temperature")}
    ways = {f"confusion_toy_{way}_{stage}.png" for way in ("by_text", "by_likelihood") for stage in STAGES}
    pictures = manners | ways | {"training_loss.png"}
    assert names == pictures | {"report.md", "report.html", "results.json", "parts"}
    text, page = ((report / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
    assert all(f"]({name})" in text for name in pictures)
    assert page.count("data:image/png;base64,") == len(pictures)
    chapters = ["In short", "Forgetting", "Held-out documents", "Questions and pairs", "Multiple choice"]
    chapters += ["Classification", "How answers behave", "Decoding", "Training", "Answers", "How this was measured"]
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == chapters
    assert all(f">{chapter}</h2>" in page for chapter in chapters)


def test_eval_goes_on_where_it_died(
    study: dict[str, Any], report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second checkpoint's classification: what was finished by then is not measured again."""
    real = evaluation.score_classification
    output = str(tmp_path / "eval")

    def die(model: Any, *rest: Any) -> dict[str, Any]:
        if model.config.training_stage == "sft":
            raise KeyboardInterrupt
        return real(model, *rest)

    with monkeypatch.context() as planted:
        planted.setattr(evaluation, "score_classification", die)
        with pytest.raises(SystemExit, match="^130$"):
            run_eval(study, output_dir=output, decoding=None)
    parts = tmp_path / "eval/parts"
    finished = {file: file.stat().st_mtime_ns for file in parts.iterdir()}
    assert len(finished) == 7 + 5  # six parts and what the model is; four and that
    assert not (tmp_path / "eval/report.md").exists()
    run_eval(study, output_dir=output, decoding=None)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    for record, whole in zip(
        *(read_results(place)["checkpoints"] for place in (tmp_path / "eval", report)), strict=True
    ):
        assert record == {key: value for key, value in whole.items() if key != "decoding"}


def test_eval_of_some_parts_that_were_measured_before(
    study: dict[str, Any], report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--parts documents prompts` on the command line: the same figures, and no model is loaded for them."""
    shutil.copytree(report / "parts", tmp_path / "eval/parts")
    recipe = tmp_path / "eval.yaml"
    recipe.write_text(yaml.safe_dump(study | {"output_dir": str(tmp_path / "eval")}), encoding="utf-8")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    mini_qwen_eval.main(["--config", str(recipe), "--parts", "documents", "prompts"])
    for record, whole in zip(
        *(read_results(place)["checkpoints"] for place in (tmp_path / "eval", report)), strict=True
    ):
        assert {"bits_per_byte", "answers", "prompt_manners"} <= set(record)
        assert not {"rouge_l", "preference_accuracy", "choices", "classification", "decoding"} & set(record)
        assert record.items() <= whole.items()
    text = (tmp_path / "eval/report.md").read_text(encoding="utf-8")
    assert "## Answers" in text and "## Decoding" not in text and "## Multiple choice" not in text


BAD_STUDIES: dict[str, tuple[dict[str, Any], str]] = {
    "no such part": ({"parts": ["speed"]}, r"no part 'speed' of an evaluation\. There are documents, questions"),
    "a part without files": ({"parts": ["choices"], "choices": {}}, r"part 'choices' is asked for, but .* nothing"),
    "an empty prompt file": (
        {"prompts": ["TMP/empty.txt"]},
        r"prompt file '.*empty\.txt' is empty\. Write one prompt",
    ),
    "a missing prompt file": ({"prompts": ["TMP/gone.txt"]}, r"no data at '.*gone\.txt'"),
    "no tokenizer": (
        {"checkpoints": ["TMP/pt"]},
        r"'.*pt' is not a checkpoint: it lacks tokenizer\.json.*Name the folder",
    ),
    "no checkpoint": ({"checkpoints": ["TMP"]}, r"is not a checkpoint: it lacks config\.json, tokenizer\.json"),
    "other documents": ({"documents": ["TMP/rows.jsonl"]}, r"rows\.jsonl lacks the column 'text'\. It has: other"),
    "no answers": ({"questions": ["TMP/rows.jsonl"]}, r"rows\.jsonl lacks the column 'question' \+ 'answer'"),
    "no pairs": ({"preferences": ["TMP/rows.jsonl"]}, r"rows\.jsonl lacks the column 'chosen' \+ 'rejected'"),
    "no options": ({"choices": {"x": {"questions": "TMP/rows.jsonl"}}}, r"rows\.jsonl lacks the column 'question'"),
    "no passages": ({"classification": {"x": {"files": ["TMP/rows.jsonl"]}}}, r"rows\.jsonl lacks the column 'text'"),
    "no sample": ({"decoding": {"samples": 0}}, r"decoding: samples is 0"),
    "a wrong key of a part": ({"decoding": {"sample": 2}}, r"decoding\.sample.*is 2 in .*bad\.yaml"),
    "no token": ({"max_new_tokens": 0}, r"max_new_tokens is 0, but must be 1 or more"),
    "no batch": ({"batch_size": 0}, r"batch_size is 0, but must be 1 or more"),
    "nothing to score": ({"max_length": 1}, r"max_length is 1, but must be 2 or more"),
}


@pytest.mark.parametrize("case", BAD_STUDIES)
def test_eval_refuses_bad_input_before_a_model_is_loaded(
    study: dict[str, Any], road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Named with its file; nothing is written."""
    values, message = BAD_STUDIES[case]
    (tmp_path / "empty.txt").write_text("\n")
    save_rows(tmp_path / "rows.jsonl", [{"other": "x"}])
    shutil.copytree(road / "pt", tmp_path / "pt", ignore=shutil.ignore_patterns("tokenizer.json", "checkpoint-*"))
    recipe = tmp_path / "bad.yaml"
    written = study | {"output_dir": str(tmp_path / "eval")} | values
    recipe.write_text(yaml.safe_dump(written).replace("TMP", str(tmp_path)), encoding="utf-8")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(SystemExit, match=message):
        mini_qwen_eval.main(["--config", str(recipe)])
    assert not (tmp_path / "eval").exists()
