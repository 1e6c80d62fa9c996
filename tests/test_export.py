"""mini_qwen/export.py and its folder for transformers and vLLM: the same model, or one line and nothing written."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from exporting import export, load_program, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import mini_qwen_eval
from mini_qwen.chat import TEMPLATE
from mini_qwen.evaluation import load_checkpoint
from mini_qwen.export import check_target, default_target, open_checkpoint, written_whole
from mini_qwen.generation import encode_prompt, generate
from mini_qwen.schemas import Turn
from mini_qwen.weights import DTYPES, EMBEDDING, OUTPUT

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS: list[list[Turn]] = [[{"role": "user", "content": text}] for text in ("Where does Anna live?", "小明呢？")]


@pytest.fixture(scope="module")
def exported(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPO checkpoint that the real programs made, for vLLM."""
    return export(road / "dpo", "vllm", tmp_path_factory.mktemp("export") / "dpo")


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder that a test may damage."""
    return save(tmp_path / "made", tiny_model(stage="sft"), tokenizer)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(3, 43)[None]).logits


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | values), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_transformers_loads_the_folder_with_the_same_logits_and_greedy_text(road: Path, exported: Path) -> None:
    ours, our_tokenizer = load_checkpoint(str(road / "dpo"))
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert theirs.dtype == torch.float32
    assert torch.equal(logits(theirs), logits(ours))
    prompts = [encode_prompt(our_tokenizer, turns, chat=True) for turns in QUESTIONS]
    for turns, prompt, answer in zip(QUESTIONS, prompts, generate(ours, our_tokenizer, prompts, 20), strict=True):
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert inputs["input_ids"][0].tolist() == prompt
        output = theirs.generate(**inputs, max_new_tokens=20)[0, len(prompt) :]
        assert tokenizer.decode(output, skip_special_tokens=True) == answer.text


def test_our_own_programs_answer_from_the_folder_as_from_the_checkpoint(
    road: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mini_qwen_eval.py --chat`, with its sampling."""

    def talk(folder: Path) -> str:
        typed = iter(["Where does Anna live?", "小明呢？", ""])
        monkeypatch.setattr(builtins, "input", lambda prompt="": next(typed))
        recipe = ["--config", str(ROOT / "recipes/demo/eval.yaml"), "--max_new_tokens", "12"]
        mini_qwen_eval.main([*recipe, "--chat", str(folder)])
        return capsys.readouterr().out

    said = talk(road / "dpo")
    assert len(said) > 60 and said.startswith("chat")
    assert talk(exported) == said


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_smaller_type_is_the_weights_cast(road: Path, tmp_path: Path, dtype: str) -> None:
    folder = export(road / "dpo", "vllm", tmp_path / dtype, "--dtype", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert theirs.dtype == DTYPES[dtype]
    cast = AutoModelForCausalLM.from_pretrained(road / "dpo", dtype=DTYPES[dtype]).eval()
    assert torch.equal(logits(theirs), logits(cast))


def test_the_stored_type_is_kept_when_none_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({key: value.bfloat16() for key, value in weights.items()}))
    stored = load_file(export(checkpoint, "vllm", tmp_path / "out") / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}


def test_what_the_folder_says_to_other_programs(road: Path, exported: Path) -> None:
    """Older versions pass over `rope_parameters` and `dtype` without a word, and compute with other values."""
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["training_stage"] == "dpo" and config["architectures"] == ["Qwen2ForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    generation = json.loads((exported / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.pad_token_id
    assert "do_sample" not in generation and "temperature" not in generation
    assert tokenizer.model_max_length == config["max_position_embeddings"]
    assert "generation" not in (exported / "chat_template.jinja").read_text(encoding="utf-8").replace(
        "add_generation", ""
    )
    assert {path.name for path in exported.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    } | {"chat_template.jinja"}  # fmt: skip
    words = " ".join(path.read_text(encoding="utf-8") for path in exported.glob("*.json*"))
    assert str(road) not in words


def test_a_pretrained_checkpoint_has_no_template(road: Path, tmp_path: Path) -> None:
    folder = export(road / "pt", "vllm", tmp_path / "pt")
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    model, tokenizer = load_checkpoint(str(folder))
    assert model.config.training_stage == "pt" and model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(logits(model), logits(load_checkpoint(str(road / "pt"))[0]))


def test_a_checkpoint_of_a_run_under_way_generates_with_its_cache(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, use_cache=False)
    folder = export(checkpoint, "vllm", tmp_path / "out")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["use_cache"] is True


def test_the_output_weight_that_deepspeed_stores_twice_is_stored_once(checkpoint: Path, tmp_path: Path) -> None:
    before = logits(AutoModelForCausalLM.from_pretrained(checkpoint).eval())
    edit_weights(checkpoint, lambda weights: weights.update({OUTPUT: weights[EMBEDDING].clone()}))
    folder = export(checkpoint, "vllm", tmp_path / "out")
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        assert OUTPUT not in stored.keys() and EMBEDDING in stored.keys()  # noqa: SIM118
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), before)


def test_an_output_weight_of_its_own_is_kept(
    tmp_path: Path, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = tiny_model(stage="sft").config
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    folder = export(save(tmp_path / "untied", model, tokenizer), "vllm", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert torch.equal(logits(loaded), logits(model))


def test_weights_in_several_files_are_one_model(checkpoint: Path, tmp_path: Path) -> None:
    before = logits(AutoModelForCausalLM.from_pretrained(checkpoint).eval())
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shutil.copytree(checkpoint, tmp_path / "shards", dirs_exist_ok=True)
    (tmp_path / "shards/model.safetensors").unlink()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    folder = export(tmp_path / "shards", "vllm", tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), before)


def differ(weights: dict[str, torch.Tensor]) -> None:
    weights[OUTPUT] = weights[EMBEDDING].clone()
    weights[OUTPUT][5, 7] += 0.001


def spoil(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][3] = torch.inf


BAD_WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "lm_head.weight and model.embed_tokens.weight with different values": (differ, "fp32"),
    "model.norm.weight is not finite": (spoil, "fp32"),
    "lacks the weight model.norm.weight": (lambda weights: weights.pop("model.norm.weight"), "fp32"),
    "stores model.extra.weight, which": (
        lambda weights: weights.update({"model.extra.weight": torch.ones(2)}),
        "fp32",
    ),
    r"stores model.norm.weight as \(3,\), but by its config.json it is \(32,\)": (
        lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
        "fp32",
    ),
    "stores model.norm.weight as torch.int8": (
        lambda weights: weights.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "fp32",
    ),
    r"model.norm.weight reaches 7e\+04, more than fp16 can hold \(6.55e\+04\)": (
        lambda weights: weights.update({"model.norm.weight": torch.full((32,), 70_000.0)}),
        "fp16",
    ),
}


@pytest.mark.parametrize("words", BAD_WEIGHTS)
def test_weights_that_are_not_the_models_are_refused(checkpoint: Path, tmp_path: Path, words: str) -> None:
    change, dtype = BAD_WEIGHTS[words]
    edit_weights(checkpoint, change)
    with pytest.raises(SystemExit, match=words):
        export(checkpoint, "vllm", tmp_path / "out", "--dtype", dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def add_second_file(folder: Path) -> None:
    save_file({EMBEDDING: torch.ones(2)}, folder / "more.safetensors")


def forget_stage(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["training_stage"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qw', encoding="utf-8")


BAD_FOLDERS: dict[str, Callable[[Path], Any]] = {
    "more.safetensors stores model.embed_tokens.weight, which another file": add_second_file,
    'does not say which stage made the checkpoint. Add "training_stage"': forget_stage,
    "config.json cannot be read": cut_config,
    "is a model of type gpt2; only qwen2": lambda folder: edit_config(folder, model_type="gpt2"),
    "The tokenizer has 400 tokens, but the model's vocab_size is 300": lambda folder: edit_config(
        folder, vocab_size=300
    ),
    "is not a checkpoint: it lacks tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "model.safetensors is damaged": lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"),
}


@pytest.mark.parametrize("words", BAD_FOLDERS)
@pytest.mark.parametrize("to", ["vllm", "gguf"])
def test_folders_that_are_no_checkpoint_are_refused(checkpoint: Path, tmp_path: Path, words: str, to: str) -> None:
    BAD_FOLDERS[words](checkpoint)
    with pytest.raises(SystemExit, match=words):
        export(checkpoint, to, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def test_damage_that_the_manifest_shows_is_refused(road: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(road / "sft", tmp_path / "sft"))
    edit_config(folder, rms_norm_eps=1e-5)
    with pytest.raises(SystemExit, match="is damaged: config.json"):
        export(folder, "gguf", tmp_path / "out")


def test_nothing_that_is_there_is_touched(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit, match="out' is there already. Remove it, or name another --output_dir"):
        export(checkpoint, "vllm", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out/mine.txt").unlink()
    export(checkpoint, "vllm", tmp_path / "out")  # an empty folder is as good as none
    assert (tmp_path / "out/model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"made", "out"}
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match="there already"):
        check_target(tmp_path / "file")


def test_a_link_to_an_empty_folder_is_filled_where_it_leads(checkpoint: Path, tmp_path: Path) -> None:
    """On the disk that was meant, whose room is what counts; the link stays."""
    (tmp_path / "disk/place").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/place")
    export(checkpoint, "vllm", tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/place/model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"made", "disk", "out"}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["place"]


def test_what_comes_into_the_empty_target_meanwhile_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="out' cannot be written"), written_whole(tmp_path / "out", 1) as folder:
        (folder / "weights").write_bytes(b"1")
        (tmp_path / "out/mine.txt").write_text("mine", encoding="utf-8")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_working_directory_is_no_target(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell whose folder is replaced sees nothing of what was written."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for target in (Path("."), Path("../out"), tmp_path / "out"):
        with pytest.raises(SystemExit, match="is the folder you are in"):
            export(checkpoint, "vllm", target)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")])
def test_an_export_that_ends_half_way_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    raised = SystemExit if isinstance(error, OSError) else type(error)
    with pytest.raises(raised), written_whole(tmp_path / "deep/out", 1) as folder:
        (folder / "half").write_bytes(b"1")
        assert not (tmp_path / "deep/out").exists()
        raise error
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_disk_without_room_is_said_first(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match="needs 1,000,000.02 GB, and its disk has"),
        written_whole(tmp_path / "x", 10**15),
    ):
        raise AssertionError("written to")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match="cannot be written"), written_whole(tmp_path / "file/out", 1):
        raise AssertionError("written to")


def test_exports_lie_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_target("results/dpo", "gguf") == Path("results/dpo-gguf")
    assert default_target("results/dpo/checkpoint-500", "vllm") == Path("results/dpo-checkpoint-500-vllm")
    assert default_target("results/dpo/", "hub") == Path("results/dpo-hub")
    assert default_target("dpo", "hub") == Path("dpo-hub")
    for name in ("dpo-2", "checkpoint-final", "old-checkpoint-5"):  # runs, and no step of one
        assert default_target(f"results/{name}", "vllm") == Path(f"results/{name}-vllm")
    run = tmp_path / "results/dpo-2"
    (run / "checkpoint-500").mkdir(parents=True)
    for folder, path in {
        run: "checkpoint-500",
        run / "checkpoint-500": ".",
        tmp_path: str(run / "checkpoint-500"),
    }.items():
        monkeypatch.chdir(folder)
        assert default_target(path, "vllm").resolve() == tmp_path / "results/dpo-2-checkpoint-500-vllm"


def test_the_checkpoint_itself_may_be_the_working_directory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkpoint)
    load_program().main([".", "--to", "vllm"])
    assert (checkpoint.parent / "made-vllm/model.safetensors").is_file()
    assert "made-vllm: 33,056 weights in fp32. vllm serve" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--push", "me/model"], ["--license", "mit"], ["--results", "x"], ["--language", "zh"]]
)
def test_what_only_the_hub_needs_is_refused_elsewhere(checkpoint: Path, tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit, match=f"{words[0]} is for --to hub, not --to gguf"):
        export(checkpoint, "gguf", tmp_path / "out", *words)


def test_the_training_template_needs_what_other_programs_lack(checkpoint: Path) -> None:
    opened = open_checkpoint(str(checkpoint))
    assert "{%- generation -%}" in TEMPLATE and opened.chat_template is not None
    assert "generation -%}" not in opened.chat_template
