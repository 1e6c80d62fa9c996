"""mini_qwen/fingerprint.py: other data has another hash, wherever it differs and wherever it lies."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from mini_qwen.conversations import ConversationData, prepare_conversations
from mini_qwen.documents import DocumentData, prepare_documents
from mini_qwen.fingerprint import hash_rows
from mini_qwen.preferences import PreferenceData, prepare_preferences

NUM_ROWS = 60


def document(number: int, word: str) -> dict[str, Any]:
    return {"text": f"Anna counts {number} {word}. " * 3}


def conversation(number: int, word: str) -> dict[str, Any]:
    answer = f"There are {number} {word}."
    return {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": answer}]}


def pair(number: int, word: str) -> dict[str, Any]:
    return {"prompt": f"How many {number}?", "chosen": f"{number} {word}", "rejected": "none"}


@pytest.mark.parametrize("stage", ["pt", "sft", "dpo"])
def test_one_other_word_is_other_data(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, stage: str) -> None:
    make = {"pt": document, "sft": conversation, "dpo": pair}[stage]

    def hash_of(folder: Path, **changes: Any) -> str:
        files, cache = [str(folder / "rows.jsonl")], str(folder / "cache")
        if stage == "pt":
            data = DocumentData(files, cache_dir=cache, block_size=8, eval_rows=2, **changes)
            return hash_rows(prepare_documents(data, tokenizer, 1)[0])
        if stage == "sft":
            spoken = ConversationData(files, cache_dir=cache, packing=False)
            return hash_rows(prepare_conversations(spoken, tokenizer, 64, 1)[0].as_dataset())
        return hash_rows(prepare_preferences(PreferenceData(files, cache_dir=cache), tokenizer, 64)[0])

    def write(name: str, changed: int | None) -> Path:
        words = ["birds" if number == changed else "words" for number in range(NUM_ROWS)]
        rows = [make(number, word) for number, word in enumerate(words)]
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "rows.jsonl").write_text(lines, encoding="utf-8")
        return tmp_path / name

    hashes = [hash_of(write(str(changed), changed)) for changed in (None, 0, 17, 31, NUM_ROWS - 1)]
    assert len(set(hashes)) == 5
    if stage == "pt":
        assert hash_of(tmp_path / "None", isolate_documents=False) not in hashes
        assert hash_of(tmp_path / "None", packing="cut") not in hashes
    moved = Path(shutil.copytree(tmp_path / "None", tmp_path / "elsewhere", ignore=shutil.ignore_patterns("cache")))
    assert hash_of(moved) == hashes[0]  # prepared anew, of a file with another name and time
