"""The data that others wrote, where it has been fetched: every file through every stage, and nothing lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from transformers import PreTrainedTokenizerBase

from mini_qwen.conversations import ConversationData, prepare_conversations
from mini_qwen.documents import DocumentData, prepare_documents
from mini_qwen.files import KINDS, kind
from mini_qwen.ledger import Ledger
from mini_qwen.preferences import PreferenceData, prepare_preferences
from mini_qwen.rows import read_rows
from mini_qwen.shortening import TOO_LONG

DATA = ROOT / "../shared/data"
FOLDERS = ["corpus", "mini_qwen", "llamafactory", "eval"]
FILES = sorted(file for folder in FOLDERS for file in (DATA / folder).rglob("*") if kind(file) in KINDS)
# The stage that each fits, by the beginning of its path; the others fit none, and every stage must say so.
FITS = {
    "corpus/": "pt",
    "eval/bbc_news": "pt",
    "llamafactory/wiki_demo": "pt",
    "mini_qwen/pt/": "pt",
    "llamafactory/alpaca": "sft",
    "llamafactory/glaive": "sft",
    "llamafactory/identity": "sft",
    "llamafactory/v1_sft": "sft",
    "mini_qwen/sft/": "sft",
    "llamafactory/dpo": "dpo",
    "mini_qwen/dpo/": "dpo",
}
MAX_LENGTH = 1024

pytestmark = pytest.mark.skipif(not FILES, reason=f"there is no data at {DATA}")


def name_of(file: Path) -> str:
    return str(file.relative_to(DATA))


def stage_of(file: Path) -> str | None:
    return next((stage for start, stage in FITS.items() if name_of(file).startswith(start)), None)


def files_of(stage: str) -> list[Path]:
    return [file for file in FILES if stage_of(file) == stage]


def prepare(
    stage: str, files: list[Path], tokenizer: PreTrainedTokenizerBase, cache: Path, max_drop_share: float = 1.0
) -> tuple[Any, Ledger]:
    keys: dict[str, Any] = {"train_files": [str(file) for file in files], "cache_dir": str(cache)}
    keys["max_drop_share"] = max_drop_share
    if stage == "pt":
        rows, _, ledger = prepare_documents(DocumentData(**keys), tokenizer, seed=0)
    elif stage == "sft":
        rows, _, ledger = prepare_conversations(ConversationData(packing=False, **keys), tokenizer, MAX_LENGTH, seed=0)
    else:
        rows, _, ledger = prepare_preferences(PreferenceData(**keys), tokenizer, MAX_LENGTH)
    ledger.check(max_drop_share)
    assert (ledger.rows_read, ledger.files) == (sum(1 for _ in read_rows(files, [])), len(files))
    return rows, ledger


def test_every_file_has_been_looked_at() -> None:
    assert len(FILES) >= 20
    for start, stage in FITS.items():
        assert any(name_of(file).startswith(start) for file in files_of(stage)), start


@pytest.mark.parametrize("file", files_of("pt"), ids=name_of)
def test_documents_are_all_kept(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, file: Path) -> None:
    _, ledger = prepare("pt", [file], tokenizer, tmp_path)
    assert not ledger.rows_dropped
    assert ledger.rows_kept == ledger.rows_read + ledger.rows_split_off
    assert ledger.tokens_dropped.total() < 1024  # the tail


def test_every_conversation_ends_in_a_stop_token_that_is_trained(
    qwen_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    blocks, ledger = prepare("sft", files_of("sft"), qwen_tokenizer, tmp_path)
    ending = [qwen_tokenizer.eos_token_id, *qwen_tokenizer("\n")["input_ids"]]
    assert len(blocks) == ledger.rows_kept > 0
    for block in blocks:
        assert block["input_ids"][-2:].tolist() == ending
        assert block["labels"][-2:].tolist() == [ending[0], -100]
        assert len(block["input_ids"]) <= MAX_LENGTH
    assert set(ledger.rows_dropped) == {"turns of tools", TOO_LONG}
    assert "glaive" in ledger.first_places["turns of tools"]
    assert ledger.rows_dropped["turns of tools"] == 191  # of its 300 rows, as many name tools
    assert ledger.rows_dropped[TOO_LONG] <= 0.01 * ledger.rows_read


def test_both_sides_of_every_pair_end_in_the_stop_token(
    qwen_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    pairs, ledger = prepare("dpo", files_of("dpo"), qwen_tokenizer, tmp_path)
    assert len(pairs) == ledger.rows_kept
    for pair in pairs:
        for side in ("chosen_ids", "rejected_ids"):
            ids = np.array(pair[side])
            assert np.flatnonzero(ids == qwen_tokenizer.eos_token_id).tolist() == [len(ids) - 1]
    assert set(ledger.rows_dropped) == {TOO_LONG}
    assert ledger.rows_dropped[TOO_LONG] <= 0.05 * ledger.rows_read


@pytest.mark.parametrize("stage", ["pt", "sft", "dpo"])
@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_stage_that_a_file_is_not_for_says_so(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, file: Path, stage: str
) -> None:
    """With the share of drops that every recipe allows: of pairs, some would pass for conversations."""
    if stage_of(file) == stage:
        return
    with pytest.raises(SystemExit) as stopped:
        prepare(stage, [file], tokenizer, tmp_path, max_drop_share=0.05)
    assert name_of(file) in str(stopped.value)
