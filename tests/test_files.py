"""mini_qwen/files.py: what is a data file, how it is opened, and what is said of one that cannot be."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WriteRows, save_bytes, save_rows

from mini_qwen.files import (
    KINDS,
    check_content,
    count_rows,
    count_unread,
    describe_damage,
    find_files,
    kind,
    open_bytes,
)
from mini_qwen.mixture import find_sources
from mini_qwen.rows import Row, check_columns, read_rows

COMPRESSED = ["", ".gz", ".zst"]
TEXTS = ["猫 and 🙂", '"quoted", with a comma', "tab\there", "x\u2028y", "0123", "end "]
ROWS = [{"text": "a"}, {"text": "b"}]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
PAGE = b"<!DOCTYPE html><html><body>404</body></html>"


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [row.values for row in read_rows([file], ["text"])]


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_and_compression_gives_the_same_rows(tmp_path: Path, suffix: str, compression: str) -> None:
    """And is known as what it is by its name alone."""
    rows = [{"text": text} for text in TEXTS]
    file = save_rows(tmp_path / f"rows.v2{suffix}{compression}", rows)
    assert kind(file) == suffix
    assert find_files([str(tmp_path)]) == [file]
    check_columns([file], [["text"]])
    assert list(read_rows([file], ["text"])) == [Row(file, number, row) for number, row in enumerate(rows)]
    assert count_rows([file]) == (len(rows) if suffix == ".parquet" else None)


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_nested_values_come_whole(tmp_path: Path, suffix: str, compression: str) -> None:
    turns = [{"from": "human", "value": "你好\n🙂\u2028x"}, {"from": "gpt", "value": ""}]
    rows = [{"turns": turns, "label": [1.5, None], "other": n} for n in range(3)]
    file = save_rows(tmp_path / f"rows{suffix}{compression}", rows)
    expected = {"turns": turns, "label": [1.5, None]}
    assert [row.values for row in read_rows([file], ["turns", "label", "absent"])] == [expected] * 3


@pytest.mark.parametrize("compression", COMPRESSED)
def test_compressed_files_of_several_parts_are_read_to_the_end(tmp_path: Path, compression: str) -> None:
    """As `cat a.gz b.gz` makes them."""
    parts = [save_rows(tmp_path / f"{n}.jsonl{compression}", [{"text": str(n)}]) for n in range(3)]
    whole = tmp_path / f"whole.jsonl{compression}"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert rows_of(whole) == [{"text": str(n)} for n in range(3)]


LINES = {
    ".jsonl": '{"text": "a"}\r\n\r\n{"text": "b c"}\r\n',
    ".json": '[\r\n  {"text": "a"},\r\n  {"text": "b c"}\r\n]\r\n',
    ".csv": 'text,id\r\na,1\r\n"b c",2\r\n',
    ".txt": "a\r\n  \r\nb c\r\n",
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("suffix", LINES)
def test_windows_files_give_the_same_rows(tmp_path: Path, suffix: str, mark: bytes) -> None:
    """Line ends of two characters, and the byte order mark that editors write before the first."""
    for name, lines in [("windows", LINES[suffix]), ("unix", LINES[suffix].replace("\r\n", "\n"))]:
        file = tmp_path / (name + suffix)
        file.write_bytes(mark + lines.encode())
        check_columns([file], [["text"]])
        assert rows_of(file) == [{"text": "a"}, {"text": "b c"}]


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    for compression in COMPRESSED:
        save_bytes(tmp_path / f"x.txt{compression}", content)
        with open_bytes(tmp_path / f"x.txt{compression}") as stream:
            assert stream.read() == content


def test_folders_are_searched_in_a_fixed_order_and_files_taken_once(write_rows: WriteRows, tmp_path: Path) -> None:
    names = ["b/y.parquet", "a/chinese/high/x.parquet", "a/x.jsonl.zst", "c.json", "d.csv"]
    files = [write_rows(f"data/{name}", [{"text": name}]) for name in names]
    (tmp_path / "data/README.md").write_text("not data", encoding="utf-8")
    (tmp_path / "data/model.zst").write_bytes(b"not data")
    for name in (".cache/huggingface/download/y.parquet", "a/._____temp/x.jsonl", "b/._y.parquet"):
        write_rows(f"data/{name}", [{"text": "half of it"}])
    found = find_files([str(tmp_path / "data"), str(files[0]), str(tmp_path / "data/a")])
    assert sorted(found) == sorted(files)
    assert found == find_files([str(tmp_path / "data")])


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("B.JSONL", ".jsonl"), ("b.Parquet", ".parquet"), ("c.ndjson", ".jsonl"), ("D.CSV.GZ", ".csv")]
    + [("e.NDJSON.Zst", ".jsonl"), ("f.TXT", ".txt")],
)
def test_names_in_capitals_and_of_other_habits_are_read_like_others(tmp_path: Path, name: str, suffix: str) -> None:
    written = save_rows(tmp_path / f"rows{suffix}{Path(name).suffix.lower() if name.count('.') == 2 else ''}", ROWS)
    (tmp_path / "data").mkdir()
    file = written.rename(tmp_path / "data" / name)
    assert find_files([str(tmp_path / "data")]) == find_files([str(file)]) == [file]
    assert kind(file) == suffix
    check_columns([file], [["text"]])
    assert [row.values for row in read_rows([file], ["text"])] == ROWS


def test_links_to_folders_are_followed_and_a_circle_ends(write_rows: WriteRows, tmp_path: Path) -> None:
    """A big disk is often linked into the data folder; the files keep the name under the link."""
    here, there = write_rows("data/a.jsonl", ROWS), write_rows("disk/pt/b.jsonl", ROWS)
    (tmp_path / "data/pt").symlink_to(tmp_path / "disk/pt")
    (tmp_path / "data/up").symlink_to(tmp_path / "data")
    (tmp_path / "disk/pt/back").symlink_to(tmp_path)
    found = find_files([str(tmp_path / "data")])
    assert found == [here, tmp_path / "data/pt/b.jsonl"]
    assert found[1].resolve() == there


def test_a_file_that_has_two_names_is_taken_once_under_the_first(write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows("data/a.jsonl", ROWS)
    (tmp_path / "data/z.jsonl").symlink_to(file)
    assert find_files([str(tmp_path / "data")]) == [file]
    assert find_files([str(tmp_path / "data/z.jsonl"), str(file)]) == [tmp_path / "data/z.jsonl"]
    assert find_sources([{str(tmp_path / "data"): 1.0}]) == {str(tmp_path / "data"): [file]}


def test_files_that_are_not_read_are_counted_by_the_end_of_their_name(write_rows: WriteRows, tmp_path: Path) -> None:
    """Also a link to a file that is gone; nothing that is hidden, and no file outside of the folders."""
    write_rows("data/a.jsonl", ROWS)
    for name in ("README.md", "b.bz2", "deep/c.bz2", "deep/LICENSE", ".git/config", "deep/.x.bz2", "../apart.npy"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"x")
    (tmp_path / "data/gone.parquet").symlink_to(tmp_path / "nowhere")
    counted = count_unread([str(tmp_path / "data"), str(tmp_path / "data/a.jsonl")])
    assert counted == {".md": 1, ".bz2": 2, "LICENSE": 1, ".parquet": 1}
    assert find_files([str(tmp_path / "data")]) == [tmp_path / "data/a.jsonl"]


def test_hidden_above_the_folder_that_is_named_does_not_matter(write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows(".hidden/data/x.jsonl", [{"text": "x"}])
    assert find_files([str(tmp_path / ".hidden/data")]) == find_files([str(file)]) == [file]


def test_named_files_keep_their_order(write_rows: WriteRows) -> None:
    files = [str(write_rows(name, [{"text": "x"}])) for name in ("b.parquet", "a.parquet")]
    assert [str(file) for file in find_files(files)] == files


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no data at '.*no_such_folder'.*prepare\.sh"):
        find_files([str(tmp_path / "no_such_folder")])


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    with pytest.raises(SystemExit, match=re.escape(str(tmp_path)) + r".*\.parquet"):
        find_files([str(tmp_path)])


def test_a_folder_that_is_named_like_a_file_is_a_folder(write_rows: WriteRows, tmp_path: Path) -> None:
    """Spark writes a table as a folder `rows.parquet` of files."""
    file = write_rows("data/rows.parquet/part-0.parquet", [{"text": "x"}])
    assert find_files([str(tmp_path / "data")]) == find_files([str(file.parent)]) == [file]


@pytest.mark.parametrize("name", ["rows.docx", "rows", "rows.gz", "rows.jsonl.bz2"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text\na", encoding="utf-8")
    with pytest.raises(SystemExit, match=re.escape(name) + r".*\.parquet"):
        find_files([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (POINTER, r"Git LFS pointer.*git lfs pull"),
        (PAGE, r"web page.*fetch it again"),
        (b"\n <html>", r"web page"),
        (b"", r"empty \(0 bytes\)"),
        (b"PAR1 and then something else", r"broken or cut off"),
    ],
)
def test_what_lies_in_the_place_of_a_parquet_is_named(tmp_path: Path, content: bytes, cause: str) -> None:
    file = tmp_path / "rank_00001.parquet"
    file.write_bytes(content)
    for look in (count_rows, lambda files: check_columns(files, [["text"]])):
        with pytest.raises(SystemExit, match=rf"rank_00001\.parquet.*{cause}"):
            look([file])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".jsonl.gz", ".json.zst", ".txt.gz"])
def test_a_pointer_is_no_data_whatever_it_is_called(tmp_path: Path, suffix: str) -> None:
    """Each of its lines would pass for a document of a .txt."""
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(POINTER)
    with pytest.raises(SystemExit, match=r"rows\.\S+ cannot be read.*Git LFS pointer"):
        check_columns([file], [["text"]])


def test_a_web_page_is_no_json_but_may_be_a_document(tmp_path: Path) -> None:
    for suffix in (".json", ".jsonl"):
        (tmp_path / f"rows{suffix}").write_bytes(PAGE)
        with pytest.raises(SystemExit, match="web page"):
            check_content(tmp_path / f"rows{suffix}")
    (tmp_path / "rows.txt").write_bytes(PAGE)
    check_content(tmp_path / "rows.txt")
    assert rows_of(tmp_path / "rows.txt") == [{"text": PAGE.decode()}]


def test_damage_of_a_file_that_is_gone_or_closed(tmp_path: Path) -> None:
    assert "permissions" in describe_damage(tmp_path)  # a folder cannot be opened by anybody


def test_rows_of_parquet_are_counted_without_being_read(write_rows: WriteRows) -> None:
    files = [write_rows(f"{n}.parquet", [{"text": "x"}] * n) for n in (3, 4)]
    assert count_rows(files) == 7
    assert count_rows([*files, write_rows("rows.jsonl", [{"text": "x"}])]) is None


def test_a_parquet_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    assert count_rows([tmp_path / "empty.parquet"]) == 0
    assert rows_of(tmp_path / "empty.parquet") == []
