"""mini_qwen/study.py and evaluation.py: what is finished stays finished, and what changed is measured again."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import MakeModel, save_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import mini_qwen_eval
from mini_qwen import cache, evaluation, study
from mini_qwen.checkpoint import write_manifest
from mini_qwen.comparison import Limits
from mini_qwen.decoding import DecodingGrid
from mini_qwen.evaluation import EvalData, evaluate
from mini_qwen.study import Loaded, Part, Study

PARTS = {"model", "documents", "questions", "preferences", "prompts", "decoding"}
ALL = {f"{name} {part}" for name in ("pt", "sft") for part in PARTS}
Files = dict[str, tuple[str, int]]  # checkpoint and part -> name and time of its file


class Workspace(NamedTuple):
    """Two checkpoints, data, and a finished study of them."""

    args: EvalData
    records: list[dict[str, Any]]
    data: Path
    checkpoints: Path


def find_parts(folder: str | Path) -> Files:
    """`pt-1a2b3c-questions-0f...json` as `pt questions`."""
    found = {}
    for file in (Path(folder) / "parts").iterdir():
        name, _, part, _ = file.name.split("-")
        assert f"{name} {part}" not in found, "of a part only the newest figures stay"
        found[f"{name} {part}"] = (file.name, file.stat().st_mtime_ns)
    return found


def measured(before: Files, after: Files) -> set[str]:
    return {part for part, file in after.items() if before.get(part) != file}


@pytest.fixture(scope="module", autouse=True)
def quick_sweeps() -> Iterator[None]:
    """Each checkpoint ends with a collection of garbage, which here would go through all that tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def workspace(
    tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Workspace:
    folder = tmp_path_factory.mktemp("study")
    for seed, stage in enumerate(("pt", "sft")):
        tiny_model(seed, stage=stage).save_pretrained(folder / stage)
        tokenizer.save_pretrained(folder / stage)
    data = folder / "data"
    turn = {"role": "assistant"}
    rows: dict[str, list[Any]] = {
        "documents": [{"text": "Anna lives near the river."}, {"text": "小明住在河边。"}],
        "unigram": [{"text": "Victor has a dog."}],
        "questions": [{"question": "Where?", "answer": "Here."}, {"question": "小雪？", "answer": "在。"}],
        "preferences": [
            {"prompt": "Hi", "chosen": [turn | {"content": "a"}], "rejected": [turn | {"content": "b c"}]}
        ],
    }
    files = {name: [str(save_rows(data / f"{name}.jsonl", found))] for name, found in rows.items()}
    args = EvalData(
        checkpoints=[str(folder / "pt"), str(folder / "sft")],
        output_dir=str(folder / "done"),
        documents=files["documents"],
        unigram_documents=files["unigram"],
        questions=files["questions"],
        preferences=files["preferences"],
        prompts=["Anna", "Where does 小明 live?"],
        decoding=DecodingGrid(temperatures=[0.7], top_ps=[0.9], samples=2, max_new_tokens=4),
        max_new_tokens=4,
        max_length=64,
    )
    return Workspace(args, evaluate(args), data, folder)


@pytest.fixture
def args(workspace: Workspace, tmp_path: Path) -> EvalData:
    """The recipe, with a copy of the finished study as its output."""
    shutil.copytree(workspace.args.output_dir, tmp_path / "eval")
    return replace(workspace.args, output_dir=str(tmp_path / "eval"))


@contextmanager
def changed(file: Path, content: bytes | None = None) -> Iterator[None]:
    """The file a second newer, with other content where that is given; as it was in the end."""
    old, times = file.read_bytes(), file.stat()
    file.write_bytes(old if content is None else content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    try:
        yield
    finally:
        file.write_bytes(old)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


def watch_loading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checkpoints that are loaded from now on, by the names of their folders."""
    loaded: list[str] = []
    real = evaluation.load_checkpoint

    def load(path: str) -> Loaded:
        loaded.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(evaluation, "load_checkpoint", load)
    return loaded


def test_every_part_of_every_checkpoint_is_kept(workspace: Workspace) -> None:
    assert set(find_parts(workspace.args.output_dir)) == ALL
    for record, stage in zip(workspace.records, ("pt", "sft"), strict=True):
        assert record["stage"] == stage
        assert {"bits_per_byte", "rouge_l", "preference_margin", "answers", "decoding"} <= set(record)
    assert workspace.records[0]["bits_per_byte"] != workspace.records[1]["bits_per_byte"]


def test_a_second_run_loads_no_model_and_says_the_same(
    workspace: Workspace, args: EvalData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = find_parts(args.output_dir)
    refuse_to_load(monkeypatch)
    assert evaluate(args) == workspace.records
    assert find_parts(args.output_dir) == before
    assert capsys.readouterr().out.count("as measured before") == len(ALL)


CHANGED_SETTINGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "length": ({"max_length": 65}, {"documents", "preferences"}),
    "answers": ({"max_new_tokens": 3}, {"questions", "prompts"}),
    "prompts": ({"prompts": ["Anna", "Victor"]}, {"prompts", "decoding"}),
    "grid": ({"decoding": DecodingGrid([0.7], [0.9], samples=1, max_new_tokens=4)}, {"decoding"}),
    "seed of the grid": ({"decoding": DecodingGrid([0.7], [0.9], samples=2, max_new_tokens=4, seed=1)}, {"decoding"}),
    "no unigram": ({"unigram_documents": []}, {"documents"}),
    # Neither decides a figure.
    "batches": ({"batch_size": 1}, set()),
    "chat": ({"temperature": 0.1, "top_p": 0.5}, set()),
    "limits": ({"limits": Limits(bits=0.5)}, set()),
}


@pytest.mark.parametrize("case", CHANGED_SETTINGS)
def test_a_changed_setting_is_measured_again_where_it_matters(args: EvalData, case: str) -> None:
    values, parts = CHANGED_SETTINGS[case]
    before = find_parts(args.output_dir)
    evaluate(replace(args, **values))
    after = find_parts(args.output_dir)
    assert measured(before, after) == {f"{name} {part}" for name in ("pt", "sft") for part in parts}
    assert set(after) == ALL


@pytest.mark.parametrize(
    ("name", "part"),
    [("documents", "documents"), ("unigram", "documents"), ("questions", "questions"), ("preferences", "preferences")],
)
def test_a_changed_data_file_is_measured_again(workspace: Workspace, args: EvalData, name: str, part: str) -> None:
    before, file = find_parts(args.output_dir), workspace.data / f"{name}.jsonl"
    with changed(file, file.read_bytes() + b"\n"):
        evaluate(args)
    assert measured(before, find_parts(args.output_dir)) == {f"pt {part}", f"sft {part}"}


def test_a_changed_checkpoint_is_measured_again_and_the_other_is_not_loaded(
    workspace: Workspace, args: EvalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, loaded = find_parts(args.output_dir), watch_loading(monkeypatch)
    with changed(workspace.checkpoints / "sft" / "generation_config.json"):
        evaluate(args)
    assert measured(before, find_parts(args.output_dir)) == {part for part in ALL if part.startswith("sft")}
    assert loaded == ["sft"]


def test_with_a_manifest_only_what_it_says_counts(workspace: Workspace, tmp_path: Path) -> None:
    """A copy of a checkpoint has new times; its manifest says that nothing differs."""
    folder = tmp_path / "sft"
    shutil.copytree(workspace.checkpoints / "sft", folder)
    args = replace(workspace.args, checkpoints=[str(folder)], output_dir=str(tmp_path / "eval"), parts=["documents"])
    write_manifest(folder, {}, 0.0)
    evaluate(args)
    before = find_parts(args.output_dir)
    with changed(folder / "model.safetensors"):
        evaluate(args)
    assert find_parts(args.output_dir) == before
    (folder / "note.txt").write_text("another file")
    write_manifest(folder, {}, 0.0)
    evaluate(args)
    assert measured(before, find_parts(args.output_dir)) == {"sft model", "sft documents"}


def test_changed_source_is_measured_again(args: EvalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same package in another place is the same; with another line in the metrics no figure is trusted."""
    package = tmp_path / "mini_qwen"
    shutil.copytree(Path(study.__file__).parent, package)
    for module in (study, cache):
        monkeypatch.setattr(module, "__file__", str(package / Path(module.__file__).name))
    before = find_parts(args.output_dir)
    evaluate(args)
    assert find_parts(args.output_dir) == before
    with (package / "metrics.py").open("a") as source:
        source.write("# counted otherwise\n")
    evaluate(args)
    assert measured(before, find_parts(args.output_dir)) == ALL


def test_a_run_that_dies_goes_on_where_it_was(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third part of the second checkpoint: the first one's parts and two of the second's are finished."""
    args = replace(workspace.args, output_dir=str(tmp_path / "eval"))
    real = evaluation.score_preferences

    def die(model: Any, *rest: Any) -> dict[str, Any]:
        if model.config.training_stage == "sft":
            raise MemoryError("planted")
        return real(model, *rest)

    with monkeypatch.context() as planted:
        planted.setattr(evaluation, "score_preferences", die)
        with pytest.raises(MemoryError, match="planted"):
            evaluate(args)
    before = find_parts(args.output_dir)
    assert set(before) == ALL - {"sft preferences", "sft prompts", "sft decoding"}

    loaded = watch_loading(monkeypatch)
    assert evaluate(args) == workspace.records
    assert loaded == ["sft"]
    assert measured(before, find_parts(args.output_dir)) == {"sft preferences", "sft prompts", "sft decoding"}


def test_parts_are_added_to_a_study(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = replace(workspace.args, output_dir=str(tmp_path / "eval"), parts=["documents", "prompts"])
    records = evaluate(args)
    assert all("answers" in record and "rouge_l" not in record for record in records)
    assert {name.split()[1] for name in find_parts(args.output_dir)} == {"model", "documents", "prompts"}
    before = find_parts(args.output_dir)
    assert evaluate(replace(args, parts=None)) == workspace.records
    assert {name.split()[1] for name in measured(before, find_parts(args.output_dir))} == {
        "questions",
        "preferences",
        "decoding",
    }
    refuse_to_load(monkeypatch)
    assert evaluate(args) == records


# What a Study does, with parts that only say that they were asked.

Count = Callable[..., Part]


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def count(asked: list[str]) -> Count:
    """Make a part that notes its name, and whose figure is how often any part was asked."""

    def make(name: str, settings: Any = None, files: list[str] | None = None, fails: bool = False) -> Part:
        def measure(*_: Any) -> dict[str, Any]:
            asked.append(name)
            if fails:
                raise RuntimeError("planted")
            return {name: len(asked)}

        return Part(name, settings, files or [], measure)

    return make


@pytest.fixture
def load(tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Loaded]:
    return lambda _: (tiny_model(), tokenizer)


def make_folder(folder: Path, content: str = "weights") -> str:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(content)
    return str(folder)


def test_folders_of_the_same_name_do_not_share_figures(
    tmp_path: Path, count: Count, load: Callable[[str], Loaded], asked: list[str]
) -> None:
    """The last checkpoints of two runs may both be called checkpoint-100, and be alike in size and time."""
    kept = Study(tmp_path / "eval")
    one, two = make_folder(tmp_path / "a" / "checkpoint-100"), make_folder(tmp_path / "b" / "checkpoint-100")
    for folder in (one, two):
        os.utime(Path(folder) / "model.safetensors", ns=(0, 0))
    assert kept.measure(one, [count("x")], load) == {"x": 1}
    assert kept.measure(two, [count("x")], load) == {"x": 2}
    assert kept.measure(one, [count("x")], load) == {"x": 1}  # not swept away by the other's
    assert asked == ["x", "x"]


def test_the_same_folder_by_another_name_is_the_same(
    tmp_path: Path, count: Count, load: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "pt")
    kept = Study(tmp_path / "eval")
    assert kept.measure(folder, [count("x")], load) == {"x": 1}
    monkeypatch.chdir(tmp_path)
    assert kept.measure("pt", [count("x")], load) == kept.measure("pt/", [count("x")], load) == {"x": 1}


def test_a_checkpoint_is_loaded_once_and_only_when_needed(tmp_path: Path, count: Count, load: Any) -> None:
    folder, loaded = make_folder(tmp_path / "pt"), []

    def noting(path: str) -> Loaded:
        loaded.append(path)
        return load(path)

    kept = Study(tmp_path / "eval")
    assert kept.measure(folder, [], noting) == {}
    assert loaded == []
    assert kept.measure(folder, [count("x"), count("y"), count("z")], noting) == {"x": 1, "y": 2, "z": 3}
    assert loaded == [folder]


def test_a_part_that_fails_leaves_nothing_behind(tmp_path: Path, count: Count, load: Any, asked: list[str]) -> None:
    folder, kept = make_folder(tmp_path / "pt"), Study(tmp_path / "eval")
    with pytest.raises(RuntimeError, match="planted"):
        kept.measure(folder, [count("x"), count("y", fails=True), count("z")], load)
    assert [file.name.split("-")[2] for file in kept.folder.iterdir()] == ["x"]
    assert kept.measure(folder, [count("x"), count("y"), count("z")], load) == {"x": 1, "y": 3, "z": 4}
    assert asked == ["x", "y", "y", "z"]


def test_figures_of_an_old_setting_stay_until_the_new_ones_are_there(tmp_path: Path, count: Count, load: Any) -> None:
    folder, kept = make_folder(tmp_path / "pt"), Study(tmp_path / "eval")
    assert kept.measure(folder, [count("x", 1)], load) == {"x": 1}
    with pytest.raises(RuntimeError, match="planted"):
        kept.measure(folder, [count("x", 2, fails=True)], load)
    assert kept.measure(folder, [count("x", 1)], load) == {"x": 1}
    assert kept.measure(folder, [count("x", 2)], load) == {"x": 3}
    assert len(list(kept.folder.iterdir())) == 1


def test_a_file_half_written_by_a_killed_run_is_not_taken_for_figures(tmp_path: Path, count: Count, load: Any) -> None:
    folder, kept = make_folder(tmp_path / "pt"), Study(tmp_path / "eval")
    file = kept.file(folder, count("x"))
    file.with_name(file.name + ".new").write_text('{"x": 9')
    assert kept.measure(folder, [count("x")], load) == {"x": 1}
    assert list(kept.folder.iterdir()) == [file]


@pytest.mark.parametrize("name", ["sft [final]", "检查点", "a*b?"])
def test_any_name_of_a_folder_is_fine(tmp_path: Path, count: Count, load: Any, name: str) -> None:
    folder, kept = make_folder(tmp_path / name), Study(tmp_path / "eval")
    assert kept.measure(folder, [count("x", 1)], load) == {"x": 1}
    assert kept.measure(folder, [count("x", 1)], load) == {"x": 1}
    assert kept.measure(folder, [count("x", 2)], load) == {"x": 2}
    assert len(list(kept.folder.iterdir())) == 1


def test_another_machine_or_version_is_measured_again(
    tmp_path: Path, count: Count, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report names one device, its threads and one version of each library; all its figures must be theirs."""
    folder, kept = make_folder(tmp_path / "pt"), Study(tmp_path / "eval")
    assert kept.measure(folder, [count("x")], load) == {"x": 1}
    versions = study.measure_versions()
    assert "rouge-score" in versions
    monkeypatch.setattr(study, "device_name", lambda: "cpu, 999 threads")
    assert kept.measure(folder, [count("x")], load) == {"x": 2}
    for number, name in enumerate(versions, 3):
        monkeypatch.setattr(study, "measure_versions", lambda name=name: versions | {name: "99"})
        assert kept.measure(folder, [count("x")], load) == kept.measure(folder, [count("x")], load) == {"x": number}


def test_ctrl_c_in_a_study_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: EvalData) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mini_qwen_eval, "evaluate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        mini_qwen_eval.main(["--checkpoints", "nowhere", "--output_dir", "out/here"])
    assert stopped.value.code == 130
    said = capsys.readouterr().err.strip()
    assert said == "Stopped. Finished parts are kept in out/here: the same command goes on."


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temperature", "-1", r"^temperature is -1\.0: 0 takes the most likely token"),
        ("top_p", "0", r"^top_p is 0\.0"),
        ("max_new_tokens", "0", "^max_new_tokens is 0, but must be 1 or more"),
    ],
)
def test_a_chat_with_a_number_that_means_nothing_is_refused_before_a_model_is_loaded(
    key: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        mini_qwen_eval.main(["--chat", "nowhere", f"--{key}", value])


def test_no_checkpoint_at_all_is_refused(args: EvalData) -> None:
    with pytest.raises(SystemExit, match="'checkpoints' is empty"):
        evaluate(replace(args, checkpoints=[]))
