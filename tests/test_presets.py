"""mini_qwen/presets.py, and the presets that come with the project."""

import json
from itertools import permutations
from pathlib import Path

import pytest
from conftest import ROOT, WriteRows

from mini_qwen.presets import Preset, read_presets

SHIPPED = ROOT / "mini_data/arena/presets.csv"


def test_a_table_with_all_columns(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_bytes('\ufeffprompt,system,name\n"a, ""b""\nc",be kind,first\n小明？,,\n'.encode())
    assert read_presets(str(file)) == [Preset("first", 'a, "b"\nc', "be kind"), Preset("小明？", "小明？", "")]


def test_other_files(write_rows: WriteRows) -> None:
    rows = [{"prompt": "one", "id": 7}, {"prompt": "x" * 100, "system": None}]
    assert read_presets(str(write_rows("a.jsonl", rows))) == [
        Preset("one", "one", ""),
        Preset("x" * 60, "x" * 100, ""),
    ]
    assert read_presets(str(write_rows("a.txt", [{"text": "one"}, {"text": "two"}])))[1] == Preset("two", "two", "")
    assert read_presets(None) == []


def test_each_has_a_name_of_its_own(write_rows: WriteRows) -> None:
    rows = [{"prompt": text, "name": "same"} for text in "abc"]
    assert [preset.name for preset in read_presets(str(write_rows("a.csv", rows)))] == ["same", "same (2)", "same (3)"]


def test_so_has_one_whose_own_name_ends_like_a_number_of_ours(write_rows: WriteRows) -> None:
    for names in set(permutations(["A", "A", "A (2)", "A (2)", "A (3)"])):
        rows = [{"prompt": str(number), "name": name} for number, name in enumerate(names)]
        presets = read_presets(str(write_rows("a.jsonl", rows)))
        assert len({preset.name for preset in presets}) == len(names), names
        assert [preset.prompt for preset in presets] == list("01234")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("question\nx\n", "row 0 has no prompt"),
        ("prompt,name\nx,y\n ,z\n", "row 1 has no prompt"),
        ("prompt,name\nx\n", "row 0 cannot be read"),
        ("prompt,name\n", "holds no preset"),
    ],
)
def test_what_is_no_preset_is_refused_with_its_row(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "mine.csv").write_text(text)
    pytest.raises(SystemExit, read_presets, str(tmp_path / "mine.csv")).match(says)


def test_a_missing_file_is_named() -> None:
    pytest.raises(SystemExit, read_presets, "nowhere.csv").match("nowhere.csv")


def test_those_of_the_project_ask_about_its_world_in_both_languages() -> None:
    prompts = [preset.prompt for preset in read_presets(str(SHIPPED))]
    assert len(prompts) == len(set(prompts)) >= 10
    lines = (ROOT / "mini_data/eval/questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    known = [prompt for prompt in prompts if any(prompt in question for question in questions)]
    assert len([prompt for prompt in known if prompt.isascii()]) >= 4
    assert len([prompt for prompt in known if not prompt.isascii()]) >= 4
