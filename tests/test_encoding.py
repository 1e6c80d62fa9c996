"""mini_qwen/encoding.py: the very ids of the tokenizer, no control token from any text, and no text that crashes."""

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import toy_texts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mini_qwen import encoding
from mini_qwen.encoding import (
    BORDER,
    CHECKED_SHARE,
    MANY_BLANKS,
    TextEncoder,
    byte_of_character,
    encode_text,
    has_many_blanks,
    make_fast,
    spells_control_token,
)
from mini_qwen.tokenizer import CONTROL_TOKENS

# What differs between encoders if anything does: marks that compose or change places, blanks of all kinds, digits,
# contractions, letters of several cases, joined emoji, private-use and unassigned characters.
SPELLED = ["\u0301", "\u0323", "e\u0301", "ﬁ", "Å", "\u3000", "\u2028", "\r\n", "\n\n ", "\t", "'S", "'ll", "10²", "ǆ"]
SPELLED += ["👩‍👩‍👧", "🙂", "小明", "한국어", "\ue000", "\U0001e4d0", "\U00031350", "\U0010fffd"]
SPELLED += ["\x00", "\ufeff", "\ufffd", "<|im_end|>", "<tool_call>", "a" * 40, "  " * 20]
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SPELLED)), max_size=8).map("".join)
CONTEXTS = ["{}", "a{}b", "中\u0301{}文", " {} !", "1{}2", "{}{}", "{}\n", "!{}'s"]
BLOCK = 8192  # code points encoded at once


@pytest.fixture(scope="module", params=["tokenizer", "qwen_tokenizer"])
def either(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The small tokenizer, then the real one of Qwen2.5."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def encoder(either: PreTrainedTokenizerBase) -> TextEncoder:
    made = TextEncoder(either)
    assert made.fast is not None
    return made


def without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(layout | {"added_tokens": []}))


@pytest.fixture(scope="module")
def plain(either: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer itself, but for its added tokens: what it must be like."""
    return without_added_tokens(either)


def expected_ids(plain: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in plain.encode_batch(texts, add_special_tokens=False)]


def lists(arrays: list[np.ndarray]) -> list[list[int]]:
    assert all(array.dtype == np.uint32 and array.ndim == 1 for array in arrays)
    return [array.tolist() for array in arrays]


def test_ids_are_those_that_the_tokenizer_gives_in_everyday_use(either: PreTrainedTokenizerBase) -> None:
    texts = [*toy_texts(), "", " ", "\n", "a", "".join(toy_texts()), "cafe\u0301 \U0001f642"]
    assert lists(encode_text(either, texts)) == either(texts, add_special_tokens=False)["input_ids"]


@settings(max_examples=500)
@given(text=TEXT)
@example(text="\u1100\u1161\u11a8 \u0344\u0958")  # Hangul that composes; characters that NFC takes apart
def test_ids_of_any_text_are_the_tokenizers(plain: Tokenizer, encoder: TextEncoder, text: str) -> None:
    assert lists(encoder([text])) == expected_ids(plain, [text])


TOGETHER = st.one_of(TEXT, st.sampled_from([BORDER, *BORDER, *BORDER[::-1], BORDER * 2, BORDER[::-1], "", " " * 12]))


@settings(max_examples=200)
@given(texts=st.lists(TOGETHER, max_size=6))
@example(texts=[BORDER[0], BORDER[1], BORDER[0] * 2, "a" + BORDER[0], BORDER[1] + "a"])
def test_texts_that_are_encoded_together_do_not_touch(
    plain: Tokenizer, encoder: TextEncoder, texts: list[str]
) -> None:
    """Whatever they begin and end with: the marks between them, blanks that would join, or nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "MANY_BLANKS", 6)
        assert lists(encoder(texts)) == expected_ids(plain, texts)


def code_points(end: int) -> Iterator[list[str]]:
    """All characters below `end`, BLOCK at a time; surrogates are none."""
    for start in range(0, end, BLOCK):
        yield [chr(code) for code in range(start, start + BLOCK) if not 0xD800 <= code < 0xE000]


def check_code_points(encoder: TextEncoder, end: int, contexts: list[str]) -> None:
    for characters in code_points(end):
        for context in contexts:
            texts = [context.replace("{}", character) for character in characters]
            plain = encoder.plain.encode_batch_fast(texts, add_special_tokens=False)
            wrong = [
                text
                for text, ids, expected in zip(texts, encoder(texts), plain, strict=True)
                if ids.tolist() != expected.ids
            ]
            assert not wrong, ascii(wrong[:20])


def test_every_character_of_the_basic_plane(qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    check_code_points(TextEncoder(qwen_tokenizer), 0x10000, CONTEXTS[:3])


@pytest.mark.slow
def test_every_character_that_there_is(qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    check_code_points(TextEncoder(qwen_tokenizer), 0x110000, CONTEXTS)


def test_no_added_token_comes_out_of_a_text(either: PreTrainedTokenizerBase, encoder: TextEncoder) -> None:
    """Not only the special ones: `<tool_call>` and `<|fim_prefix|>` are tokens of Qwen that its tokenizer writes."""
    added = either.added_tokens_decoder
    spelt = [token.content for token in added.values()]
    assert {*CONTROL_TOKENS} <= {*spelt} == {*encoder.control_tokens}
    if len(either) > 1000:
        assert {"<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>"} <= {*spelt}
    for token in spelt:
        texts = [token, f"a{token}b", f" {token} ", f"\n{token}\n", token * 3, token[:-1], token + "".join(spelt)]
        assert either(token, add_special_tokens=False)["input_ids"][0] in added  # the tokenizer itself writes it
        for text, ids in zip(texts, lists(encode_text(either, texts)), strict=True):
            assert not added.keys() & set(ids), text
            assert either.decode(ids) == text
        assert spells_control_token(either, ["x", f"a {token}."])
        assert not spells_control_token(either, ["x", token[:-1], "< |im_end|>", token.replace("<", "&lt;")])


@pytest.mark.parametrize("blank", [" ", "\r\n", "\u3000"])
def test_long_runs_of_blanks(plain: Tokenizer, encoder: TextEncoder, blank: str) -> None:
    """A run of 1,000,000 ends tiktoken's regular expression with an error; such runs go to the tokenizer."""
    for text in (blank * 150_000, "a" + blank * 150_000 + "b", (blank * 4_000 + "b") * 30):
        (expected,) = expected_ids(plain, [text])
        assert encoder([text])[0].tolist() == expected


@pytest.mark.parametrize("piece", ["a", "你", "!", "1", "ab ", "\u0301", "🙂"])
def test_long_runs_of_anything_else(plain: Tokenizer, encoder: TextEncoder, piece: str) -> None:
    text = piece * (200_000 // len(piece))
    (expected,) = expected_ids(plain, [text])
    assert encoder([text])[0].tolist() == expected


@settings(max_examples=200)
@given(runs=st.lists(st.tuples(st.sampled_from(["x", " ", "\n"]), st.integers(0, 40)), max_size=6))
def test_no_long_run_of_blanks_is_overlooked(runs: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "MANY_BLANKS", 5)
        text = "".join(character * length for character, length in runs)
        longest = max((len(run) for run in text.replace("\n", " ").split("x")), default=0)
        if longest >= 10:
            assert has_many_blanks(text)
        if longest < 5:
            assert not has_many_blanks(text)


def test_many_short_runs_of_blanks_cost_nothing() -> None:
    """Each run was once searched from each of its characters, 150 seconds for a text of a million."""
    assert not has_many_blanks((" " * (MANY_BLANKS - 1) + "x") * 200)


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The last two parts that byte pairs of the lowest rank are merged to, before they become the token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def test_every_merge_comes_out_of_its_own_bytes(either: PreTrainedTokenizerBase) -> None:
    """Why tiktoken, which goes by the rank of the joint bytes, does what the list of merges does.

    The two can only part where some bytes are joined earlier in another way. For each token the lowest ranks lead to
    the two parts that its merge names, and there is one merge for a token: then both take the same way everywhere.
    """
    layout = json.loads(either.backend_tokenizer.to_str())["model"]
    byte_of = byte_of_character()
    assert sorted(byte_of.values()) == list(range(256))
    assert set(byte_of) == set(pre_tokenizers.ByteLevel.alphabet())
    ranks = {bytes(byte_of[character] for character in token): id_ for token, id_ in layout["vocab"].items()}
    merges = [[bytes(byte_of[character] for character in part) for part in merge] for merge in layout["merges"]]
    assert len(ranks) == 256 + len(merges) == 256 + len({left + right for left, right in merges})
    for left, right in merges:
        assert parts_of(left + right, ranks) == [left, right]


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(toy_texts(), trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(toy_texts(), trainer)
    return tokenizer


def with_byte_fallback() -> Tokenizer:
    """As Llama's: characters are merged, and bytes are tokens of their own for all others."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(toy_texts(), trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    """Byte-level like Qwen's, but split by the pattern inside ByteLevel and with a blank put before the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(toy_texts(), trainer)
    return tokenizer


@pytest.mark.parametrize("make", [wordpiece, unigram, with_byte_fallback, gpt2])
def test_a_tokenizer_of_another_layout_encodes_by_itself(make: Any) -> None:
    tokenizer = wrapped(make())
    assert TextEncoder(tokenizer).fast is None
    texts = [*toy_texts(), "", "a <|im_end|> b", "猫\u0301 " * 3]
    assert lists(encode_text(tokenizer, texts)) == expected_ids(without_added_tokens(tokenizer), texts)
    control_ids = set(tokenizer.convert_tokens_to_ids(CONTROL_TOKENS))
    assert not control_ids & {id_ for ids in encode_text(tokenizer, texts) for id_ in ids.tolist()}


def changed(layout: dict[str, Any], **model: Any) -> dict[str, Any]:
    return layout | {"model": layout["model"] | model}


def test_what_is_nearly_the_right_layout_is_not_taken_for_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each of these would give other ids, or might."""
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    assert make_fast(layout) is not None
    model, splitter = layout["model"], layout["pre_tokenizer"]["pretokenizers"]
    vocab = model["vocab"]
    swapped = dict(vocab) | {token: 2 * 256 + 141 - 1 - id_ for token, id_ in vocab.items() if id_ >= 256}
    pattern = [splitter[0] | {"behavior": "Removed"}, splitter[1]]
    prefixed = [splitter[0], splitter[1] | {"add_prefix_space": True}]
    others = [
        changed(layout, dropout=0.1),
        changed(layout, ignore_merges=True),
        changed(layout, byte_fallback=True),
        changed(layout, end_of_word_suffix="</w>"),
        changed(layout, vocab=swapped),
        changed(layout, vocab=vocab | {"one more": 1000}),
        layout | {"normalizer": {"type": "NFKC"}},
        layout | {"normalizer": {"type": "Lowercase"}},
        layout | {"pre_tokenizer": None},
        layout | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": pattern}},
        layout | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": prefixed}},
        layout | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": splitter[:1]}},
    ]
    for other in others:
        assert make_fast(other) is None


def test_a_layout_without_normalizer_leaves_texts_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    layout = json.loads(tokenizer.backend_tokenizer.to_str()) | {"normalizer": None}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(layout)))
    text = "cafe\u0301"
    assert unicodedata.normalize("NFC", text) != text
    assert TextEncoder(other).fast is not None
    (ids,), (composed,) = encode_text(other, [text]), encode_text(tokenizer, [text])
    assert [ids.tolist()] == expected_ids(without_added_tokens(other), [text])
    assert tokenizer.decode(ids) == text != tokenizer.decode(composed)


@pytest.mark.parametrize("fast", [True, False])
def test_truncation_and_padding_of_a_tokenizer_do_not_touch_texts(
    tokenizer: PreTrainedTokenizerBase, fast: bool
) -> None:
    """They stay on in whoever last called the tokenizer with them, and in the tokenizer.json that is saved then."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()) if fast else gpt2()
    other = wrapped(backend)
    (expected,) = expected_ids(without_added_tokens(other), ["In the morning"])
    other.backend_tokenizer.enable_truncation(3)
    other.backend_tokenizer.enable_padding(length=50)
    assert (TextEncoder(other).fast is not None) == fast
    assert lists(encode_text(other, ["In the morning"])) == [expected]
    other("In the morning", truncation=True, max_length=2)
    assert lists(TextEncoder(other)(["In the morning"])) == [expected]


@pytest.mark.parametrize("number", [1, CHECKED_SHARE + 1])
def test_a_disagreement_is_noticed(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The first text of a run is compared, and one in a hundred after it."""
    encoder = TextEncoder(tokenizer)
    assert encoder.fast is not None
    right = encoder.fast.encode_to_numpy
    for _ in range(number - 1):
        encoder(["Anna lives."])
    monkeypatch.setattr(encoder.fast, "encode_to_numpy", lambda text, **options: right(text, **options)[:-1])
    with pytest.raises(SystemExit, match=r"disagree on the text 'Where does Anna go\?'.*constraints\.txt"):
        encoder(["Where does Anna go?"])


def test_an_encoder_is_made_once(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encoding.text_encoder(tokenizer) is encoding.text_encoder(tokenizer)
