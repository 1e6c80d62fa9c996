"""A report as data, written as markdown and as one web page that needs nothing else.

What models and files say is text, whatever it looks like: no part of it becomes a tag, a link or a heading.
"""

import base64
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from mini_qwen.markdown import clean, escape_cell, escape_line, escape_lines, paragraphs, quoted

SHORT_ANSWER = 320  # characters of an answer that stand open on the page; of a longer one only the beginning does
CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?( ?%)?( *(±|\+/-) *\d[\d.,]*( ?%)?)?")


@dataclass(frozen=True)
class Text:
    """Plain text; blank lines separate its paragraphs."""

    text: str


@dataclass(frozen=True)
class Notice:
    """Plain text that nobody should miss, such as that a stage made its parent worse."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells of plain text. Columns of numbers are aligned to the right.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """

    header: list[str]
    rows: list[list[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ValueError(f"row {number} has {len(row)} cells, the header {len(self.header)}: {row}")

    def number_columns(self) -> list[bool]:
        """For each column whether it holds numbers, with gaps where there are none."""
        columns = [[row[place].strip() for row in self.rows] for place in range(len(self.header))]
        filled = [[cell for cell in column if cell not in {"", "-"}] for column in columns]
        return [bool(column) and all(NUMBER.fullmatch(cell) for cell in column) for column in filled]


@dataclass(frozen=True)
class Picture:
    """A PNG file. `alt` says in words what it shows."""

    file: Path
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Answers:
    """What each checkpoint (label -> whole answer) said to the same prompt."""

    prompt: str
    answers: dict[str, str]


Part = Text | Notice | Table | Picture | Answers


@dataclass(frozen=True)
class Section:
    title: str
    parts: list[Part]


def inline_picture(file: Path) -> str:
    """A PNG as a data: URI."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SystemExit(
            f"'{file}' cannot be read: {error.strerror}. The report shows this picture: draw it first."
        ) from None
    if not content.startswith(b"\x89PNG"):
        raise SystemExit(f"'{file}' begins with {content[:8]!r}, so it is no PNG. The report shows PNG files only.")
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def render_page(title: str, sections: list[Section]) -> str:
    """The report as one HTML file: pictures inlined, no script, nothing loaded from anywhere.

    Raises:
        SystemExit: a picture is missing or no PNG.
    """
    environment = Environment(
        loader=PackageLoader("mini_qwen", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: clean(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "language": lambda text: "zh" if CHINESE.search(text) else "en",
        "inline": inline_picture,
        "paragraphs": paragraphs,
    }
    kinds = [(section.title, [(type(part).__name__, part) for part in section.parts]) for section in sections]
    return environment.get_template("page.html.jinja").render(title=title, sections=kinds, short=SHORT_ANSWER)


def render_markdown(title: str, sections: list[Section], folder: Path) -> str:
    """The report as markdown, to stand in `folder`: its pictures are links relative to it."""
    blocks = [f"# {escape_line(title)}"]
    for section in sections:
        blocks.append(f"## {escape_line(section.title)}")
        blocks += [markdown_part(part, folder) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def markdown_part(part: Part, folder: Path) -> str:
    match part:
        case Text(text):
            return escape_lines(text)
        case Notice(text):
            return quoted(f"**Notice**\n\n{escape_lines(text)}")
        case Table(header, rows, caption):
            lines = ["| " + " | ".join(map(escape_cell, row)) + " |" for row in [header, *rows]]
            lines.insert(1, "|" + "|".join("---:" if number else "---" for number in part.number_columns()) + "|")
            return "\n".join(lines) + (f"\n\n{escape_lines(caption)}" if caption else "")
        case Picture(file, alt, caption):
            link = quote(Path(os.path.relpath(file, folder)).as_posix())
            return f"![{escape_line(alt)}]({link})" + (f"\n\n{escape_lines(caption)}" if caption else "")
        case Answers(prompt, answers):
            told = [
                f"**{escape_line(label)}**\n\n{quoted(escape_lines(text) or '*(nothing)*')}"
                for label, text in answers.items()
            ]
            return "\n\n".join([f"### {escape_line(prompt)}", *told])
