"""utils/view_data.py shows schema, number of rows and shortened rows, and names what it cannot read."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "utils" / "view_data.py"
ROWS = [
    {"id": 7, "conversations": [{"from": "human", "value": "你好" * 50}, {"from": "gpt", "value": "one\ntwo"}]},
    {"id": 8, "conversations": [{"from": "human", "value": "second"}]},
    {"id": 9, "conversations": [{"from": "human", "value": "third"}]},
]


def view(cwd: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Run the tool as a person would, from another folder than the repository."""
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", check=False)


def write(path: Path) -> Path:
    """Write ROWS in the format that the suffix names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_same_rows_look_the_same_in_every_format(tmp_path: Path, suffix: str) -> None:
    done = view(tmp_path, write(tmp_path / f"rows{suffix}"), "--rows", 2, "--width", 10)
    assert done.returncode == 0, done.stderr
    assert "3 rows" in done.stdout
    assert "id: int" in done.stdout.partition("row 0")[0]
    shown = done.stdout[done.stdout.index("row 0") :]
    assert shown == (
        "row 0:\n  id: 7\n  conversations:\n"
        "    0:\n      from: human\n      value: 你好你好你好你好你好... [90 more characters]\n"
        "    1:\n      from: gpt\n      value: one\n        two\n"
        "\nrow 1:\n  id: 8\n  conversations:\n    0:\n      from: human\n      value: second\n"
    )


def test_text_of_exactly_the_width_is_whole(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"text": "12345"}', encoding="utf-8")
    assert "text: 12345\n" in view(tmp_path, "one.json", "--width", 5).stdout
    assert "text: 1234... [1 more characters]\n" in view(tmp_path, "one.json", "--width", 4).stdout


def test_parquet_schema_names_every_type(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "label": pa.nulls(1), "reward": [0.5], "ids": [[1, 2]]})
    pq.write_table(table, tmp_path / "types.parquet")
    out = view(tmp_path, "types.parquet").stdout
    for line in ("id: string", "label: null", "reward: double", "ids: list<element: int64>", "ids: [1, 2]"):
        assert line in out


def test_mixed_types_of_json_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "mixed.jsonl").write_text('{"id": 1}\n{"id": "x"}\n{"id": null}\n', encoding="utf-8")
    assert "id: NoneType or int or str" in view(tmp_path, "mixed.jsonl").stdout


def test_empty_table_is_not_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    done = view(tmp_path, "empty.parquet")
    assert done.returncode == 0 and "0 rows" in done.stdout and "text: string" in done.stdout


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("cut.parquet", b"PAR1 and then nothing", "cut off"),
        ("bad.jsonl", b'{"a": 1}\n{"a": \n', "line 2"),
        ("bad.json", b"<html>", "misnamed"),
        ("binary.jsonl", b"\x88\xff\x00", "misnamed"),
        ("notes.txt", b"text", ".parquet, .jsonl, .json"),
        ("bare", b"text", ".parquet, .jsonl, .json"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    done = view(tmp_path, name)
    assert done.returncode == 1
    assert name in done.stderr and told in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_half_a_character_pair_is_shown_as_it_is_spelt(tmp_path: Path) -> None:
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud83d b", "k\\udc00": 1}\n', encoding="utf-8")
    done = view(tmp_path, "half.jsonl")
    assert done.returncode == 0, done.stderr
    assert "text: a\\ud83d b" in done.stdout and "k\\udc00: int" in done.stdout


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_a_suffix_in_capitals_is_the_same(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"rows{suffix}")
    shown = view(tmp_path, file).stdout.partition("columns")[2]
    assert shown and view(tmp_path, file.rename(tmp_path / f"ROWS{suffix.upper()}")).stdout.endswith(shown)


@pytest.mark.parametrize("args", [("nowhere.parquet",), (".",), ("ok.json", "--rows", 0), ("ok.json", "--width", -1)])
def test_missing_files_and_senseless_numbers_are_refused(tmp_path: Path, args: tuple[object, ...]) -> None:
    (tmp_path / "ok.json").write_text("[]", encoding="utf-8")
    done = view(tmp_path, *args)
    assert done.returncode == 1
    assert str(args[-1]) in done.stderr and "Traceback" not in done.stderr
