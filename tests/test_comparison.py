"""mini_qwen/comparison.py: who was trained from whom, and which figures became worse by more than chance."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mini_qwen.comparison import (
    Change,
    Limits,
    add_reward_accuracy,
    compare,
    compared_figures,
    find_parents,
    read_parent,
)
from mini_qwen.recipe import check_type

PARENTS = {"b": "a"}


def record(checkpoint: str, stage: str = "pt", **figures: Any) -> dict[str, Any]:
    return {"checkpoint": checkpoint, "stage": stage, "parameters": 1000} | figures


def changes(before: dict[str, Any], after: dict[str, Any], limits: Limits | None = None) -> dict[str, Change]:
    """By the name of the figure; the checkpoint `b` was trained from `a`."""
    found = compare([record("a", **before), record("b", "sft", **after)], PARENTS, limits or Limits())
    assert all((change.parent, change.checkpoint) == ("a", "b") for change in found)
    return {change.figure: change for change in found}


MANY = 10**12  # questions: the standard error is next to nothing


def accuracy(value: float, num: int = MANY) -> dict[str, Any]:
    return {"accuracy_facts": value, "num_questions_facts": num}


def test_the_limit_of_an_accuracy_by_hand() -> None:
    """94 and 70 of 96, with two of each kind 96 and 72 of 100: sqrt(.96 * .04 / 100) and sqrt(.72 * .28 / 100)."""
    change = changes(accuracy(94 / 96, 96), accuracy(70 / 96, 96))["exact match, facts"]
    assert (change.before, change.after) == (94 / 96, 70 / 96)
    assert change.limit == pytest.approx(94 / 96 - 2 * math.hypot(0.0195959, 0.0448999) * 100 / 96)
    assert change.is_worse
    assert not changes(accuracy(94 / 96, 96), accuracy(88 / 96, 96))["exact match, facts"].is_worse


@pytest.mark.parametrize(("num", "is_worse"), [(1, False), (2, False), (3, False), (4, True)])
def test_from_all_right_to_none_of_a_few_is_no_verdict(num: int, is_worse: bool) -> None:
    """The plain error of both is 0. Of 3: 2 * sqrt(2 * 5/7 * 2/7 / 7) * 7/3 = 1.13, more than any fall; of 4, 0.87."""
    assert changes(accuracy(1.0, num), accuracy(0.0, num))["exact match, facts"].is_worse is is_worse


def test_repetition_of_one_answer_is_no_figure_to_compare() -> None:
    one = {"repetition_4gram": 0.0, "stop_rate": 1.0, "num_answers": 1, "repetition_standard_error": 0.0}
    assert set(changes(one, one | {"repetition_4gram": 0.9})) == {"answers that stop"}
    two = one | {"num_answers": 2}
    assert set(changes(two, two | {"repetition_4gram": 0.9})) == {"answers that stop", "4-gram repetition of answers"}


def test_groups_of_like_names_are_not_compared_with_one_another() -> None:
    before = {"accuracy_a_b": 0.9, "num_questions_a_b": MANY, "accuracy_a b": 0.1, "num_questions_a b": MANY}
    found = changes(before, before | {"accuracy_a_b": 0.5})
    assert {name: (change.before, change.after) for name, change in found.items()} == {
        "exact match, a_b": (0.9, 0.5),
        "exact match, a b": (0.1, 0.1),
    }


@pytest.mark.parametrize(
    ("before", "after", "is_worse"),
    [(0.5, 0.4801, False), (0.5, 0.4799, True), (0.5, 0.9, False), (0.0, 0.0, False), (0.01, 0.0, False)],
)
def test_of_an_accuracy_without_noise_the_limit_alone_counts(before: float, after: float, is_worse: bool) -> None:
    change = changes(accuracy(before), accuracy(after))["exact match, facts"]
    assert change.limit == pytest.approx(max(0, before - 0.02))
    assert change.is_worse == is_worse


@pytest.mark.parametrize(
    ("after", "is_worse"),
    [(1.0, False), (2.09, False), (2.1, False), (2.11, True), (math.inf, True), (math.nan, True)],
)
def test_bits_may_rise_by_a_share_of_the_parents(after: float, is_worse: bool) -> None:
    change = changes({"bits_per_byte": 2.0}, {"bits_per_byte": after})["bits per byte of held-out documents"]
    assert change.limit == pytest.approx(2.1)
    assert change.is_worse == is_worse


@pytest.mark.parametrize(("after", "is_worse"), [(0.0, False), (0.149, False), (0.151, True)])
def test_repetition_may_rise_by_so_much(after: float, is_worse: bool) -> None:
    before = {"repetition_4gram": 0.1, "stop_rate": 1.0, "num_answers": 10_000, "repetition_standard_error": 0.0}
    change = changes(before, before | {"repetition_4gram": after})["4-gram repetition of answers"]
    assert change.limit == pytest.approx(0.15)
    assert change.is_worse == is_worse


def test_limits_are_those_of_the_recipe() -> None:
    before = {
        "bits_per_byte": 2.0,
        "repetition_4gram": 0.1,
        "stop_rate": 0.9,
        "num_answers": 10_000,
        "repetition_standard_error": 0.0,
        **accuracy(0.5),
    }
    after = {
        "bits_per_byte": 2.3,
        "repetition_4gram": 0.25,
        "stop_rate": 0.8,
        "num_answers": 10_000,
        "repetition_standard_error": 0.0,
        **accuracy(0.4),
    }
    assert all(change.is_worse for change in changes(before, after).values())
    assert len(changes(before, after)) == 4
    wide = Limits(bits=0.2, repetition=0.2, accuracy=0.2)
    assert not any(change.is_worse for change in changes(before, after, wide).values())
    with pytest.raises(SystemExit, match="limits"):
        check_type(Holder, "limits", {"bit": 1}, "in a recipe")


class Holder:
    limits: Limits


CHOICE = {"accuracy": 0.4, "num_questions": 48}
OUTCOME = {"accuracy": 0.4}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "bits": ({"bits_per_byte": 1.0}, {"bits_per_byte": 1.1}, "bits per byte of held-out documents"),
    "repetition": (
        {"repetition_4gram": 0.0, "stop_rate": 1.0, "num_answers": 10_000, "repetition_standard_error": 0.0},
        {"repetition_4gram": 0.1, "stop_rate": 1.0, "num_answers": 10_000, "repetition_standard_error": 0.0},
        "4-gram repetition of answers",
    ),
    "stopping": (
        {"repetition_4gram": 0.0, "stop_rate": 1.0, "num_answers": 10_000, "repetition_standard_error": 0.0},
        {"repetition_4gram": 0.0, "stop_rate": 0.9, "num_answers": 10_000, "repetition_standard_error": 0.0},
        "answers that stop",
    ),
    "stopping after prompts": (
        {
            "prompt_manners": {
                "repetition_4gram": 0.0,
                "stop_rate": 1.0,
                "num_answers": 10_000,
                "repetition_standard_error": 0.0,
            }
        },
        {
            "prompt_manners": {
                "repetition_4gram": 0.0,
                "stop_rate": 0.9,
                "num_answers": 10_000,
                "repetition_standard_error": 0.0,
            }
        },
        "answers that stop",
    ),
    "questions": (accuracy(0.9), accuracy(0.8), "exact match, facts"),
    "group of two words": (
        {"accuracy_new_wording": 0.9, "num_questions_new_wording": MANY},
        {"accuracy_new_wording": 0.8, "num_questions_new_wording": MANY},
        "exact match, new_wording",
    ),
    "pairs": (
        {"preference_accuracy": 0.9, "num_pairs": 1000},
        {"preference_accuracy": 0.8, "num_pairs": 1000},
        "pairs right",
    ),
    "choices": (
        {"choices": {"ceval": CHOICE}},
        {"choices": {"ceval": CHOICE | {"accuracy": 0.1}}},
        "ceval, multiple choice",
    ),
    "by likelihood": (
        {"classification": {"bbc": {"num_rows": 48, "by_likelihood": OUTCOME}}},
        {"classification": {"bbc": {"num_rows": 48, "by_likelihood": {"accuracy": 0.1}}}},
        "bbc, classified by likelihood",
    ),
    "by text": (
        {"classification": {"bbc": {"num_rows": 48, "by_text": OUTCOME}}},
        {"classification": {"bbc": {"num_rows": 48, "by_text": {"accuracy": 0.1}}}},
        "bbc, classified by text",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_figure_can_regress(kind: str) -> None:
    before, after, figure = KINDS[kind]
    worse = [change.figure for change in changes(before, after).values() if change.is_worse]
    assert worse == [figure]
    assert not any(change.is_worse for change in changes(after, before).values())  # that way it became better
    assert not any(change.is_worse for change in changes(before, before).values())


def test_noise_of_a_small_task_is_no_regression() -> None:
    """9 and 5 of 16, with two of each kind 11 and 7 of 20: 2 * sqrt((.55 * .45 + .35 * .65) / 20) * 20/16 = 0.385."""
    nine, five = ({"choices": {"x": {"accuracy": num / 16, "num_questions": 16}}} for num in (9, 5))
    (change,) = changes(nine, five).values()
    assert change.limit == pytest.approx(9 / 16 - 2.5 * math.sqrt(0.475 / 20))
    assert not change.is_worse


def test_only_what_both_have_is_compared() -> None:
    one, other = {"bits_per_byte": 1.0, "choices": {"x": CHOICE}}, {"choices": {"y": CHOICE}, **accuracy(0)}
    assert changes(one, other) == {}
    nothing_fits = {"choices": {"x": {"accuracy": None, "num_questions": 0}}}
    assert changes(nothing_fits, one) == {}
    assert compared_figures(record("a")) == []


def test_questions_speak_for_the_manners_where_there_are_any() -> None:
    figures = {
        "repetition_4gram": 0.2,
        "stop_rate": 0.5,
        "num_answers": 10_000,
        "repetition_standard_error": 0.0,
        "prompt_manners": {
            "repetition_4gram": 0.9,
            "stop_rate": 0.9,
            "num_answers": 10_000,
            "repetition_standard_error": 0.0,
        },
    }
    assert {figure.value for figure in compared_figures(record("a", **figures))} == {0.2, 0.5}


def test_parents_come_from_the_order_of_the_stages() -> None:
    records = [record("pt", "pt"), record("sft", "sft"), record("dpo", "dpo")]
    assert find_parents(records) == {"sft": "pt", "dpo": "sft"}
    assert find_parents([records[0], records[2]]) == {"dpo": "pt"}
    assert find_parents(records[::-1]) == {}  # nothing stands before its parent


def test_checkpoints_of_a_stage_share_the_nearest_parent() -> None:
    records = [record("old", "pt"), record("new", "pt"), record("sft 1", "sft"), record("sft 2", "sft")]
    assert find_parents(records) == {"sft 1": "new", "sft 2": "new"}
    assert find_parents([*records, record("dpo", "dpo")])["dpo"] == "sft 2"


def test_a_stage_that_is_not_known_has_no_parent_and_is_none() -> None:
    records = [record("pt", "pt"), record("theirs", "merged"), record("sft", "sft"), record("ours", "rl")]
    assert find_parents(records) == {"sft": "pt"}


def make_run(folder: Path, parent: Path | None) -> str:
    """A folder with a record as mini_qwen/run.py writes it: the recipe by the classes that its keys belong to."""
    folder.mkdir()
    model = {"checkpoint": str(parent)} if parent else {"hidden_size": 32}
    recipe = {"Data": {"train_files": ["x"]}, "SFTConfig": {"seed": 1}, "Model": model}
    (folder / "run.json").write_text(json.dumps({"recipe": recipe, "seconds": 1.0}))
    return str(folder)


def test_the_record_of_a_run_names_its_parent(tmp_path: Path) -> None:
    """Two pretrainings, each with its own fine-tuning: the nearest one before would be the wrong parent of one."""
    one, two = make_run(tmp_path / "pt1", None), make_run(tmp_path / "pt2", None)
    first, second = make_run(tmp_path / "sft1", Path(one)), make_run(tmp_path / "sft2", Path(two))
    assert read_parent(Path(first)) == Path(one)
    assert read_parent(Path(one)) is None
    records = [record(one, "pt"), record(two, "pt"), record(first, "sft"), record(second, "sft")]
    assert find_parents(records) == {first: one, second: two}
    assert find_parents(records[::-1]) == {first: one, second: two}  # whatever the order


def test_a_parent_of_the_same_stage_is_one_where_the_record_says_so(tmp_path: Path) -> None:
    one = make_run(tmp_path / "sft1", None)
    two = make_run(tmp_path / "sft2", Path(one))
    assert find_parents([record(one, "sft"), record(two, "sft")]) == {two: one}


def test_a_parent_may_be_named_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_run(tmp_path / "pt", None)
    two = make_run(tmp_path / "sft", Path("pt"))
    monkeypatch.chdir(tmp_path)
    assert find_parents([record(one, "pt"), record(two, "sft")]) == {two: one}


def test_a_checkpoint_whose_parent_is_not_evaluated_is_compared_with_nothing(tmp_path: Path) -> None:
    one = make_run(tmp_path / "pt", None)
    two = make_run(tmp_path / "sft", tmp_path / "elsewhere")
    assert find_parents([record(one, "pt"), record(two, "sft")]) == {}


def test_a_rise_of_the_repetition_within_two_standard_errors_is_noise() -> None:
    """2 * hypot(0.1, 0) = 0.2: from 0.1 up to 0.3."""
    before = {"repetition_4gram": 0.1, "stop_rate": 1.0, "num_answers": 8, "repetition_standard_error": 0.1}
    for after, is_worse in ((0.29, False), (0.31, True)):
        figures = before | {"repetition_4gram": after, "repetition_standard_error": 0.0}
        assert changes(before, figures)["4-gram repetition of answers"].is_worse is is_worse


@pytest.mark.parametrize("content", [{}, {"recipe": {}}, {"recipe": None}, {"recipe": {"checkpoint": 5}}, []])
def test_a_foreign_record_names_no_parent(tmp_path: Path, content: Any) -> None:
    """A checkpoint of another project may have a run.json of its own."""
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert read_parent(tmp_path) is None


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_a_damaged_record_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(SystemExit, match=r"run\.json is damaged: .*\. Restore it, or remove it\."):
        read_parent(tmp_path)


def test_reward_accuracy_goes_to_the_child_that_scored_the_same_pairs() -> None:
    records = [
        record("a", pair_log_probs=[[-5, -6], [-5, -6], [-5, -6], [-5, -6]]),
        record("b", "sft", pair_log_probs=[[-4, -6], [-5, -7], [-9, -6], [-5, -6]]),
        record("c", "dpo", pair_log_probs=[[-4, -6]]),
    ]
    add_reward_accuracy(records, {"b": "a", "c": "b"})
    assert records[1]["reward_accuracy"] == 0.5
    assert "reward_accuracy" not in records[0] and "reward_accuracy" not in records[2]
    add_reward_accuracy([record("a"), record("b")], PARENTS)
