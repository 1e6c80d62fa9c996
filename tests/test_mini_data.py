"""mini_data is what its generator says, byte for byte, and nothing that eval asks is trained on."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MINI_DATA = ROOT / "mini_data"
BY_HAND = "arena"  # the presets of the web page; all else is generated


def files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def questions() -> list[dict[str, str]]:
    lines = (MINI_DATA / "eval" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def trained_turns() -> list[tuple[str, str]]:
    """(question, answer) of every SFT and DPO training row."""
    pairs = []
    for file in sorted((MINI_DATA / "sft").rglob("*.parquet")):
        for turns in pq.read_table(file, columns=["conversations"])["conversations"].to_pylist():
            spoken = [turn["value"] for turn in turns if turn["from"] != "system"]
            pairs += list(zip(spoken[::2], spoken[1::2], strict=True))
    for row in pq.read_table(MINI_DATA / "dpo" / "train-00000-of-00001.parquet").to_pylist():
        pairs += [(row["prompt"], row[side][-1]["content"]) for side in ("chosen", "rejected")]
    return pairs


def test_generator_writes_the_same_bytes_again(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "utils" / "make_mini_data.py"), "--target", str(tmp_path / "mini_data")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    generated = [name for name in files(MINI_DATA) if name.parts[0] != BY_HAND]
    assert files(tmp_path / "mini_data") == generated
    for name in generated:
        assert (tmp_path / "mini_data" / name).read_bytes() == (MINI_DATA / name).read_bytes(), name


def test_size_and_layout() -> None:
    assert sum((MINI_DATA / name).stat().st_size for name in files(MINI_DATA)) <= 3_000_000
    for file in (MINI_DATA / "pt").rglob("*.parquet"):
        _, language, quality, _ = file.relative_to(MINI_DATA / "pt").parts
        assert language in ("chinese", "english") and quality == "high"
    ids = {pq.read_schema(file).field("id").type for file in (MINI_DATA / "sft").rglob("*.parquet")}
    assert {str(kind) for kind in ids} == {"int64", "string"}


def test_held_out_documents_stand_nowhere_in_the_training_documents() -> None:
    held_out = set(pq.read_table(MINI_DATA / "eval" / "documents.parquet")["text"].to_pylist())
    trained = {
        text
        for file in (MINI_DATA / "pt").rglob("*.parquet")
        for text in pq.read_table(file, columns=["text"])["text"].to_pylist()
    }
    assert len(held_out) == 200
    assert not held_out & trained


def test_unasked_facts_are_the_answer_to_no_question_and_stand_in_the_documents() -> None:
    answers = {answer for _, answer in trained_turns()}
    unasked = [row for row in questions() if row["group"] == "unasked_fact"]
    documents = "".join(
        text
        for file in (MINI_DATA / "pt").rglob("*.parquet")
        for text in pq.read_table(file, columns=["text"])["text"].to_pylist()
    )
    assert len(unasked) >= 30
    for row in unasked:
        assert row["answer"] not in answers
        assert row["answer"] in documents


def test_each_choice_is_one_right_answer_among_three_others_of_its_kind_in_any_place() -> None:
    lines = (MINI_DATA / "eval" / "choices.jsonl").read_text(encoding="utf-8").splitlines()
    choices = [json.loads(line) for line in lines]
    groups = {row["answer"]: row["group"] for row in questions()}
    assert len(choices) == len(groups) == 192
    for row in choices:
        options = [row[letter] for letter in "ABCD"]
        assert len(set(options)) == 4
        assert [option in groups for option in options] == [letter == row["answer"] for letter in "ABCD"]
        assert groups[row[row["answer"]]] == row["subject"]
    assert Counter(row["answer"] for row in choices) == dict.fromkeys("ABCD", 48)
    trained = {question for question, _ in trained_turns()}
    assert not trained & {row["question"] for row in choices if row["subject"] == "new_wording"}


def test_new_wordings_stand_in_no_training_row() -> None:
    trained = {question for question, _ in trained_turns()}
    asked = [row for row in questions() if row["group"] == "new_wording"]
    assert len(asked) >= 200
    assert not trained & {row["question"] for row in asked}


@pytest.fixture(scope="module")
def generator() -> Any:
    spec = importlib.util.spec_from_file_location("make_mini_data", ROOT / "utils" / "make_mini_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dpo_test_asks_nothing_that_dpo_trains(generator: Any) -> None:
    world = yaml.safe_load((ROOT / "utils" / "mini_world.yaml").read_text(encoding="utf-8"))
    openings = [opening for words in world.values() for opening in words["asking"] if opening]

    def bare(prompt: str) -> str:
        for opening in openings:
            prompt = prompt.removeprefix(opening)
        return prompt

    prompts = {
        part: {bare(row) for row in pq.read_table(file)["prompt"].to_pylist()}
        for part in ("train", "test")
        for file in (MINI_DATA / "dpo").glob(f"{part}-*.parquet")
    }
    assert not prompts["train"] & prompts["test"]


def test_dpo_test_judges_no_pair_of_answers_that_dpo_trains() -> None:
    pairs = {
        part: {
            (row["chosen"][-1]["content"], row["rejected"][-1]["content"])
            for file in (MINI_DATA / "dpo").glob(f"{part}-*.parquet")
            for row in pq.read_table(file).to_pylist()
        }
        for part in ("train", "test")
    }
    assert pairs["test"] and not pairs["train"] & pairs["test"]
