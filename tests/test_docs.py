"""What the documents say exists: commands, files, tests and figures."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README_zh.md"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "logs").glob("*.md")])


def commands(name: str) -> list[list[str]]:
    """The words of each command line in the bash blocks of a document."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("name", READMES)
def test_commands_name_files_that_exist(name: str) -> None:
    found = commands(name)
    assert len(found) >= 8
    for words in found:
        for word in words:
            if word.endswith((".py", ".sh", ".yaml")):
                assert (ROOT / word).exists(), words


@pytest.mark.parametrize("name", READMES)
def test_run_sh_knows_its_commands(name: str) -> None:
    text = (ROOT / "run.sh").read_text(encoding="utf-8")
    used = {words[2] for words in commands(name) if words[:2] == ["bash", "run.sh"]}
    assert {"demo", "test"} <= used
    for word in used:
        assert re.search(rf"(^|\| ){word}( \||\))", text, re.MULTILINE), word


def test_both_readmes_tell_the_same_story() -> None:
    """The same commands in the same order, the same number of chapters, the same result rows."""
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in READMES]
    chapters = [len(re.findall(r"^## ", text, re.MULTILINE)) for text in texts]
    assert chapters[0] == chapters[1]
    rows = [[re.findall(r"\d+\.\d+%?", line) for line in text.splitlines() if line.startswith("|")] for text in texts]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_faq_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(re.findall(r"^\d+\. \*\*", text, re.MULTILINE)) == 22
    assert len(named) >= 22
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (file, name)
