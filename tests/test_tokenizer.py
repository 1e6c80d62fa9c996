"""mini_qwen/tokenizer.py: any text comes back, control tokens stay whole, what is saved is what is loaded."""

import json
import unicodedata
from pathlib import Path

import pytest
from conftest import QWEN_TOKENIZER, ROOT, WriteRows, toy_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import mini_qwen_tokenizer
from mini_qwen import encoding
from mini_qwen.chat import TEMPLATE
from mini_qwen.tokenizer import (
    CONTROL_TOKENS,
    bytes_per_token,
    count_bytes,
    count_characters,
    load_tokenizer,
    train_tokenizer,
)


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoding.encode_text(tokenizer, texts)]


# Unassigned characters are left out: Python and the tokenizer may know different versions of Unicode.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40)
HARD = [
    "",
    " ",
    "\n\n \r\n\t",
    "  a  b ",
    "e\u0301",
    "가",
    "👩‍👩‍👧",
    "\x00\u200b\ufeff",
    "don't  WE'LL",
    "1234567",
    "…——«»",
    "ﷺ",
]


@settings(max_examples=300)
@given(text=st.one_of(TEXT, st.lists(st.sampled_from([*HARD, *CONTROL_TOKENS])).map("".join)))
def test_every_text_comes_back_in_nfc(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    (ids,) = encode_text(tokenizer, [text])
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(0 <= token < len(tokenizer) for token in ids)


def test_text_of_the_training_language_needs_fewer_tokens_than_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    text = toy_texts()[0]
    assert len(encode_text(tokenizer, [text])[0]) < len(text.encode()) / 2


def test_numbers_are_split_into_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """As in Qwen2.5, also where the training text has '17' everywhere."""
    assert [tokenizer.decode([token]) for token in encode_text(tokenizer, ["1717"])[0]] == ["1", "7", "1", "7"]


@pytest.mark.parametrize("text", [*HARD, *toy_texts()[:8], "x = {1: 'a'}\n\tif x:\n\t\tpass"])
def test_text_is_cut_as_in_qwen(qwen_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Before byte pairs are merged: the same pieces, so that what the two learn can be compared."""
    ours = train_tokenizer([text], 259)
    pieces = [
        backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        for backend in (ours.backend_tokenizer, qwen_tokenizer.backend_tokenizer)
    ]
    assert pieces[0] == pieces[1]


def test_control_tokens_in_a_template_are_one_token_each(tokenizer: PreTrainedTokenizerBase) -> None:
    for token in CONTROL_TOKENS:
        (number,) = tokenizer(token)["input_ids"]
        assert tokenizer.decode([number]) == token
        assert tokenizer(f"a{token}b")["input_ids"].count(number) == 1
        assert tokenizer.decode([number], skip_special_tokens=True) == ""


def test_end_and_pad_are_two_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.bos_token is None


def test_nothing_is_added_to_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("Anna")["input_ids"] == tokenizer("Anna", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("vocab_size", [259, 300, 400])
def test_vocabulary_has_exactly_the_size_asked_for(vocab_size: int) -> None:
    tokenizer = train_tokenizer(toy_texts(), vocab_size)
    assert len(tokenizer) == vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_rows", "40"], r"eval_rows is 40, but 40 documents are all there are: none is left to learn from"),
        (["--eval_rows", "1000"], r"eval_rows is 1,000, but 40 documents"),
        (["--eval_rows", "-1"], r"eval_rows is -1;.* 0 or more"),
        (["--max_rows", "0"], r"max_rows is 0;.* 1 or more"),
    ],
)
def test_learning_from_no_documents_is_refused(
    write_rows: WriteRows, tmp_path: Path, words: list[str], message: str
) -> None:
    file = write_rows("rows.jsonl", [{"text": text} for text in toy_texts()])
    out = tmp_path / "tokenizer"
    config = str(ROOT / "recipes/demo/tokenizer.yaml")
    words = ["--config", config, "--train_files", str(file), "--output_dir", str(out), "--vocab_size", "300", *words]
    with pytest.raises(SystemExit, match=message):
        mini_qwen_tokenizer.main(words)
    assert not out.exists()


def test_all_documents_but_the_unseen_are_learnt_from(
    write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows("rows.jsonl", [{"text": text} for text in toy_texts()])
    config = str(ROOT / "recipes/demo/tokenizer.yaml")
    words = ["--config", config, "--train_files", str(file), "--output_dir", str(tmp_path / "tokenizer")]
    mini_qwen_tokenizer.main([*words, "--vocab_size", "300", "--eval_rows", "39", "--compare_with", "nowhere"])
    assert "learnt from 1 documents" in capsys.readouterr().out


@pytest.mark.parametrize("vocab_size", [258, 3, 0])
def test_a_vocabulary_too_small_for_the_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(SystemExit, match=rf"{vocab_size}\b.*259"):
        train_tokenizer(toy_texts(), vocab_size)


def test_saved_and_loaded_it_is_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    texts = [*HARD, *toy_texts(), *CONTROL_TOKENS]
    expected = tokenizer(texts)["input_ids"]
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert loaded(texts)["input_ids"] == expected
        assert encode_text(loaded, texts) == encode_text(tokenizer, texts)
        assert loaded.batch_decode(expected) == tokenizer.batch_decode(expected)
        assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")
        assert loaded.chat_template == TEMPLATE
        assert len(loaded) == len(tokenizer)


def test_the_same_texts_train_the_same_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert train_tokenizer(toy_texts(), 400).get_vocab() == tokenizer.get_vocab()


def test_loading_brings_the_projects_template_and_end_token(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A base model's tokenizer has the same token for end and pad, and a template of its own."""
    tokenizer.save_pretrained(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    values = json.loads(settings_file.read_text(encoding="utf-8"))
    values |= {"eos_token": "<|endoftext|>", "padding_side": "right"}
    settings_file.write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|endoftext|>"
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")
    assert loaded.chat_template == TEMPLATE


def test_a_missing_tokenizer_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere.*mini_qwen_tokenizer\.py"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_tokenizer_without_control_tokens_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        renamed = file.read_text(encoding="utf-8").replace("<|im_start|>", "<|other|>")
        file.write_text(renamed, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"lacks <\|im_start\|>,"):
        load_tokenizer(str(tmp_path))


def test_qwens_own_tokenizer_loads(qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(qwen_tokenizer) == 151_665
    assert qwen_tokenizer.convert_tokens_to_ids(CONTROL_TOKENS) == [151_643, 151_644, 151_645]
    assert (
        AutoTokenizer.from_pretrained(QWEN_TOKENIZER)("你好 Anna")["input_ids"]
        == (encode_text(qwen_tokenizer, ["你好 Anna"])[0])
    )


def test_bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> None:
    bytes_alone = train_tokenizer(["x"], 259)
    assert bytes_per_token(bytes_alone, ["猫 cat", "狗"]) == 1.0
    texts = ["Anna lives in a small house.", "小明住在河边。"]
    num_tokens = sum(map(len, encode_text(tokenizer, texts)))
    assert bytes_per_token(tokenizer, texts) == (28 + 21) / num_tokens


@pytest.mark.parametrize(
    ("text", "num_bytes", "num_characters"),
    [("cat", 3, 3), ("小明", 6, 2), ("é", 2, 1), ("🙂", 4, 1), ("a小🙂é\n ", 12, 6), ("", 0, 0), ("👩‍👧", 11, 3)],
)
def test_bytes_and_characters_of_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, num_bytes: int, num_characters: int
) -> None:
    """However the text is cut into tokens; the end token is none of it."""
    for each in (tokenizer, train_tokenizer(["x"], 259)):
        (ids,) = encode_text(each, [text])
        for row in (ids, [*ids, each.eos_token_id]):
            assert (count_bytes(each, row), count_characters(each, row)) == (num_bytes, num_characters)


def test_a_cut_inside_a_character() -> None:
    """It counts for the part that holds its first byte, so that the parts of a text add up."""
    bytes_alone = train_tokenizer(["x"], 259)
    (ids,) = encode_text(bytes_alone, ["a小🙂"])  # 1 + 3 + 4 bytes
    assert [count_characters(bytes_alone, ids[:cut]) for cut in range(9)] == [0, 1, 2, 2, 2, 3, 3, 3, 3]
    assert [count_characters(bytes_alone, ids[cut:]) for cut in range(9)] == [3, 2, 1, 1, 1, 0, 0, 0, 0]
    assert [count_bytes(bytes_alone, ids[:cut]) for cut in range(9)] == list(range(9))
