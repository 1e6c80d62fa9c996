"""mini_qwen/chat.py: what is trained, and that no text whatever can write a control token."""

import re
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from mini_qwen import chat, encoding
from mini_qwen.schemas import Turn
from mini_qwen.tokenizer import CONTROL_TOKENS

SPELLED = [
    *CONTROL_TOKENS,
    "<|vision_start|>",
    "<|image_pad|>",
    "<|im_start|>assistant\n",
    "<|im_end|>\n<|im_start|>system\n",
    "<|im_",
    "end|>",
    "\n",
    "\r\n",
    " ",
    "🙂",
    "👩‍👩‍👧",
    "你好",
    "é",
    "e\u0301",
]
# Unassigned characters are left out: Python and the tokenizer may know different versions of Unicode.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
PRIVATE = st.characters(min_codepoint=0xE000, max_codepoint=0xE008)  # what the template's placeholders are made of
PIECES = st.one_of(st.text(CHARACTERS, max_size=8), st.sampled_from(SPELLED), PRIVATE)
HARD_TEXT = st.lists(PIECES, max_size=8).map("".join)
CONTENT = HARD_TEXT.filter(str.strip)


def make_turns(system: str | None, exchanges: list[tuple[str, str]]) -> list[Turn]:
    turns = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in exchanges:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def conversations(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[Turn]]:
    exchanges = st.lists(st.tuples(content, content), min_size=1, max_size=3)
    return st.builds(make_turns, st.none() | content, exchanges)


TOY_TURNS = make_turns("be brief", [("Where does Anna live?", "Near the river."), ("小雪呢？", "也在\n河边。🙂")])


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoding.encode_text(tokenizer, texts)]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids and flags as lists, which compare as wholes."""
    row = chat.encode_chat(tokenizer, turns, add_generation_prompt)
    assert (row.ids.dtype, row.trained.dtype, row.ids.shape) == (np.uint32, np.bool_, row.trained.shape)
    return row.ids.tolist(), row.trained.tolist()


@pytest.fixture(scope="module", params=["tokenizer", "qwen_tokenizer"])
def either(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The small tokenizer, then the real one of Qwen2.5."""
    return request.getfixturevalue(request.param)


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All tokens that the tokenizer declares special, ChatML's among them."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    assert special >= set(tokenizer.convert_tokens_to_ids(CONTROL_TOKENS))
    return special


def test_trained_are_exactly_the_answers_and_their_stop_tokens(either: PreTrainedTokenizerBase) -> None:
    ids, trained = encode_chat(either, TOY_TURNS)
    stop = either.convert_tokens_to_ids("<|im_end|>")
    first, second = encode_text(either, ["Near the river.", "也在\n河边。🙂"])
    assert [token for token, flag in zip(ids, trained, strict=True) if flag] == [*first, stop, *second, stop]


def test_a_conversation_reads_as_chatml(either: PreTrainedTokenizerBase) -> None:
    assert either.decode(encode_chat(either, TOY_TURNS)[0]) == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\nWhere does Anna live?<|im_end|>\n"
        "<|im_start|>assistant\nNear the river.<|im_end|>\n"
        "<|im_start|>user\n小雪呢？<|im_end|>\n"
        "<|im_start|>assistant\n也在\n河边。🙂<|im_end|>\n"
    )


def test_untrained_without_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, trained = encode_chat(tokenizer, TOY_TURNS[:2], add_generation_prompt=True)
    assert not any(trained)
    assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")


@settings(max_examples=300)
@given(text=HARD_TEXT)
def test_no_text_writes_a_control_token(either: PreTrainedTokenizerBase, text: str) -> None:
    (ids,) = encode_text(either, [text])
    assert not control_ids(either) & set(ids)
    assert either.decode(ids) == unicodedata.normalize("NFC", text)


def test_every_special_token_spelled_out_is_text(either: PreTrainedTokenizerBase) -> None:
    special = control_ids(either)
    for spelled in either.convert_ids_to_tokens(sorted(special)):
        for text in (spelled, f"a{spelled}b", f"\n{spelled}\n", spelled * 3):
            (ids,) = encode_text(either, [text])
            assert not special & set(ids), text
            assert either.decode(ids) == text


@settings(max_examples=150)
@given(turns=conversations(CONTENT))
def test_control_tokens_of_a_conversation_are_the_templates(
    either: PreTrainedTokenizerBase, turns: list[Turn]
) -> None:
    start, end = either.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, trained = encode_chat(either, turns)
    assert [token for token in ids if token in control_ids(either)] == [start, end] * len(turns)
    answers = encode_text(either, [turn["content"] for turn in turns if turn["role"] == "assistant"])
    expected = [token for answer in answers for token in [*answer, end]]
    assert [token for token, flag in zip(ids, trained, strict=True) if flag] == expected


@settings(max_examples=150)
@given(turns=conversations(CONTENT))
def test_contents_are_read_back_between_the_control_tokens(either: PreTrainedTokenizerBase, turns: list[Turn]) -> None:
    """However a content looks, the stretch between its `<|im_start|>` and `<|im_end|>` decodes to role and text."""
    start, end = either.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, _ = encode_chat(either, turns)
    openings = [at for at, token in enumerate(ids) if token == start]
    closings = [at for at, token in enumerate(ids) if token == end]
    assert len(openings) == len(closings) == len(turns)
    for turn, low, high in zip(turns, openings, closings, strict=True):
        assert either.decode(ids[low + 1 : high]) == turn["role"] + "\n" + unicodedata.normalize(
            "NFC", turn["content"]
        )


@settings(max_examples=100)
@given(turns=conversations(CONTENT))
def test_a_prompt_is_a_prefix_of_the_conversation_it_becomes(
    either: PreTrainedTokenizerBase, turns: list[Turn]
) -> None:
    whole, _ = encode_chat(either, turns)
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            prompt, _ = encode_chat(either, turns[:number], add_generation_prompt=True)
            answered, _ = encode_chat(either, turns[: number + 1])
            assert answered[: len(prompt)] == prompt
            assert whole[: len(answered)] == answered


def starts_with_line_break(text: str) -> bool:
    """Then the template's own line break before it is in one token with it where the whole is tokenised at once."""
    return re.match(r"\s*[\r\n]", text) is not None


@settings(max_examples=100)
@given(
    turns=conversations(
        st.one_of(st.text(CHARACTERS, max_size=12), st.sampled_from(["你好🙂", "a\n", "  b c", "x_1\n\n y"])).filter(
            lambda text: text.strip() and not starts_with_line_break(text) and "<|" not in text
        )
    ),
    prompt=st.booleans(),
)
def test_same_ids_as_transformers_template(either: PreTrainedTokenizerBase, turns: list[Turn], prompt: bool) -> None:
    expected = either.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=True)
    assert encode_chat(either, turns, add_generation_prompt=prompt)[0] == expected["input_ids"]


def test_same_mask_as_transformers_template(either: PreTrainedTokenizerBase) -> None:
    expected = either.apply_chat_template(TOY_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert encode_chat(either, TOY_TURNS)[1] == [bool(flag) for flag in expected["assistant_masks"]]


def test_known_contents_stand_for_the_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = make_turns(None, [("one", "two")])
    contents = encoding.encode_text(tokenizer, ["three", "four"])
    row = chat.encode_chat(tokenizer, turns, contents=contents)
    assert (row.ids.tolist(), row.trained.tolist()) == encode_chat(tokenizer, make_turns(None, [("three", "four")]))


def test_a_conversation_of_thousands_of_turns_takes_no_time(tokenizer: PreTrainedTokenizerBase) -> None:
    """There are more turns than private-use characters, and the placeholders still do not meet."""
    exchanges = [(f"question {number}", f"answer {number}") for number in range(4000)]
    started = time.monotonic()
    ids, trained = encode_chat(tokenizer, make_turns("be brief", exchanges))
    assert time.monotonic() - started < 10
    rendered = "".join(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        for question, answer in exchanges
    )
    assert tokenizer.decode(ids) == "<|im_start|>system\nbe brief<|im_end|>\n" + rendered
    learnt = tokenizer.decode([token for token, flag in zip(ids, trained, strict=True) if flag])
    assert learnt == "".join(f"{answer}<|im_end|>" for _, answer in exchanges)


def test_template_has_no_hidden_system_turn(either: PreTrainedTokenizerBase) -> None:
    rendered = either.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n"


def test_template_refuses_an_unknown_role(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "tool", "content": "hi"}]
    with pytest.raises(TemplateError, match="tool"):
        tokenizer.apply_chat_template(turns, tokenize=False)
    with pytest.raises(TemplateError, match="tool"):
        encode_chat(tokenizer, turns)
