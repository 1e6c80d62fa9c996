"""Files with bytes damaged at random: the preparation stops and says so, or counts every row. Nothing else, ever.

Each try runs the real reader and preparation of a stage in a child process, so that a crash of the interpreter or an
endless loop in a library is a failure with its seed, not the end of the tests.
"""

import contextlib
import io
import json
import multiprocessing
import random
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import save_rows, toy_texts
from transformers import PreTrainedTokenizerBase

from mini_qwen.conversations import ConversationData, prepare_conversations
from mini_qwen.documents import DocumentData, prepare_documents
from mini_qwen.preferences import PreferenceData, prepare_preferences

NUM_TRIES = 600  # of the quick test
SLOW_SECONDS = 600
SECONDS_A_TRY = 20.0  # some hundredths are usual
TRIES_A_CHILD = 100
NUM_ROWS = 60
MAX_LENGTH = 96


class Sample(NamedTuple):
    """A sound file."""

    stage: str
    name: str
    content: bytes


def rows_of(stage: str) -> list[dict[str, Any]]:
    texts = toy_texts() + toy_texts()[::-1]
    rows: list[dict[str, Any]] = []
    for number in range(NUM_ROWS):
        question, answer = f"{number}: {texts[number]}", texts[number + 7]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}] * (1 + number % 3)
        if stage == "pt":
            rows.append({"text": question, "id": number, "label": {"score": 0.5, "ability": ["a", "b"]}})
        elif stage == "sft":
            rows.append({"id": number, "conversations": turns, "label": {"ability": ["a"] * (number % 3)}})
        else:
            asked = {"role": "user", "content": question}
            sides = [[asked, {"role": "assistant", "content": text}] for text in (answer, f"No. {number}")]
            rows.append({"prompt": question, "chosen": sides[0], "rejected": sides[1], "id": number})
    return rows


def as_parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=NUM_ROWS // 2, **options)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("samples")
    found = []
    for stage in ("pt", "sft", "dpo"):
        rows = rows_of(stage)
        for compression in ("snappy", "zstd", "none"):
            options = {
                "use_dictionary": compression != "zstd",
                "data_page_version": "2.0" if stage == "sft" else "1.0",
            }
            found.append(Sample(stage, f"{compression}.parquet", as_parquet(rows, compression=compression, **options)))
        for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"):
            found.append(Sample(stage, name, save_rows(folder / name, rows).read_bytes()))
    lines = [{"text": row["text"].replace("\n", " ")} for row in rows_of("pt")]
    for name in ("a.csv", "a.txt"):
        found.append(Sample("pt", name, save_rows(folder / name, lines).read_bytes()))
    return found


def damage(content: bytes, generator: random.Random) -> bytes:
    """One to four damages: bytes overwritten, deleted, inserted, repeated; single bits; the end cut off."""
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(content) + 1)
        if generator.random() < 0.3:  # the end of a parquet holds its schema
            at = max(len(content) - generator.randrange(1, 400), 0)
        length = generator.choice([1, 1, 2, 4, 16, 200])
        noise = generator.randbytes(length)
        if generator.random() < 0.2:
            noise = bytes([generator.choice(b'\0\xff\n"{[')]) * length
        kind = generator.choice(["overwrite", "overwrite", "bit", "bit", "delete", "insert", "repeat", "truncate"])
        if kind == "overwrite":
            content = content[:at] + noise + content[at + length :]
        elif kind == "bit" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]
        elif kind == "delete":
            content = content[:at] + content[at + length :]
        elif kind == "insert":
            content = content[:at] + noise + content[at:]
        elif kind == "repeat":
            content = content[: at + length] + content[at:]
        elif kind == "truncate" and generator.random() < 0.5:
            content = content[:at]
    return content


def prepare(sample: Sample, tokenizer: PreTrainedTokenizerBase, file: Path) -> int:
    """The number of rows that were read and are accounted for."""
    keys: dict[str, Any] = {"train_files": [str(file)], "cache_dir": str(file.parent), "max_drop_share": 1.0}
    if sample.stage == "pt":
        _, _, ledger = prepare_documents(DocumentData(block_size=16, **keys), tokenizer, seed=0)
    elif sample.stage == "sft":
        _, _, ledger = prepare_conversations(ConversationData(**keys), tokenizer, MAX_LENGTH, seed=0)
    else:
        _, _, ledger = prepare_preferences(PreferenceData(**keys), tokenizer, MAX_LENGTH)
    ledger.check(max_drop_share=1.0)
    return ledger.rows_read


def attempt(seed: int, samples: list[Sample], tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """What became of a damaged file, "stopped" or "counted". Raises AssertionError for a loss that is not said."""
    sample = samples[seed % len(samples)]
    file = folder / sample.name
    file.write_bytes(damage(sample.content, random.Random(seed)))
    try:
        rows_read = prepare(sample, tokenizer, file)
    except SystemExit as stopped:
        message = str(stopped)
        assert message and "\n" not in message, message
        assert str(file) in message or "No row is left" in message or "one block" in message, message
        return "stopped"
    if file.suffix == ".parquet":
        assert rows_read == NUM_ROWS, f"{rows_read} of {NUM_ROWS} rows"  # parquet knows how many it has
    return "counted"


def run_tries(seeds: list[int], samples: list[Sample], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """In a child process; each line of its report is a seed, and then what became of it."""
    with (folder / "report").open("w", buffering=1) as report, contextlib.redirect_stderr(io.StringIO()):
        for seed in seeds:
            report.write(f"{seed} ")
            started = time.monotonic()
            try:
                with tempfile.TemporaryDirectory(dir=folder) as own:
                    found = attempt(seed, samples, tokenizer, Path(own))
            except BaseException:
                found = traceback.format_exc()
            if time.monotonic() - started > SECONDS_A_TRY / 2:
                found = f"took {time.monotonic() - started:.0f} seconds"
            report.write(json.dumps(found) + "\n")


def fuzz(
    seeds: list[int], samples: list[Sample], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[Counter[str], dict[int, str]]:
    """How often the tries stopped or counted, and what else happened, by seed."""
    folder.mkdir()
    child = multiprocessing.get_context("fork").Process(target=run_tries, args=(seeds, samples, tokenizer, folder))
    child.start()
    child.join(SECONDS_A_TRY * 2 + 0.5 * len(seeds))
    hung = child.is_alive()
    if hung:
        child.kill()
        child.join()
    outcomes, failures = Counter[str](), {}
    for line in (folder / "report").read_text().splitlines():
        seed, _, found = line.partition(" ")
        if not found:
            failures[int(seed)] = "hangs" if hung else f"crashed the interpreter, exit code {child.exitcode}"
        elif json.loads(found) in ("stopped", "counted"):
            outcomes[json.loads(found)] += 1
        else:
            failures[int(seed)] = json.loads(found)
    return outcomes, failures


def report_of(failures: dict[int, str], samples: list[Sample]) -> str:
    return "\n".join(f"seed {seed}, {samples[seed % len(samples)][:2]}: {what}" for seed, what in failures.items())


def test_the_samples_are_sound(samples: list[Sample], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for number, sample in enumerate(samples):
        file = tmp_path / str(number) / sample.name
        file.parent.mkdir()
        file.write_bytes(sample.content)
        assert prepare(sample, tokenizer, file) == NUM_ROWS


def test_damaged_files_stop_the_run_or_are_counted(
    samples: list[Sample], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    outcomes, failures = fuzz(list(range(NUM_TRIES)), samples, tokenizer, tmp_path / "tries")
    assert not failures, report_of(failures, samples)
    assert outcomes.total() == NUM_TRIES
    assert min(outcomes["stopped"], outcomes["counted"]) > NUM_TRIES // 10


@pytest.mark.slow
def test_damaged_files_for_ten_minutes(
    samples: list[Sample], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    started, first = time.monotonic(), NUM_TRIES
    outcomes, failures = Counter[str](), {}
    while time.monotonic() - started < SLOW_SECONDS:
        more, wrong = fuzz(list(range(first, first + TRIES_A_CHILD)), samples, tokenizer, tmp_path / str(first))
        outcomes += more
        failures |= wrong
        first += TRIES_A_CHILD
    print(f"{outcomes.total():,} tries: {dict(outcomes)}")
    assert not failures, report_of(failures, samples)
