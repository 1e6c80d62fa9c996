"""Sources: real texts, conversations and pairs to measure with, repeated with small changes to the size wanted."""

import json
import random
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mini_qwen.rows import read_rows
from mini_qwen.schemas import CONVERSATION_COLUMNS, Turn, read_conversation

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"  # larger samples, on the machines where this was written; else mini_data
MINI = ROOT / "mini_data"
SEED = 42
BLOCK_SIZE = MAX_LENGTH = 1024  # tokens, in PT and in SFT


def tokenizer_path() -> str:
    """Of Qwen2.5's tokenizer, where `prepare.sh` puts it or where the samples are."""
    places = [ROOT / "models/Qwen2.5-0.5B-Instruct", SHARED / "tokenizer/Qwen2.5-0.5B-Instruct"]
    return str(next((place for place in places if (place / "tokenizer.json").is_file()), places[0]))


def read_texts() -> list[str]:
    files = sorted((SHARED / "corpus").glob("*.parquet")) or sorted((MINI / "pt").rglob("*.parquet"))
    texts = [row.values["text"] for row in read_rows(files, ["text"])]
    random.Random(SEED).shuffle(texts)
    return texts


def write_texts(folder: Path, megabytes: float) -> list[Path]:
    """Parquet shards with `megabytes` of text in UTF-8, one for each copy, whose number each document begins with."""
    folder.mkdir()
    texts, files, room = read_texts(), [], megabytes * 1e6
    for copy in count():
        shard = []
        for text in texts:
            shard.append(f"{copy}: {text}")
            room -= len(shard[-1].encode())
            if room <= 0:
                break
        files.append(folder / f"copy-{copy:03}.parquet")
        pq.write_table(pa.table({"text": shard}), files[-1])
        if room <= 0:
            return files


def sample_files(folder: str, pattern: str = "*.parquet") -> list[Path]:
    """Of a folder laid out as the seed's data: pt/..., sft/7M, sft/Gen, dpo."""
    places = [SHARED / "mini_qwen" / folder, MINI / folder]
    return next(files for place in places if (files := sorted(place.glob(pattern))))


def read_conversations() -> list[list[Turn]]:
    """Of LLaMA-Factory's demo sets, where they are, and of Infinity-Instruct."""
    names = ["alpaca_en_demo.json", "alpaca_zh_demo.json", "identity.json", "v1_sft_demo.jsonl"]
    files = [file for name in names if (file := SHARED / "llamafactory" / name).is_file()]
    conversations = read_turns([*files, *sample_files("sft/7M"), *sample_files("sft/Gen")])
    random.Random(SEED).shuffle(conversations)
    return conversations


def read_turns(files: list[Path]) -> list[list[Turn]]:
    return [read_conversation(row.values, row.place) for row in read_rows(files, CONVERSATION_COLUMNS)]


def write_conversations(conversations: list[list[Turn]], file: Path, num_rows: int | None = None) -> Path:
    """One `messages` row a line. Up to `num_rows` they are repeated, the copy's number before the first question."""
    with file.open("w", encoding="utf-8") as lines:
        for index in range(len(conversations) if num_rows is None else num_rows):
            copy, at = divmod(index, len(conversations))
            turns = conversations[at]
            if num_rows is not None:
                first = next(place for place, turn in enumerate(turns) if turn["role"] == "user")
                question = {"role": "user", "content": f"{copy}: {turns[first]['content']}"}
                turns = [*turns[:first], question, *turns[first + 1 :]]
            lines.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return file
