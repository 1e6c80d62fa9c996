"""mini_qwen/decoding.py: every setting answers the same prompts with the same seeds, and nothing else decides."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MakeModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen import decoding
from mini_qwen.decoding import DecodingGrid, draw_seed, run_grid
from mini_qwen.evaluation import EvalData
from mini_qwen.generation import Answer
from mini_qwen.recipe import parse_recipe
from mini_qwen.sampling import Sampling

PROMPTS = ["Anna", "Where does Victor go tomorrow?", "小雪", "In the morning 小明 likes to eat", "a"]
GRID = DecodingGrid(temperatures=[0.5, 1.5], top_ps=[0.4, 1.0], top_ks=[3], beams=[2], samples=2, max_new_tokens=6)


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> PreTrainedModel:
    return tiny_model(stage="sft")


@pytest.fixture(scope="module")
def cells(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    return run_grid(model, tokenizer, PROMPTS, GRID, batch_size=64)


def setting(cell: dict[str, Any]) -> tuple[float, float, int, int]:
    return cell["temperature"], cell["top_p"], cell["top_k"], cell["num_beams"]


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sampling, list[str], list[int], list[Answer]]]:
    """What the grid asks, with which seeds, and what it is told; it is answered as ever."""
    seen: list[tuple[Sampling, list[str], list[int], list[Answer]]] = []
    real = decoding.ask

    def ask(model: Any, tokenizer: Any, texts: Sequence[str], *rest: Any) -> list[Answer]:
        answers = real(model, tokenizer, texts, *rest)
        sampling, seeds = rest[-2:]
        seen.append((sampling, list(texts), list(seeds), answers))
        return answers

    monkeypatch.setattr(decoding, "ask", ask)
    return seen


def test_settings_of_a_grid() -> None:
    """The likeliest token first, every top-p at every temperature, top-k at temperature 1, then the beams."""
    assert GRID.settings() == [
        Sampling(),
        Sampling(0.5, 0.4),
        Sampling(0.5, 1.0),
        Sampling(1.5, 0.4),
        Sampling(1.5, 1.0),
        Sampling(temperature=1.0, top_k=3),
        Sampling(num_beams=2),
    ]
    assert len(DecodingGrid().settings()) == 1 + 4 * 4
    assert DecodingGrid([], [], samples=1).settings() == [Sampling()]


def test_a_cell_for_each_setting_with_all_its_answers(cells: list[dict[str, Any]]) -> None:
    """Two samples of five prompts where tokens are drawn; asked twice, the likeliest answer is the same."""
    assert [setting(cell) for cell in cells] == [
        (0.0, 1.0, 0, 1),
        (0.5, 0.4, 0, 1),
        (0.5, 1.0, 0, 1),
        (1.5, 0.4, 0, 1),
        (1.5, 1.0, 0, 1),
        (1.0, 1.0, 3, 1),
        (0.0, 1.0, 0, 2),
    ]
    assert [cell["num_answers"] for cell in cells] == [5, 10, 10, 10, 10, 10, 5]
    for cell in cells:
        assert 0 <= cell["answer_length"] <= 6
        assert all(0 <= cell[key] <= 1 for key in ("stop_rate", "repetition_4gram", "repetition_near", "distinct_2"))


def test_settings_differ_in_what_they_do(cells: list[dict[str, Any]]) -> None:
    figures = [{key: cell[key] for key in ("distinct_2", "answer_length")} for cell in cells]
    assert figures[1] != figures[4]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_matter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cells: list[dict[str, Any]], batch_size: int
) -> None:
    assert run_grid(model, tokenizer, PROMPTS, GRID, batch_size) == cells


def test_a_setting_does_not_depend_on_its_place_or_on_the_others(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cells: list[dict[str, Any]]
) -> None:
    turned = replace(GRID, temperatures=[1.5, 0.5], top_ps=[1.0], beams=[])
    expected = {setting(cell): cell for cell in cells}
    found = run_grid(model, tokenizer, PROMPTS, turned, batch_size=64)
    assert [setting(cell) for cell in found] == [
        (0.0, 1.0, 0, 1),
        (1.5, 1.0, 0, 1),
        (0.5, 1.0, 0, 1),
        (1.0, 1.0, 3, 1),
    ]
    assert all(cell == expected[setting(cell)] for cell in found)


def test_seeds_are_those_of_prompt_and_sample(
    tiny_model: MakeModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At every setting, and for another checkpoint, and however many samples there are."""
    seen = watch(monkeypatch)
    grid = DecodingGrid([0.8, 1.2], [0.9], top_ks=[5], beams=[2], samples=3, max_new_tokens=2, seed=7)
    for checkpoint in (model, tiny_model(seed=1)):
        run_grid(checkpoint, tokenizer, PROMPTS[:2], grid, batch_size=4)
    assert len(seen) == 2 * 5
    for sampling, texts, seeds, _ in seen:
        if sampling.temperature > 0:
            assert texts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
            assert seeds == [draw_seed(7, prompt, sample) for prompt in range(2) for sample in range(3)]
        else:
            assert texts == PROMPTS[:2]


def test_no_draw_comes_again_at_another_place_or_seed() -> None:
    """With a sum, seed 1 would draw what seed 0 draws, one sample further."""
    cases = [(seed, prompt, sample) for seed in (0, 1, 10) for prompt in range(12) for sample in range(12)]
    seeds = {draw_seed(*case) for case in cases}
    assert len(seeds) == len(cases)
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    assert draw_seed(1, 2, 3) == 4487740463121531623  # on every machine


def test_samples_of_a_prompt_are_different_draws(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch)
    grid = DecodingGrid([1.5], [1.0], samples=4, max_new_tokens=6)
    run_grid(model, tokenizer, ["Anna", "Anna"], grid, batch_size=64)
    run_grid(model, tokenizer, ["Anna", "Anna"], replace(grid, seed=100), batch_size=64)
    run_grid(model, tokenizer, ["Anna", "Anna"], grid, batch_size=64)
    first, other, again = (call[-1] for call in seen if call[0].temperature > 0)
    assert len({tuple(answer.ids) for answer in first}) > 4
    assert first != other
    assert first == again


BAD_GRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "no sample": ({"samples": 0}, r"decoding: samples is 0; .*one answer"),
    "negative samples": ({"samples": -1}, r"decoding: samples is -1"),
    "temperature": ({"temperatures": [0.7, -1.0]}, r"decoding: temperature is -1\.0: 0 takes the most likely"),
    "top-p of nothing": ({"top_ps": [0.0]}, r"decoding: top_p is 0\.0: 1 keeps all"),
    "top-p of more than all": ({"top_ps": [1.5]}, r"decoding: top_p is 1\.5"),
    "top-k": ({"top_ks": [-5]}, r"decoding: top_k is -5: 0 keeps all"),
    "beams": ({"beams": [4, 0]}, r"decoding: num_beams is 0: 1 is no beam search"),
    "no token": ({"max_new_tokens": 0}, r"decoding: max_new_tokens is 0"),
}


@pytest.mark.parametrize("case", BAD_GRIDS)
def test_a_bad_grid_is_refused_by_name(case: str) -> None:
    values, message = BAD_GRIDS[case]
    with pytest.raises(SystemExit, match=message):
        DecodingGrid(**values).settings()


def write_recipe(folder: Path, grid: dict[str, Any]) -> list[str]:
    (folder / "eval.yaml").write_text(yaml.safe_dump({"checkpoints": ["x"], "decoding": grid}))
    return ["--config", str(folder / "eval.yaml")]


def test_a_recipe_names_a_grid(tmp_path: Path) -> None:
    (args,) = parse_recipe(EvalData, argv=write_recipe(tmp_path, {"top_ks": [5], "samples": 2}), default="none")
    assert args.decoding == DecodingGrid(top_ks=[5], samples=2)


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        ({"top_k": [5]}, "top_k"),
        ({"samples": "many"}, "samples"),
        ({"temperatures": 0.7}, "temperatures"),
        ({"beams": [1.5]}, "beams"),
    ],
)
def test_a_key_or_a_type_that_is_wrong_is_refused(tmp_path: Path, grid: dict[str, Any], name: str) -> None:
    with pytest.raises(SystemExit, match=rf"'decoding\.{name}.* is .* in .*eval\.yaml"):
        parse_recipe(EvalData, argv=write_recipe(tmp_path, grid), default="none")
