"""The promises of the house, kept by a test: sizes, rooms, names, and what stands nowhere."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["", "mini_qwen", "utils", "demo", "bench"]
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))
STAGES = sorted(ROOT.glob("mini_qwen_*.py"))
MODULES = sorted((ROOT / "mini_qwen").glob("*.py"))


def tracked_texts() -> dict[str, str]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    texts = {}
    for name in names:
        if Path(name).suffix in {".py", ".md", ".yaml", ".toml", ".sh", ".jinja", ".txt", ".json"}:
            texts[name] = (ROOT / name).read_text(encoding="utf-8")
    return texts


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_stage_scripts_are_short_and_take_their_arguments() -> None:
    assert len(STAGES) >= 5
    for path in STAGES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 120, path
        assert "def main(argv: list[str] | None = None) -> None:" in text, path


def test_modules_hold_one_idea() -> None:
    for path in MODULES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 200, path
        assert path.stem not in {"utils", "common", "helpers", "base", "misc"}


def test_rooms() -> None:
    """Nothing imports from utils/ or from a stage script; the library imports neither."""
    for path in [*STAGES, *MODULES, *(ROOT / "utils").glob("*.py")]:
        for name in imports(path):
            assert not name.startswith(("utils", "mini_qwen_", "demo", "tests")), (path, name)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe_or_unfinished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for unsafe in ("trust_remote_code=True", "weights_only=False", "pickle.load", r"\beval\(", r"\bexec\("):
        assert not re.search(unsafe, text.replace(".eval()", "")), (path, unsafe)
    assert not re.search(r"^\s*#\s*(TODO|FIXME|XXX)", text, re.MULTILINE), path


def test_no_machine_paths_in_the_tree() -> None:
    for name, text in tracked_texts().items():
        assert not re.search(r"(?<![\w.])/(home|root|work|farm|Users)/", text), name


def test_public_functions_are_typed() -> None:
    """Ruff's ANN rules hold this for every function; here only that nobody switches them off."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"ANN"' in text and "per-file-ignores" not in text
