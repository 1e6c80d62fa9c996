"""mini_qwen/prompts.py: texts and files of prompts, in their order."""

from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRows

from mini_qwen.prompts import read_prompts


@pytest.mark.parametrize(
    "text",
    [
        "Where does Anna live?",
        "小明住在哪里？",
        "results/pt",
        "/etc/hosts",
        "./run.sh",
        "What is in data.txt?",
        "first line\nnotes.txt",
        " leading blanks stay",
        "a" * 5000,
    ],
)
def test_texts_are_taken_as_they_are(text: str) -> None:
    """Also what looks like a path: only the ending of a data file, on one line, makes an item one."""
    assert read_prompts([text]) == [text]


def test_a_folder_that_exists_is_a_text_all_the_same(tmp_path: Path) -> None:
    assert read_prompts([str(tmp_path)]) == [str(tmp_path)]


def test_nothing_asked_is_nothing() -> None:
    assert read_prompts([]) == []


def test_lines_of_a_text_file(write_rows: WriteRows) -> None:
    file = write_rows("prompts.txt", [{"text": "Where?"}, {"text": "  "}, {"text": "小明？"}, {"text": ""}])
    assert read_prompts([str(file)]) == ["Where?", "小明？"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json", "prompts.parquet", "prompts.csv", "p.jsonl.gz"])
@pytest.mark.parametrize("column", ["prompt", "question", "instruction", "text"])
def test_rows_of_every_kind_of_file(write_rows: WriteRows, name: str, column: str) -> None:
    file = write_rows(name, [{column: "Where?", "other": "no"}, {column: "小明？", "other": "no"}])
    assert read_prompts([str(file)]) == ["Where?", "小明？"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.parquet"])
def test_of_turns_the_first_is_asked(write_rows: WriteRows, name: str) -> None:
    """As MT-bench has them: the second turn asks about an answer that was never given."""
    file = write_rows(name, [{"turns": ["Write a poem.", "Now without rhymes."]}, {"turns": ["Hi"]}])
    assert read_prompts([str(file)]) == ["Write a poem.", "Hi"]


def test_the_first_column_that_says_something_counts(write_rows: WriteRows) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "5", "instruction": "3", "question": "2", "prompt": "1"},
        {"text": "5", "instruction": "3", "question": "2", "prompt": None},
        {"text": "5", "instruction": "3", "question": "", "prompt": None},
        {"text": "5", "turns": ["6"]},
        {"turns": ["6"]},
    ]
    assert read_prompts([str(write_rows("p.jsonl", rows))]) == ["1", "2", "3", "5", "6"]


def test_texts_and_files_stand_in_the_order_of_the_recipe(write_rows: WriteRows) -> None:
    one = str(write_rows("one.txt", [{"text": "b"}, {"text": "c"}]))
    two = str(write_rows("two.jsonl", [{"prompt": "e"}]))
    assert read_prompts(["a", one, "d", two, "a"]) == ["a", "b", "c", "d", "e", "a"]


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.csv"])
def test_an_empty_file_is_refused_with_the_cure(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("prompt\n" if name.endswith("csv") else "\n \n" if name.endswith("txt") else "")
    with pytest.raises(SystemExit, match=rf"The prompt file '.*{name}' is empty\. Write one prompt a line"):
        read_prompts(["Where?", str(tmp_path / name)])


def test_the_name_of_a_file_may_have_blanks(write_rows: WriteRows) -> None:
    file = write_rows("my  questions.txt", [{"text": "Where?"}, {"text": "小明？"}])
    assert read_prompts([str(file)]) == ["Where?", "小明？"]


@pytest.mark.parametrize("name", ["nowhere.txt", "no where.jsonl.gz", "a " * 400 + ".txt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit, match=rf"no data at '.*{name}', which ends like a file of prompts"):
        read_prompts([str(tmp_path / name)])


@pytest.mark.parametrize(
    "row", [{"answer": "x"}, {"prompt": 5}, {"turns": []}, {"turns": [None]}, {"turns": [["a"]]}, {"prompt": None}, {}]
)
def test_a_row_without_a_prompt_is_named_with_the_cure(write_rows: WriteRows, row: dict[str, Any]) -> None:
    file = write_rows("p.jsonl", [{"prompt": "Where?"}, row])
    with pytest.raises(
        SystemExit, match=r"p\.jsonl, row 1(: '\w+' is .*, but must be text| has no prompt: put a text under one of)"
    ):
        read_prompts([str(file)])


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_a_prompt_of_nothing_is_refused(text: str) -> None:
    """A pretrained checkpoint would have nothing to continue, and say so in the middle of a study."""
    with pytest.raises(SystemExit, match="prompt"):
        read_prompts(["Where?", text])
