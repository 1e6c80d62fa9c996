"""mini_qwen/rows.py: rows of clashing schemas in any order, and what cannot be read named with its file."""

import json
import re
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WriteRows
from hypothesis import given
from hypothesis import strategies as st

from mini_qwen.rows import Row, check_columns, choose_held_out, count_rows, find_files, read_rows

LABEL = pa.struct([("ability_en", pa.list_(pa.string())), ("score", pa.float32())])


def texts(files: list[Path]) -> list[str]:
    return [row.values["text"] for row in read_rows(files, ["text"])]


def read_all(paths: list[Path]) -> list[Row]:
    """As a stage reads its documents."""
    files = find_files([str(path) for path in paths])
    check_columns(files, [["text"]])
    return list(read_rows(files, ["text"]))


def test_clashing_schemas_read_in_any_order(tmp_path: Path) -> None:
    """The clashes of the real data: `id` a number or a text, `label` a struct, null or absent, texts large or not."""
    tables = [
        pa.table({"id": [1, 2], "text": ["a", "b"], "label": pa.array([{"score": 0.5}, None], LABEL)}),
        pa.table({"label": pa.nulls(1), "text": pa.array(["c"], pa.large_string()), "id": ["three"]}),
        pa.table({"text": ["d", None]}),
    ]
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    for file, table in zip(files, tables, strict=True):
        pq.write_table(table, file)
    values = {files[0]: ["a", "b"], files[1]: ["c"], files[2]: ["d", None]}
    for order in permutations(files):
        assert [row.values for row in read_rows(list(order), ["text"])] == [
            {"text": text} for file in order for text in values[file]
        ]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_every_format_gives_the_same_rows(write_rows: WriteRows, suffix: str) -> None:
    turns = [{"from": "human", "value": "你好\n🙂\u2028x"}]
    rows = [{"text": f"行 {n}", "turns": turns, "other": n} for n in range(3)]
    file = write_rows(f"rows.{suffix}", rows)
    assert list(read_rows([file], ["text", "turns", "absent"])) == [
        Row(file, number, {"text": f"行 {number}", "turns": turns}) for number in range(3)
    ]
    assert count_rows(file) == 3


def test_blank_lines_of_jsonl_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"text": "a"}\n\n  \n{"text": "b"}', encoding="utf-8")
    assert texts([file]) == ["a", "b"]
    assert count_rows(file) == 2


def test_more_rows_than_one_batch(write_rows: WriteRows) -> None:
    file = write_rows("rows.parquet", [{"text": str(number)} for number in range(2500)])
    rows = list(read_rows([file], ["text"]))
    assert [row.values["text"] for row in rows] == [str(number) for number in range(2500)]
    assert [row.number for row in rows] == list(range(2500))
    assert rows[2400].place == f"{file}, row 2400"


def test_folders_are_searched_in_a_fixed_order_and_files_taken_once(write_rows: WriteRows, tmp_path: Path) -> None:
    names = ["b/y.parquet", "a/chinese/high/x.parquet", "a/x.jsonl", "c.json"]
    files = [write_rows(f"data/{name}", [{"text": name}]) for name in names]
    (tmp_path / "data/README.md").write_text("not data", encoding="utf-8")
    found = find_files([str(tmp_path / "data"), str(files[0]), str(tmp_path / "data/a")])
    assert sorted(found) == sorted(files)
    assert found == find_files([str(tmp_path / "data")])


def test_named_files_keep_their_order(write_rows: WriteRows) -> None:
    files = [str(write_rows(name, [{"text": "x"}])) for name in ("b.parquet", "a.parquet")]
    assert [str(file) for file in find_files(files)] == files


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no_such_folder"):
        find_files([str(tmp_path / "no_such_folder")])


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(SystemExit, match=re.escape(str(tmp_path)) + r".*\.parquet"):
        find_files([str(tmp_path)])


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\na", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"rows\.csv.*\.parquet"):
        find_files([str(tmp_path / "rows.csv")])


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_a_missing_column_names_file_and_columns(write_rows: WriteRows, suffix: str) -> None:
    good = write_rows("good.parquet", [{"text": "a"}])
    bad = write_rows(f"bad.{suffix}", [{"content": "a", "id": 1}] * 3)
    with pytest.raises(SystemExit) as error:
        read_all([good, bad])
    for part in (str(bad), "'text'", "content, id"):
        assert part in str(error.value)


def test_columns_of_one_choice_are_enough(write_rows: WriteRows) -> None:
    both = [write_rows("a.parquet", [{"a": 1}]), write_rows("b.parquet", [{"b": 1, "c": 2}])]
    check_columns(both, [["a"], ["b", "c"]])
    with pytest.raises(SystemExit, match=r"b\.parquet"):
        check_columns(both, [["a"], ["b", "d"]])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (POINTER.encode(), "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n <html>", "web page"),
        (b"", "broken"),
        (b"PAR1 and then something else", "broken"),
    ],
)
def test_what_is_no_parquet_is_named_with_its_cause(write_rows: WriteRows, content: bytes, cause: str) -> None:
    good = write_rows("good.parquet", [{"text": "a"}])
    bad = good.with_name("rank_00001.parquet")
    bad.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"rank_00001\.parquet.*{cause}"):
        read_all([good, bad])


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_a_truncated_parquet_is_named(write_rows: WriteRows, part: float) -> None:
    file = write_rows("rows.parquet", [{"text": f"some text {number}"} for number in range(500)])
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(SystemExit, match=r"rows\.parquet.*broken or cut off"):
        read_all([file])


def test_a_parquet_damaged_inside_is_named(write_rows: WriteRows) -> None:
    """The end, which holds the schema, is sound; the damage shows only when the rows are read."""
    file = write_rows("rows.parquet", [{"text": f"some text {number}"} for number in range(500)])
    content = bytearray(file.read_bytes())
    content[4:400] = bytes(255 - value for value in content[4:400])
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"rows\.parquet"):
        read_all([file])


def test_an_empty_parquet_among_good_ones_is_fine(write_rows: WriteRows, tmp_path: Path) -> None:
    good = write_rows("good.parquet", [{"text": "a"}])
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    assert [row.values["text"] for row in read_all([tmp_path / "empty.parquet", good])] == ["a"]
    assert count_rows(tmp_path / "empty.parquet") == 0


def test_a_bad_line_is_named_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"\n{"text": "d"}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"rows\.jsonl\b.*\b(line 3|row 2)\b"):
        read_all([file])


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"text": "中文"}\n'.encode("gb18030"))
    with pytest.raises(SystemExit, match=r"rows\.jsonl.*UTF-8"):
        read_all([file])


@pytest.mark.parametrize("value", ["text", 5, None, ["text"]])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n' + json.dumps(value) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"rows\.jsonl, row 1"):
        read_all([file])


@pytest.mark.parametrize("value", [["text"], [{"text": "a"}, 5], {"text": "a"}, 5, None, "text"])
def test_a_json_file_that_is_no_list_of_objects_is_named(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"rows\.json"):
        read_all([file])


@given(num_rows=st.integers(2, 60), seed=st.integers(0, 5), data=st.data())
def test_held_out_rows_are_as_many_as_asked_and_a_function_of_the_seed(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, seed: int, data: st.DataObject
) -> None:
    eval_rows = data.draw(st.integers(1, num_rows - 1))
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("{}\n" * num_rows, encoding="utf-8")
    chosen = choose_held_out([file], eval_rows, seed)
    assert len(chosen) == eval_rows
    assert chosen <= set(range(num_rows))
    assert chosen == choose_held_out([file], eval_rows, seed)


def test_another_seed_holds_out_other_rows(write_rows: WriteRows) -> None:
    file = write_rows("rows.jsonl", [{}] * 100)
    assert choose_held_out([file], 10, seed=1) != choose_held_out([file], 10, seed=2)
    assert choose_held_out([file], 0, seed=1) == set()


@pytest.mark.parametrize("eval_rows", [3, 4])
def test_not_all_rows_can_be_held_out(write_rows: WriteRows, eval_rows: int) -> None:
    file = write_rows("rows.jsonl", [{}] * 3)
    with pytest.raises(SystemExit, match=rf"eval_rows is {eval_rows}\b.*\b3 rows"):
        choose_held_out([file], eval_rows, seed=0)
