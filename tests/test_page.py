"""mini_qwen/page.py: whatever a model says is text on the page and in markdown, and the page needs nothing else."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mini_qwen.markdown import escape_cell, escape_lines
from mini_qwen.page import Answers, Notice, Picture, Section, Table, Text, render_markdown, render_page
from mini_qwen.pictures import plot_lines

HOSTILE = [
    "<script>alert(1)</script>",
    "</p></details></body></html><h1>mine</h1>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp; &#x3c;",
    "[a](javascript:alert(1)) ![b](http://evil.example/x.png)",
    "<!-- comment --> <![CDATA[x]]> <style>*{display:none}</style>",
    "李白 `code` a|b \\| # no heading",
]


class Reader(HTMLParser):
    """Elements, attributes and text of a page, style aside."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "action"}]
        assert not [name for name, _ in attrs if name.startswith("on") or name == "style"]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.texts.append(data)


def everywhere(text: str, picture: Path) -> list[Section]:
    """A report that says the text wherever a report says something."""
    parts = [
        Text(text),
        Notice(text),
        Table([text, "b"], [[text, "1"], ["x", text]], text),
        Picture(picture, text, text),
        Answers(text, {text: text, "long": text + "x" * 1000}),
    ]
    return [Section(text, parts), Section("second", [Text("end")])]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "a picture.png"
    plot_lines({"pt": ([0, 1], [2, 3])}, "x", "y", path, "lines")
    return path


@pytest.mark.parametrize("text", HOSTILE)
def test_what_looks_like_html_is_text(text: str, picture: Path) -> None:
    page, plain = (
        Reader(render_page(text, everywhere(text, picture))),
        Reader(render_page("a", everywhere("a", picture))),
    )
    assert page.tags == plain.tags
    assert "".join(page.texts).count(text) == 16  # title twice, contents, heading, text, notice, 4 in the table, ...
    assert {link.split(",")[0] for link in page.links} == {"#part-1", "#part-2", "data:image/png;base64"}


@pytest.mark.parametrize(
    "text", ["\x00\x1b[31m", "\ud800 half", "half \udfff", "\ufffd", "a\rb\r\nc", "\u2028", "", " "]
)
def test_what_no_file_can_hold_is_replaced(text: str, picture: Path, tmp_path: Path) -> None:
    for render in (
        render_page(text, everywhere(text, picture)),
        render_markdown(text, everywhere(text, picture), tmp_path),
    ):
        (tmp_path / "report").write_text(render, encoding="utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", render)


def test_the_page_opens_offline(picture: Path) -> None:
    page = render_page("Report", everywhere("a", picture))
    assert "http://" not in page and "https://" not in page
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(Reader(page).tags)
    assert "url(" not in page and "@import" not in page
    assert "width=device-width" in page and "prefers-color-scheme: dark" in page


def test_long_answers_are_folded_and_whole(picture: Path) -> None:
    answer = "北京。" * 400 + "the end"
    page = render_page("r", [Section("s", [Answers("p", {"pt": answer, "sft": "short"})])])
    assert answer in "".join(Reader(page).texts)
    assert Reader(page).tags.count("details") == 1
    assert 'lang="zh"' in page


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_keeps_its_shape(text: str, picture: Path, tmp_path: Path) -> None:
    shown = render_markdown(text, everywhere(text, picture), tmp_path)
    assert "<" not in shown.replace("<br>", "")
    assert not re.search(r"(?<!\\)\[(?!.*\]\(\S*picture\.png\)$)", shown, re.MULTILINE)
    assert not re.search(r"(?<!\\)://", shown)
    for line in [line for line in shown.split("\n") if line.startswith("|")]:
        assert line.count("|") == 3
    assert len(re.findall("^#", shown, re.MULTILINE)) == 4


def test_markdown_of_cells_and_lines() -> None:
    assert escape_cell(" a|b\n`c` ") == "a&#124;b<br>\\`c\\`"
    assert (
        escape_lines("# a\n- b\n1. c\n\n\n    d\n===")
        == "\\# a\\\n\\- b\\\n1\\. c\n\n&nbsp;&nbsp;&nbsp;&nbsp;d\\\n\\==="
    )
    assert escape_lines("new_wording is 1.862 <br>") == "new_wording is 1.862 &lt;br&gt;"


def test_markdown_links_pictures_from_where_it_stands(picture: Path) -> None:
    section = [Section("s", [Picture(picture, "curve")])]
    assert "![curve](a%20picture.png)" in render_markdown("r", section, picture.parent)
    assert "![curve](../a%20picture.png)" in render_markdown("r", section, picture.parent / "out")


def test_numbers_stand_to_the_right() -> None:
    table = Table(["name", "a", "b", "c"], [["pt", "1,234", "60.3% ± 1.2%", "x"], ["sft", "", "-", "1"]])
    assert table.number_columns() == [False, True, True, False]


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells, the header 2"):
        Table(["a", "b"], [["1", "2"], ["1"]])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SystemExit, match="gone.png' cannot be read"):
        render_page("r", [Section("s", [Picture(tmp_path / "gone.png", "")])])
    with pytest.raises(SystemExit, match="text.png' begins with b'no pictu'"):
        render_page("r", [Section("s", [Picture(tmp_path / "text.png", "")])])
