"""utils/save_mini_data.py keeps layout, columns and types, takes the first rows only, and refuses in time."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "utils" / "save_mini_data.py"
TURNS = [[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]]
LABEL = pa.struct([("ability_en", pa.list_(pa.string())), ("ability_zh", pa.list_(pa.string()))])
PAIR = [[{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}]]


def save(cwd: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Run the tool as a person would, from another folder than the repository."""
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", check=False)


def write(path: Path, columns: dict[str, object], **options: object) -> None:
    """Write a parquet file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small tree with the clashes of the real one: ids int and string, label null, columns that differ."""
    data = tmp_path / "data"
    high = "film_entertainment/{}/high/rank_{:05d}.parquet"
    for number in (10, 726, 800):
        text = pa.array([f"{number} row {row}" for row in range(50)])
        write(data / "pt" / high.format("english", number), {"text": text, "num_words": pa.array(range(50))})
    write(data / "pt" / high.format("chinese", 0), {"text": ["甲", "乙"], "_id": [200200005357, 1]})
    label = pa.array([None] * 50, LABEL)
    write(
        data / "sft/7M/train-00000-of-00002.parquet",
        {"id": pa.array(range(50)), "conversations": TURNS * 50, "label": label},
    )
    write(data / "sft/7M/train-00001-of-00002.parquet", {"id": [99], "conversations": TURNS})
    write(
        data / "sft/Gen/train-00000-of-00001.parquet",
        {
            "id": ["a" * 32] * 50,
            "label": pa.nulls(50),
            "conversations": TURNS * 50,
            "reward": pa.nulls(50, pa.float32()),
        },
    )
    for split in ("train", "test"):
        for shard in range(2):
            columns = {"prompt": [split] * 50, "chosen": PAIR * 50, "rejected": PAIR * 50, "id": pa.array(range(50))}
            write(data / f"dpo/{split}-{shard:05d}-of-00002.parquet", columns)
    return data


def test_first_file_of_every_folder_and_both_splits_of_dpo(tmp_path: Path, source: Path) -> None:
    done = save(tmp_path, "--source", "data", "--target", "mini", "--rows", 5)
    assert done.returncode == 0, done.stderr
    saved = sorted(path.relative_to(tmp_path / "mini").as_posix() for path in (tmp_path / "mini").rglob("*.parquet"))
    assert saved == [
        "dpo/test-00000-of-00002.parquet",
        "dpo/train-00000-of-00002.parquet",
        "pt/film_entertainment/chinese/high/rank_00000.parquet",
        "pt/film_entertainment/english/high/rank_00010.parquet",
        "sft/7M/train-00000-of-00002.parquet",
        "sft/Gen/train-00000-of-00001.parquet",
    ]
    for name in saved:
        assert name in done.stdout
    assert "6 files" in done.stdout.splitlines()[-1] and "27" in done.stdout.splitlines()[-1]


def test_rows_are_the_first_ones_with_all_columns_and_types(tmp_path: Path, source: Path) -> None:
    assert save(tmp_path, "--source", "data", "--target", "mini", "--rows", 5).returncode == 0
    for path in (tmp_path / "mini").rglob("*.parquet"):
        whole = pq.read_table(source / path.relative_to(tmp_path / "mini"))
        small = pq.read_table(path)
        assert small.schema.equals(whole.schema)
        assert small.equals(whole.slice(0, 5))


def test_rows_across_row_groups_and_batches(tmp_path: Path) -> None:
    write(tmp_path / "data/pt/a.parquet", {"text": [str(row) for row in range(5000)]}, row_group_size=700)
    assert save(tmp_path, "--target", "mini", "--rows", 2500).returncode == 0
    assert pq.read_table(tmp_path / "mini/pt/a.parquet")["text"].to_pylist() == [str(row) for row in range(2500)]


def test_later_row_groups_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data/pt/a.parquet"
    text = [f"{row:0200d}" for row in range(300)]
    write(path, {"text": text}, row_group_size=100, compression="zstd")
    with pq.ParquetFile(path) as parquet:
        start = parquet.metadata.row_group(1).column(0).dictionary_page_offset
        end = start + parquet.metadata.row_group(1).column(0).total_compressed_size
    content = bytearray(path.read_bytes())
    content[start:end] = b"\xff" * (end - start)
    path.write_bytes(content)
    with pytest.raises(OSError):
        pq.read_table(path)
    done = save(tmp_path, "--target", "mini", "--rows", 100)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "mini/pt/a.parquet")["text"].to_pylist() == text[:100]


def test_empty_target_folder_is_accepted(tmp_path: Path, source: Path) -> None:
    (tmp_path / "mini").mkdir()
    assert save(tmp_path, "--target", "mini").returncode == 0


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--source", "nowhere", "--target", "mini"), "nowhere"),
        (("--source", "bare", "--target", "mini"), "bare/pt"),
        (("--source", "data", "--target", "full"), "full"),
        (("--source", "data", "--target", "full/keep.txt"), "keep.txt"),
        (("--source", "data", "--target", "mini", "--rows", 0), "--rows is 0"),
        (("--source", "damaged", "--target", "mini"), "cut.parquet"),
    ],
)
def test_refusals_come_before_anything_is_written(
    tmp_path: Path, source: Path, args: tuple[object, ...], told: str
) -> None:
    (tmp_path / "bare/pt").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/keep.txt").write_text("mine", encoding="utf-8")
    write(tmp_path / "damaged/pt/a/good.parquet", {"text": ["x"]})
    (tmp_path / "damaged/sft").mkdir()
    (tmp_path / "damaged/sft/cut.parquet").write_bytes(b"PAR1")
    before = sorted(tmp_path.rglob("*"))
    done = save(tmp_path, *args)
    assert done.returncode == 1
    assert told in done.stderr and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full/keep.txt").read_text(encoding="utf-8") == "mine"
