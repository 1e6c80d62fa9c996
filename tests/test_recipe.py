"""mini_qwen/recipe.py, and every recipe in the tree: strict about keys and types, helpful about mistakes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from conftest import ROOT

from mini_qwen.conversations import ConversationData
from mini_qwen.documents import DocumentData
from mini_qwen.evaluation import EvalData
from mini_qwen.model import NewModel, TrainedModel
from mini_qwen.preferences import PreferenceData
from mini_qwen.recipe import find_recipe, parse_recipe
from mini_qwen.training import AnswerConfig, PreferenceConfig, PTConfig
from mini_qwen_tokenizer import TokenizerData

STAGES: dict[str, tuple[type, ...]] = {
    "tokenizer": (TokenizerData,),
    "pt": (DocumentData, PTConfig, NewModel),
    "sft": (ConversationData, AnswerConfig, TrainedModel),
    "dpo": (PreferenceData, PreferenceConfig, TrainedModel),
    "eval": (EvalData,),
}
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@dataclass
class Toy:
    size: int
    rate: float = 0.5
    name: str = "x"
    flag: bool = False
    kind: Literal["big", "small"] = "big"
    files: list[str] = field(default_factory=list)
    limit: float | None = None
    count: int | None = None
    extra_files: list[str] | None = None
    either: int | bool = 0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size {self.size} is below 0")


@dataclass
class Shadowed:
    size: str = "own"
    other: int = 7


@dataclass
class Hidden:
    size: int = 1


def parse(tmp_path: Path, text: str, *argv: str, classes: tuple[type, ...] = (Toy,)) -> tuple[Any, ...]:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(text, encoding="utf-8")
    return parse_recipe(*classes, argv=list(argv), default=str(recipe))


def refusal(tmp_path: Path, text: str, *argv: str, classes: tuple[type, ...] = (Toy,)) -> str:
    with pytest.raises(SystemExit) as error:
        parse(tmp_path, text, *argv, classes=classes)
    assert isinstance(error.value.code, str)
    return error.value.code


def test_the_walk_finds_the_recipes() -> None:
    names = {path.relative_to(ROOT / "recipes").as_posix() for path in RECIPES}
    assert names >= {f"demo/{stage}.yaml" for stage in STAGES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT / "recipes").as_posix())
def test_every_recipe_loads_strictly(path: Path) -> None:
    """By its stage's classes. Its keys arrive as written, but for those that a class may still turn into others."""
    classes = STAGES[path.stem.partition("_")[0]]
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    argv = ["--config", str(path)] + (["--needs_gpu", "false"] if "needs_gpu" in written else [])
    parts = parse_recipe(*classes, argv=argv, default="none")
    assert tuple(type(part) for part in parts) == classes
    for key in set(written) - {"needs_gpu", "precision", "bf16", "fp16", "report_to"}:
        owner = next(part for part in parts if hasattr(part, key))
        assert arrived(getattr(owner, key), written[key]), key


def arrived(value: object, written: object) -> bool:
    """Whether a key has the value that was written, in mappings and in dataclasses made of them as well."""
    if isinstance(written, dict) and not isinstance(value, dict):
        return all(arrived(getattr(value, key), inner) for key, inner in written.items())
    if isinstance(written, dict):
        return value.keys() == written.keys() and all(arrived(value[key], inner) for key, inner in written.items())
    return value in (written, [written])


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("decoding: {temperature: [1.0]}", "decoding.temperature", "unexpected keyword argument"),
        ("decoding: {samples: many}", "decoding.samples", "'many'"),
        ("choices: {exam: {questions: a.jsonl, shot: b.jsonl}}", "choices.exam.shot", "unexpected keyword argument"),
        ("choices: {exam: {questions: a.jsonl, score: best}}", "choices.exam.score", "'letter' or 'text'"),
        ("classification: {news: {files: [a.csv], by: [guess]}}", "classification.news.by", "guess"),
        ("limits: {loss: 0.1}", "limits.loss", "unexpected keyword argument"),
    ],
)
def test_a_wrong_key_inside_a_value_is_named(tmp_path: Path, text: str, name: str, words: str) -> None:
    message = refusal(tmp_path, f"checkpoints: [results/pt]\n{text}\n", classes=STAGES["eval"])
    assert f"'{name}'" in message and words in message


def test_values_arrive_with_their_types(tmp_path: Path) -> None:
    text = "size: 3\nrate: 1\nname: 小明\nflag: true\nkind: small\nfiles: [a, b]\nlimit: null\ncount: null\n"
    (toy,) = parse(tmp_path, text)
    assert toy == Toy(3, 1.0, "小明", True, "small", ["a", "b"], None, None)
    assert type(toy.rate) is float


@pytest.mark.parametrize("text", ["1e-4", '"1e-4"', "1.0e-4", "0.0001"])
@pytest.mark.parametrize("key", ["rate", "limit"])
def test_numbers_that_yaml_takes_for_text_become_floats(tmp_path: Path, key: str, text: str) -> None:
    (toy,) = parse(tmp_path, f"size: 1\n{key}: {text}\n")
    assert getattr(toy, key) == 1e-4
    (toy,) = parse(tmp_path, "size: 1\n", f"--{key}", text.strip('"'))
    assert getattr(toy, key) == 1e-4


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--size", "5"], "size", 5),
        (["--size=5"], "size", 5),
        (["--size", "-5", "--size", "6"], "size", 6),
        (["--rate", "-0.5"], "rate", -0.5),
        (["--name=a=b"], "name", "a=b"),
        (["--name=results/run-1"], "name", "results/run-1"),
        (["--name", "results/run-1"], "name", "results/run-1"),
        (["--name", "a: b: c"], "name", "a: b: c"),
        (["--flag"], "flag", True),
        (["--flag", "true"], "flag", True),
        (["--flag=false"], "flag", False),
        (["--files", "a"], "files", ["a"]),
        (["--files", "a", "b"], "files", ["a", "b"]),
        (["--files=[a, b]"], "files", ["a", "b"]),
        (["--extra-files", "a", "b"], "extra_files", ["a", "b"]),
        (["--extra_files", "a"], "extra_files", ["a"]),
        (["--count", "null"], "count", None),
        (["--count", "4"], "count", 4),
        (["--kind", "small"], "kind", "small"),
        (["--either", "true"], "either", True),
    ],
)
def test_overrides_in_every_spelling(tmp_path: Path, argv: list[str], key: str, value: object) -> None:
    (toy,) = parse(tmp_path, "size: 1\nflag: false\ncount: 2\n", *argv)
    assert getattr(toy, key) == value
    assert type(getattr(toy, key)) is type(value)


def test_the_command_line_wins_and_config_names_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("size: 2\nname: other\n", encoding="utf-8")
    for spelling in (["--config", str(tmp_path / "other.yaml")], [f"--config={tmp_path / 'other.yaml'}"]):
        (toy,) = parse(tmp_path, "size: 1\n", *spelling, "--size", "9")
        assert (toy.size, toy.name) == (9, "other")


@pytest.mark.parametrize(
    "line", ["flie: x", "flag_: x", "filess: x", "file: x"], ids=["swapped", "underscore", "plural", "singular"]
)
def test_an_unknown_key_names_its_value_place_and_the_nearest(tmp_path: Path, line: str) -> None:
    key = line.partition(":")[0]
    nearest = {"flie": "files", "flag_": "flag", "filess": "files", "file": "files"}[key]
    message = refusal(tmp_path, f"size: 1\n{line}\n")
    for part in (f"'{key}'", "'x'", str(tmp_path / "toy.yaml"), f"'{nearest}'"):
        assert part in message
    assert "command line" in refusal(tmp_path, "size: 1\n", f"--{key}", "x")


def test_an_unknown_key_like_none_is_refused_as_well(tmp_path: Path) -> None:
    assert "'zzzzzz'" in refusal(tmp_path, "size: 1\nzzzzzz: 1\n")


@pytest.mark.parametrize("line", ["3: x", "no: x", "null: x"])
def test_a_key_that_is_no_text_is_refused(tmp_path: Path, line: str) -> None:
    """YAML reads `no` as false."""
    assert "toy.yaml" in refusal(tmp_path, f"size: 1\n{line}\n")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", "big"),
        ("size", "1.5"),
        ("size", "[1, 2]"),
        ("size", "null"),
        ("rate", "fast"),
        ("name", "[x]"),
        ("name", "null"),
        ("flag", "maybe"),
        ("flag", "3"),
        ("kind", "medium"),
        ("files", "{a: b}"),
        ("files", "[1, [2]]"),
        ("count", "many"),
        # A boolean is no number, though Python counts with it, and no text.
        ("size", "true"),
        ("size", "yes"),
        ("rate", "false"),
        ("limit", "true"),
        ("count", "false"),
        ("name", "true"),
        ("files", "true"),
    ],
)
def test_a_wrong_type_names_key_and_value(tmp_path: Path, key: str, value: str) -> None:
    message = refusal(tmp_path, f"{'' if key == 'size' else 'size: 1'}\n{key}: {value}\n")
    assert f"'{key}'" in message
    assert repr(yaml.safe_load(value)) in message
    assert str(tmp_path / "toy.yaml") in message


@pytest.mark.parametrize("text", ["no", '"no"'])
def test_an_unquoted_no_is_the_strategy_of_that_name(tmp_path: Path, text: str) -> None:
    """As in `save_strategy: no`, which YAML reads as false; other texts must be quoted."""
    path = tmp_path / "pt.yaml"
    path.write_text(f"output_dir: out\nsave_strategy: {text}\n", encoding="utf-8")
    for argv in (["--config", str(path)], ["--config", str(path), "--save_strategy", "no"]):
        (args,) = parse_recipe(PTConfig, argv=argv, default="")
        assert args.save_strategy == "no"
    assert "'name' is False" in refusal(tmp_path, "size: 1\nname: no\n")


@pytest.mark.parametrize("text", ["false", "Translate: hello", "Who is Anna #1?", "12"])
def test_text_on_the_command_line_stays_as_typed(tmp_path: Path, text: str) -> None:
    (toy,) = parse(tmp_path, "size: 1\n", "--name", text)
    assert toy.name == text


@pytest.mark.parametrize("key", ["bf16", "use_cpu", "fp16_full_eval", "torch_compile_backend", "torch_compile_mode"])
def test_a_key_that_would_have_no_effect_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "pt.yaml"
    path.write_text(f"output_dir: out\n{key}: true\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=rf"'{key}'.*no effect.*Set instead"):
        parse_recipe(PTConfig, argv=["--config", str(path)], default="")


def test_a_wrong_choice_names_the_right_ones(tmp_path: Path) -> None:
    message = refusal(tmp_path, "size: 1\nkind: medium\n")
    assert "'big', 'small'" in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "size" in refusal(tmp_path, "rate: 1\n")


def test_what_a_class_refuses_comes_with_the_recipes_name(tmp_path: Path) -> None:
    message = refusal(tmp_path, "size: -1\n")
    assert "size -1 is below 0" in message
    assert "toy.yaml" in message


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n", "a: [\n"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    assert "toy.yaml" in refusal(tmp_path, text)


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(SystemExit, match=r"recipes/no_such\.yaml"):
        parse_recipe(Toy, argv=["--config", "recipes/no_such.yaml"], default="recipes/pt.yaml")


def test_a_config_flag_without_a_path_is_refused(tmp_path: Path) -> None:
    assert "config" in refusal(tmp_path, "size: 1\n", "--config")


def test_words_that_belong_to_no_key_are_refused(tmp_path: Path) -> None:
    assert "'5'" in refusal(tmp_path, "size: 1\n", "5")


def test_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("recipes/demo/pt.yaml") == ROOT / "recipes/demo/pt.yaml"
    (tmp_path / "recipes/demo").mkdir(parents=True)
    (tmp_path / "recipes/demo/pt.yaml").write_text("size: 1\n", encoding="utf-8")
    assert find_recipe("recipes/demo/pt.yaml").resolve() == tmp_path / "recipes/demo/pt.yaml"


def test_an_earlier_class_hides_a_later_ones_key(tmp_path: Path) -> None:
    toy, shadowed = parse(tmp_path, "size: 3\nother: 8\n", classes=(Toy, Shadowed))
    assert (toy.size, shadowed.size, shadowed.other) == (3, "own", 8)
    shadowed, toy = parse(tmp_path, "size: text\n", "--size", "4x", classes=(Shadowed, Hidden))
    assert (shadowed.size, toy.size) == ("4x", 1)


def test_packing_is_ours_and_hides_trls(tmp_path: Path) -> None:
    text = f"train_files: [x]\ncheckpoint: y\noutput_dir: {tmp_path}\npacking: true\n"
    data, training, _ = parse(tmp_path, text, classes=STAGES["sft"])
    assert data.packing is True
    assert training.packing is False


def test_a_recipe_for_a_gpu_is_refused_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = f"train_files: [x]\noutput_dir: {tmp_path}\nneeds_gpu: true\n"
    message = refusal(tmp_path, text, classes=STAGES["pt"])
    assert "needs_gpu" in message
    assert "recipes/demo" in message
    _, training, _ = parse(tmp_path, text, "--needs_gpu", "false", classes=STAGES["pt"])
    assert training.use_cpu
