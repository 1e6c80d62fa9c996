"""mini_qwen/held_out.py: bits of documents, by hand for a model that finds every token as likely as every other."""

import math

import numpy as np
import pytest
import torch
from conftest import MakeModel, WriteRows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.held_out import document_rows, is_chinese, read_texts, score_documents
from mini_qwen.tokenizer import train_tokenizer

BITS = math.log2(448)  # that such a model needs for a token
LONG = 1000


@pytest.fixture(scope="module")
def bytes_only() -> PreTrainedTokenizerBase:
    """A token for each byte, and the three control tokens."""
    return train_tokenizer(["x"], 259)


@pytest.fixture(scope="module")
def uniform(tiny_model: MakeModel) -> PreTrainedModel:
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model


def write_texts(write_rows: WriteRows, *texts: str | None, name: str = "documents.jsonl") -> list[str]:
    return [str(write_rows(name, [{"text": text} for text in texts]))]


def test_the_bits_of_one_document(
    uniform: PreTrainedModel, bytes_only: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    """`abcd` and its end token: b, c, d and the end are scored, and stand for three bytes."""
    found = score_documents(uniform, bytes_only, write_texts(write_rows, "abcd"), [], LONG)
    assert (found["scored_tokens"], found["scored_bytes"], found["num_documents"]) == (4, 3, 1)
    assert found["loss"] == pytest.approx(math.log(448))
    assert found["perplexity"] == pytest.approx(448)
    assert found["bits_per_byte"] == pytest.approx(4 * BITS / 3)
    assert not [key for key in found if "chinese" in key or "unigram" in key]


def test_documents_weigh_by_their_tokens(
    uniform: PreTrainedModel, bytes_only: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    """1 and 9 tokens beside the two first ones: 10 tokens and 0 + 8 bytes, not the mean of two ratios."""
    found = score_documents(uniform, bytes_only, write_texts(write_rows, "a", "123456789"), [], LONG)
    assert (found["scored_tokens"], found["scored_bytes"]) == (10, 8)
    assert found["bits_per_byte"] == pytest.approx(10 * BITS / 8)


def test_the_chinese_documents_among_others(
    uniform: PreTrainedModel, bytes_only: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    """小明在家 is 12 bytes: 11 and the end are scored, in which 3 characters begin. `abcd` is not Chinese."""
    found = score_documents(uniform, bytes_only, write_texts(write_rows, "abcd", "小明在家"), [], LONG)
    assert (found["scored_tokens"], found["scored_bytes"]) == (4 + 12, 3 + 11)
    assert (found["chinese_tokens"], found["chinese_characters"]) == (12, 3)
    assert found["chinese_bits_per_character"] == pytest.approx(12 * BITS / 3)


def test_a_document_that_is_cut_loses_its_end(
    uniform: PreTrainedModel, bytes_only: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    """Of 小明 four tokens stay: three are scored, and of 明, which begins in them, the last two bytes do not count."""
    found = score_documents(uniform, bytes_only, write_texts(write_rows, "小明"), [], 4)
    assert (found["scored_tokens"], found["scored_bytes"], found["chinese_characters"]) == (3, 3, 1)
    assert found["bits_per_byte"] == pytest.approx(BITS)
    assert found["chinese_bits_per_character"] == pytest.approx(3 * BITS)


def test_rows_end_with_the_end_token_unless_they_are_cut(bytes_only: PreTrainedTokenizerBase) -> None:
    (end,) = bytes_only("<|im_end|>")["input_ids"]
    short, cut = document_rows(bytes_only, ["ab", "abcdef"], 4)
    assert len(short.ids) == 3 and short.ids[-1] == end
    assert len(cut.ids) == 4 and end not in cut.ids
    assert short.trained is None and short.ids.dtype == np.uint32


@torch.no_grad()
def test_bits_are_those_of_the_models_own_probabilities(
    tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    """Of each document alone, from its second token on."""
    model, texts = tiny_model(), ["Anna lives in a small house.", "小明", "x"]
    total, num_bytes = 0.0, 0
    for text, row in zip(texts, document_rows(tokenizer, texts, LONG), strict=True):
        ids = torch.from_numpy(row.ids.astype(np.int64))
        log_probs = model(input_ids=ids[None]).logits[0].double().log_softmax(dim=-1)
        total += sum(log_probs[at, ids[at + 1]].item() for at in range(len(ids) - 1))
        first = tokenizer.convert_ids_to_tokens([int(ids[0])])[0]
        num_bytes += len(text.encode()) - len(first)  # byte-level BPE writes a character for a byte
    found = score_documents(model, tokenizer, write_texts(write_rows, *texts), [], LONG)
    assert found["scored_bytes"] == num_bytes
    assert found["bits_per_byte"] == pytest.approx(-total / math.log(2) / num_bytes, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(-total / found["scored_tokens"]), rel=1e-5)


def test_bits_per_byte_do_not_depend_on_the_tokenizer_where_the_model_does_not_either(
    uniform: PreTrainedModel,
    bytes_only: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    write_rows: WriteRows,
) -> None:
    """Longer tokens at the same loss are fewer bits: what perplexity cannot tell."""
    files = write_texts(write_rows, "Anna lives in a small house near the river.")
    fine, coarse = (score_documents(uniform, each, files, [], LONG) for each in (bytes_only, tokenizer))
    assert fine["perplexity"] == pytest.approx(coarse["perplexity"])
    assert coarse["bits_per_byte"] < 0.6 * fine["bits_per_byte"]


def test_the_unigram_by_hand(
    uniform: PreTrainedModel, bytes_only: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    """Counted: a, b, end, once each. Scored: b and end, (1 + 1) / (3 + 259) each; c would be 1 / 262."""
    training = write_texts(write_rows, "ab", name="training.jsonl")
    found = score_documents(uniform, bytes_only, write_texts(write_rows, "ab"), training, LONG)
    assert found["unigram_bits_per_byte"] == pytest.approx(2 * math.log2(262 / 2) / 1)
    found = score_documents(uniform, bytes_only, write_texts(write_rows, "ac"), training, LONG)
    assert found["unigram_bits_per_byte"] == pytest.approx(math.log2(262) + math.log2(262 / 2))
    assert found["bits_per_byte"] == pytest.approx(2 * BITS)  # the model is not asked about the training rows


def test_rows_without_text_are_no_documents(write_rows: WriteRows) -> None:
    """Nor are those of blanks alone, which pretraining drops as well; their number is recorded."""
    files = write_texts(write_rows, "one", None, "", " \n\u3000", " two")
    assert read_texts(files) == (["one", " two"], 3)


def test_the_number_of_rows_without_text_is_a_figure(
    uniform: PreTrainedModel, bytes_only: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    found = score_documents(uniform, bytes_only, write_texts(write_rows, "abcd", None, " "), [], LONG)
    assert (found["num_documents"], found["num_rows_empty"]) == (1, 2)


def test_a_model_that_exploded_has_figures(
    tiny_model: MakeModel, bytes_only: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    found = score_documents(model, bytes_only, write_texts(write_rows, "abcd"), [], LONG)
    assert found["perplexity"] == math.inf
    assert 700 < found["loss"] < math.inf


def test_a_row_with_something_else_is_named(write_rows: WriteRows) -> None:
    file = write_rows("documents.jsonl", [{"text": "one"}, {"text": 5}])
    with pytest.raises(SystemExit, match=r"documents\.jsonl, row 1: 'text' is 5, but must be text"):
        read_texts([str(file)])


@pytest.mark.parametrize("texts", [[], [None, "", " "]])
def test_no_text_at_all_is_refused(write_rows: WriteRows, texts: list[str | None]) -> None:
    with pytest.raises(SystemExit, match=r"no text in .*documents\.jsonl: no row has anything under 'text'"):
        read_texts(write_texts(write_rows, *texts))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("小明住在北京。", True),
        ("Anna lives in a house.", False),
        ("小明 lives 在北京。", False),  # five of ten
        ("小明 live 在北京。", True),  # five of nine
        ("小明在北京 2024-11-24, 17:30!", True),  # digits and signs are no letters
        ("ひらがな", False),
        ("한국어", False),
        ("𠀀𠀁", False),  # beyond the basic block
        ("一鿿", True),  # its first and its last one
        ("", False),
        ("123 !?", False),
        ("🙂", False),
    ],
)
def test_what_counts_as_chinese(text: str, expected: bool) -> None:
    assert is_chinese(text) == expected
