"""mini_qwen/rows.py: rows of clashing schemas in any order; of what cannot be read, the file and the row are named."""

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WriteRows
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mini_qwen import rows as module
from mini_qwen.files import find_files
from mini_qwen.rows import Row, check_columns, read_rows

LABEL = pa.struct([("ability_en", pa.list_(pa.string())), ("score", pa.float32())])


def read_all(paths: list[Path]) -> list[Row]:
    """As a stage reads its documents."""
    files = find_files([str(path) for path in paths])
    check_columns(files, [["text"]])
    return list(read_rows(files, ["text"]))


def texts_and_faults(file: Path) -> list[Any]:
    """The text of each row that can be read, in brackets what is wrong with the others."""
    return [[row.fault] if row.fault else row.values["text"] for row in read_rows([file], ["text"])]


# Parquet


def test_clashing_schemas_read_in_any_order(tmp_path: Path) -> None:
    """The clashes of the real data: `id` a number or a text, `label` a struct, null or absent, texts large or not."""
    tables = [
        pa.table({"id": [1, 2], "text": ["a", "b"], "label": pa.array([{"score": 0.5}, None], LABEL)}),
        pa.table({"label": pa.nulls(1), "text": pa.array(["c"], pa.large_string()), "id": ["three"]}),
        pa.table({"text": ["d", None]}),
        pa.table({"label": ["e"], "text": pa.array(["e"], pa.string_view())}),
        pa.table({"text": pa.array(["f", "f"]).dictionary_encode()}),
    ]
    files = [tmp_path / f"{number}.parquet" for number in range(len(tables))]
    for file, table in zip(files, tables, strict=True):
        pq.write_table(table, file)
    values = dict(zip(files, [["a", "b"], ["c"], ["d", None], ["e"], ["f", "f"]], strict=True))
    for order in permutations(files):
        assert [row.values for row in read_rows(list(order), ["text"])] == [
            {"text": text} for file in order for text in values[file]
        ]


def test_more_rows_than_one_batch(write_rows: WriteRows) -> None:
    file = write_rows("rows.parquet", [{"text": str(number)} for number in range(2500)])
    rows = list(read_rows([file], ["text"]))
    assert [row.values["text"] for row in rows] == [str(number) for number in range(2500)]
    assert [row.number for row in rows] == list(range(2500))
    assert rows[2400].place == f"{file}, row 2400"


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


def test_checksums_of_pages_are_looked_at_where_there_are_any(tmp_path: Path) -> None:
    """Without them, a changed letter of an uncompressed text could not be told from a written one."""
    file = tmp_path / "rows.parquet"
    table = pa.table({"text": [f"some text {number}" for number in range(500)]})
    pq.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
    assert len(read_all([file])) == 500
    content = file.read_bytes()
    file.write_bytes(content.replace(b"some text 77", b"some tekst 7"))
    with pytest.raises(SystemExit, match=r"rows\.parquet cannot be read.*fetch it again"):
        read_all([file])


def test_a_parquet_that_says_it_has_fewer_rows_is_named(tmp_path: Path) -> None:
    """Its second number of rows stands in the file's end; a file that says it has none must not pass for empty."""
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 8}), file)
    content, metadata = file.read_bytes(), pq.ParquetFile(file).metadata
    start = len(content) - 8 - metadata.serialized_size
    in_all = bytes([0x16, 2 * 8])  # Thrift's compact form of field 3, an i64 of 8
    at = content.index(in_all, start)
    file.write_bytes(content[:at] + bytes([0x16, 0]) + content[at + 2 :])
    assert pq.ParquetFile(file).metadata.num_rows == 0
    with pytest.raises(SystemExit, match=r"rows\.parquet is damaged: it has 8 rows, not 0; fetch it again"):
        read_all([file])


def test_texts_of_parquet_that_are_no_utf8_are_faults_of_their_rows(tmp_path: Path) -> None:
    texts = [b"a", "中文".encode("gb18030"), b"b", b"\xed\xa0\x80", None]
    file = tmp_path / "rows.parquet"
    array = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": array}), file)
    assert texts_and_faults(file) == ["a", ["not valid UTF-8"], "b", ["not valid UTF-8"], None]


def test_a_value_that_python_cannot_hold_is_a_fault_of_its_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": pa.array([0, 2**62], pa.timestamp("us"))}), file)
    assert [row.fault for row in read_rows([file], ["text"])] == [None, "a value that cannot be read"]


def test_an_empty_parquet_among_good_ones_is_fine(write_rows: WriteRows, tmp_path: Path) -> None:
    good = write_rows("good.parquet", [{"text": "a"}])
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    assert [row.values["text"] for row in read_all([tmp_path / "empty.parquet", good])] == ["a"]


# Lines


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    for name, content in [("rows.jsonl", '\n{"text": "a"}\n\n  \n{"text": "b"}'), ("rows.txt", "\na\n\n  \nb")]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        rows = list(read_rows([tmp_path / name], ["text"]))
        assert [(row.number, row.values["text"]) for row in rows] == [(0, "a"), (1, "b")]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"text": "c"', "not valid JSON"),
        (b'{"text": c}', "not valid JSON"),
        (b'{"text": "c"}{"text": "d"}', "not valid JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON"),  # more digits than Python reads
        (b'{"text": ' + b"[" * 100_000, "not valid JSON"),  # deeper than Python goes
        ('{"text": "中文"}'.encode("gb18030"), "not valid UTF-8"),
        ('{"text": "中文"}'.encode("utf-16"), "not valid UTF-8"),
        (b'["text"]', "no object with named fields"),
        (b"null", "no object with named fields"),
        (b'"text"', "no object with named fields"),
        (b"5", "no object with named fields"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_fault_of_its_row(tmp_path: Path, line: bytes, fault: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert texts_and_faults(file) == ["a", [fault], "b"]


def test_lines_of_txt_that_are_no_utf8_are_faults(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_bytes("中文\n".encode() + "中文\n".encode("gb18030"))
    assert texts_and_faults(tmp_path / "rows.txt") == ["中文", ["not valid UTF-8"]]


# CSV


def test_fields_of_csv_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('id,text\n1,"a ""b""\n\nc"\n\n2,d\n', encoding="utf-8")
    assert texts_and_faults(tmp_path / "rows.csv") == ['a "b"\n\nc', "d"]


def test_a_record_with_more_or_fewer_fields_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,text\n1,a\n2\n3,c,c\n4,d\n", encoding="utf-8")
    ragged = ["more or fewer fields than the header"]
    assert texts_and_faults(tmp_path / "rows.csv") == ["a", ragged, ragged, "d"]


def test_csv_that_breaks_off_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('id,text\n1,a\n2,"b\n3,c\n', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"rows\.csv, line 3 is not valid csv.*Correct this line"):
        read_all([tmp_path / "rows.csv"])


def test_a_long_field_of_csv_is_whole(write_rows: WriteRows) -> None:
    """Python's own limit is 131,072 characters."""
    assert [row.values["text"] for row in read_all([write_rows("rows.csv", [{"text": "x" * 500_000}])])] == [
        "x" * 500_000
    ]


# JSON

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=6)


@settings(max_examples=200)
@given(
    objects=OBJECTS,
    read_size=st.integers(1, 40),
    layout=st.sampled_from(
        [
            json.dumps,
            lambda objects: json.dumps(objects, ensure_ascii=False, indent=2) + "\n",
            lambda objects: json.dumps(objects, separators=(",", ":")),
            lambda objects: "\n".join(json.dumps(item, indent=1) for item in objects),
            lambda objects: "".join(map(json.dumps, objects)),
            lambda objects: f"  [{' , '.join(map(json.dumps, objects))}]{' ' * 60}",
        ]
    ),
)
@example(objects=[{"a": "\U0001f642"}], read_size=1, layout=json.dumps)  # two escapes for one character
@example(objects=[{"a": -1.5e-300, "b": [float("inf"), -float("inf")]}], read_size=1, layout=json.dumps)
def test_json_is_read_as_a_whole_would_be(
    tmp_path_factory: pytest.TempPathFactory,
    objects: list[dict[str, Any]],
    read_size: int,
    layout: Callable[[Any], str],
) -> None:
    """However it is laid out, a list or objects one after the other, and wherever the reading breaks off."""
    file = tmp_path_factory.mktemp("json") / "rows.json"
    file.write_bytes(layout(objects).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "JSON_READ_SIZE", read_size)
        rows = list(read_rows([file], None))
    assert [row.values for row in rows] == objects
    assert [row.number for row in rows] == list(range(len(objects)))


BROKEN = {
    "cut in an object": '[{"text": "a"}, {"text": ',
    "cut in a text": '[{"text": "a"}, {"text": "b',
    "cut between objects": '[{"text": "a"}',
    "a missing colon": '[{"text": "a"}, {"text" "b"}, {"text": "c"}]',
    "a missing quote": '[{"text": "a"}, {"text": "b}, {"text": "c"}]',
    "too many digits": '[{"text": "a"}, {"text": ' + "1" * 5000 + "}]",
    "too deep": '[{"text": "a"}, ' + "[" * 100_000,
    "something behind the list": '[{"text": "a"}] {"text": "b"}',
    "a second list": '[{"text": "a"}]\n[{"text": "b"}]',
    "no quotes": '[{"text": "a"}, {text: 5}]',
}


@pytest.mark.parametrize("case", BROKEN)
def test_json_that_is_broken_names_its_row(tmp_path: Path, case: str) -> None:
    (tmp_path / "rows.json").write_text(BROKEN[case], encoding="utf-8")
    for read_size in (1, 10, 1 << 20):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match=r"rows\.json, row 1 is not valid"):
            patch.setattr(module, "JSON_READ_SIZE", read_size)
            read_all([tmp_path / "rows.json"])


def test_broken_json_does_not_take_the_file_into_memory(tmp_path: Path) -> None:
    """What follows cannot mend it; the reading ends where the error is."""
    rest = ", ".join(['{"text": "b"}'] * 20_000)
    (tmp_path / "rows.json").write_text(f'[{{"text": "a"}}, {{"text" "b"}}, {rest}]', encoding="utf-8")
    sizes = []

    class Decoder(json.JSONDecoder):
        def raw_decode(self, text: str, at: int = 0) -> Any:
            sizes.append(len(text))
            return super().raw_decode(text, at)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="row 1"):
        patch.setattr(module, "JSON_READ_SIZE", 1000)
        patch.setattr(module.json, "JSONDecoder", Decoder)
        read_all([tmp_path / "rows.json"])
    assert max(sizes) <= 2000


@pytest.mark.parametrize("items", [["text"], [{"text": "a"}, 5], [None, {"text": "a"}]])
def test_what_is_no_object_is_a_fault_of_its_row(tmp_path: Path, items: list[Any]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(items), encoding="utf-8")
    assert texts_and_faults(tmp_path / "rows.json") == [
        item["text"] if isinstance(item, dict) else ["no object with named fields"] for item in items
    ]


def test_a_lone_surrogate_is_read_as_it_is_spelt(tmp_path: Path) -> None:
    """What is done with it is for the schema to say; JSON can spell it."""
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text('{"text": "a\\ud83db"}\n', encoding="utf-8")
        assert texts_and_faults(tmp_path / name) == ["a\ud83db"]


# Columns


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv", "jsonl.gz"])
def test_a_missing_column_names_file_and_columns(write_rows: WriteRows, suffix: str) -> None:
    good = write_rows("good.parquet", [{"text": "a"}])
    bad = write_rows(f"bad.{suffix}", [{"content": "a", "id": 1}] * 3)
    with pytest.raises(SystemExit) as error:
        read_all([good, bad])
    for part in (str(bad), "'text'", "content, id"):
        assert part in str(error.value)


def test_columns_with_odd_names_are_named_in_one_line(write_rows: WriteRows) -> None:
    """As they are where the names themselves are damaged."""
    bad = write_rows("bad.parquet", [{"con\ntent": "a", "x" * 10_000: 1}])
    with pytest.raises(SystemExit) as error:
        read_all([bad])
    message = str(error.value)
    assert "It has: con tent, xxx" in message
    assert "\n" not in message and len(message) < 1000


def test_columns_of_one_choice_are_enough(write_rows: WriteRows) -> None:
    both = [write_rows("a.parquet", [{"a": 1}]), write_rows("b.parquet", [{"b": 1, "c": 2}])]
    check_columns(both, [["a"], ["b", "c"]])
    with pytest.raises(SystemExit, match=r"b\.parquet"):
        check_columns(both, [["a"], ["b", "d"]])


def test_lines_that_cannot_be_read_before_the_first_that_can_do_not_hide_its_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"te\n7\n{"content": "a"}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="It has: content"):
        read_all([tmp_path / "rows.jsonl"])


def test_a_file_without_rows_has_no_columns_to_lack(tmp_path: Path) -> None:
    for name, content in [("a.jsonl", ""), ("b.json", "[]"), ("c.csv", "content\n"), ("d.txt", "\n")]:
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_all(sorted(tmp_path.iterdir())) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": 5}', "'text' is 5"),
        ('{"other": "a"}', "'text' is None"),
        ('{"text": "a \\ud83d b"}', "not valid Unicode"),
        ('{"text": ', "row 1 cannot be read: not valid JSON"),
    ],
)
def test_text_that_is_asked_of_a_row_is_text(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "小明 ok 🙂"}\n' + line + "\n", encoding="utf-8")
    good, bad = read_rows([file], ["text"])
    assert good.text("text") == "小明 ok 🙂"
    with pytest.raises(SystemExit, match=words):
        bad.text("text")
