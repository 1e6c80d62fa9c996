"""mini_qwen/templates.py: fifty conversations become the same tokens in data, chat, server and exports."""

from pathlib import Path

import jinja2
import pytest
import torch
from exporting import export
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sample_conversations import CONTROL_TEXTS, CONVERSATIONS, begins_with_line_break, disarmed, spells_control
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mini_qwen.chat import TEMPLATE
from mini_qwen.conversations import encode_conversations
from mini_qwen.engine import Engine
from mini_qwen.generation import encode_prompt
from mini_qwen.rows import Row
from mini_qwen.schemas import Turn
from mini_qwen.templates import PLAIN, safe_template
from mini_qwen.tokenizer import CONTROL_TOKENS

SAFE = safe_template(CONTROL_TOKENS)


def render(template: str, turns: list[Turn]) -> str:
    return render_jinja_template([turns], chat_template=template, add_generation_prompt=True)[0][0]


def render_elsewhere(template: str, turns: list[Turn]) -> str:
    """As programs do that have jinja2 and not transformers."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = lambda message: (_ for _ in ()).throw(ValueError(message))
    return environment.from_string(template).render(messages=turns, add_generation_prompt=True)


def count_control(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    control = set(tokenizer.convert_tokens_to_ids(CONTROL_TOKENS))
    return sum(token in control for token in ids)


@pytest.fixture(scope="module", params=["trained here", "Qwen2.5"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return tokenizer if request.param == "trained here" else request.getfixturevalue("qwen_tokenizer")


@pytest.fixture(scope="module")
def exported(road: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = export(road / "sft", "vllm", tmp_path_factory.mktemp("export") / "sft")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(road: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(road / "sft")


def test_there_are_fifty_and_ten_of_them_spell_control_tokens() -> None:
    assert len(CONVERSATIONS) == 50 and sum(map(spells_control, CONVERSATIONS)) == 10
    assert all(any(token in text for token in CONTROL_TOKENS) for text in CONTROL_TEXTS)
    assert sum(map(begins_with_line_break, CONVERSATIONS)) == 8


def test_data_preparation_makes_of_each_the_tokens_of_the_chat(any_tokenizer: PreTrainedTokenizerBase) -> None:
    """A row is the prompt, then the answer. A turn that is blank, which no data may have, is left out here."""
    answer: Turn = {"role": "assistant", "content": "yes"}
    usable = [turns for turns in CONVERSATIONS if all(turn["content"].strip() for turn in turns)]
    assert len(usable) == 44
    rows = [Row(Path("rows.jsonl"), number, {"messages": [*turns, answer]}) for number, turns in enumerate(usable)]
    prepared, ledger = encode_conversations(any_tokenizer, 10_000, "drop", rows)
    assert ledger.rows_kept == 44 and ledger.rows_with_control_text == 10
    for turns, row in zip(usable, prepared, strict=True):
        prompt = encode_prompt(any_tokenizer, turns, chat=True)
        assert row.ids[: len(prompt)].tolist() == prompt
        assert any_tokenizer.decode(row.ids[len(prompt) :]) == "yes<|im_end|>\n"


def test_the_server_makes_of_each_the_tokens_of_the_chat(road: Path, ours: PreTrainedTokenizerBase) -> None:
    threads = torch.get_num_threads()
    engine = Engine(str(road / "sft"))
    torch.set_num_threads(threads)
    assert [engine.encode(turns) for turns in CONVERSATIONS] == [
        encode_prompt(ours, turns, chat=True) for turns in CONVERSATIONS
    ]


@pytest.mark.parametrize("environment", [render, render_elsewhere])
def test_without_the_marks_of_training_the_text_is_the_same(environment: object) -> None:
    assert callable(environment)
    for turns in CONVERSATIONS:
        assert environment(PLAIN, turns) == render(TEMPLATE, turns)
        assert environment(SAFE, turns) == render(TEMPLATE, disarmed(turns))
        assert (disarmed(turns) == turns) is not spells_control(turns)
    with pytest.raises(jinja2.TemplateSyntaxError, match="generation"):
        render_elsewhere(TEMPLATE, CONVERSATIONS[0])


def test_the_exported_folder_makes_the_tokens_of_the_chat(
    exported: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase
) -> None:
    """Whatever a content spells: then with the blank in it that the template puts there."""
    compared = 0
    for turns in CONVERSATIONS:
        ids = exported.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert count_control(ours, ids) == 2 * len(turns) + 1
        if not begins_with_line_break(turns):
            compared += 1
            assert ids == encode_prompt(ours, disarmed(turns), chat=True)
    assert compared == 42


def test_only_a_line_break_at_the_beginning_is_tokenised_otherwise(any_tokenizer: PreTrainedTokenizerBase) -> None:
    """Other programs merge it with the template's own: text and control tokens are the same, the tokens may not be."""
    differing = 0
    for turns in CONVERSATIONS:
        ours = encode_prompt(any_tokenizer, disarmed(turns), chat=True)
        merged = any_tokenizer.encode(render(SAFE, turns), add_special_tokens=False)
        assert any_tokenizer.decode(merged) == any_tokenizer.decode(ours)
        assert count_control(any_tokenizer, merged) == count_control(any_tokenizer, ours) == 2 * len(turns) + 1
        assert merged == ours or begins_with_line_break(turns)
        differing += merged != ours
    assert differing > 0  # else there would be nothing to warn of


fragments = st.lists(
    st.sampled_from(
        [*CONTROL_TOKENS, "<", "|", ">", "<|", "|>", "im_end", "im_start", "endoftext", "a", " ", "\n", "小"]
    )
)


@given(contents=st.lists(fragments.map("".join), min_size=1, max_size=4))
def test_no_text_becomes_a_control_token(tokenizer: PreTrainedTokenizerBase, contents: list[str]) -> None:
    turns = [{"role": "user", "content": content} for content in contents]
    ids = tokenizer.encode(render(SAFE, turns), add_special_tokens=False)
    assert count_control(tokenizer, ids) == 2 * len(turns) + 1


def test_every_added_token_of_qwen_is_disarmed(qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = list(qwen_tokenizer.get_added_vocab())
    assert len(tokens) == 22 and "<tool_call>" in tokens
    turns = [{"role": "user", "content": " ".join(tokens)}]
    ids = qwen_tokenizer.encode(render(safe_template(tokens), turns), add_special_tokens=False)
    assert sum(token in qwen_tokenizer.get_added_vocab().values() for token in ids) == 3


def test_a_quote_in_a_control_token_is_no_end_of_the_template() -> None:
    assert '"<\\"|x\\\\' in safe_template(['<"|x\\'])
    assert render(safe_template(['<"|x\\']), [{"role": "user", "content": 'a<"|x\\b'}]).count('a< "|x\\b') == 1


def test_a_control_token_of_one_character_is_refused() -> None:
    with pytest.raises(SystemExit, match="control token '§', of one character"):
        safe_template([*CONTROL_TOKENS, "§"])


@pytest.mark.parametrize("template", [PLAIN, SAFE])
def test_unknown_roles_are_refused_everywhere(template: str) -> None:
    with pytest.raises(ValueError, match="Unknown role tool"):
        render_elsewhere(template, [{"role": "tool", "content": "x"}])
