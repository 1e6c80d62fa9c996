"""Plain text as markdown that shows it as it is: nothing in it becomes a tag, a link, a heading or a column."""

import re

# Control characters and halves of surrogate pairs: no file or page can hold them.
UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}


def clean(text: str) -> str:
    r"""The text with \n for every line end, and U+FFFD for what no file can hold."""
    return UNWRITABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def paragraphs(text: str) -> list[str]:
    """The parts between blank lines."""
    return [part.strip("\n") for part in re.split(r"\n(?:[ \t]*\n)+", clean(text)) if part.strip()]


def escape(text: str) -> str:
    r"""Markdown's signs as plain characters, wherever they stand within a line.

    >>> escape("a_b *c* [d](e) <f> | https://g")
    'a_b \\*c\\* \\[d\\](e) &lt;f&gt; &#124; https\\://g'
    """
    text = re.sub(r"[\\`*\[\]#~$]", r"\\\g<0>", clean(text))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word it is no sign
    text = re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", text)  # an address would become a link
    return re.sub("[&<>|]", lambda sign: ENTITIES[sign[0]], text)


def escape_line(text: str) -> str:
    """The text in one line, for headings."""
    return escape_start(" ".join(clean(text).split()))


def escape_cell(text: str) -> str:
    """For a cell of a table."""
    return "<br>".join(escape(line.strip()) for line in clean(text).strip().split("\n"))


def escape_start(line: str) -> str:
    """A line, with what would make it a list, an underlining or code at its beginning."""
    rest = line.expandtabs(4).lstrip(" ")
    indent = "&nbsp;" * (len(line.expandtabs(4)) - len(rest))
    return indent + re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", escape(rest))


def escape_lines(text: str) -> str:
    """The text with its paragraphs and line breaks."""
    return "\n\n".join("\\\n".join(map(escape_start, part.split("\n"))) for part in paragraphs(text))


def quoted(markdown: str) -> str:
    """A block of markdown as a quotation."""
    return "\n".join(f"> {line}".rstrip() for line in markdown.split("\n"))
