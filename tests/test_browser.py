"""The report in a real browser: seen, not only written."""

import html
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from test_report import PT, SFT, Report
from webdriver import BROWSER, QUIET

from mini_qwen.page import Answers, Notice, Picture, Section, Table, Text, render_page
from mini_qwen.pictures import plot_heat_maps

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
MAGENTA = (1.0, 0.0, 1.0)
HOSTILE = '</p><script>document.title = "taken"</script><img src="http://evil.example/x.png">' + "无空格" * 200
MEASURE = """<script>
parent.document.title = [document.documentElement.scrollWidth, innerWidth, performance.getEntriesByType("resource")
  .filter(entry => !entry.name.startsWith("data:")).length].join(" ");
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    plot_heat_maps({"pt": {(0.7, 0.8): 0.1, (1.0, 0.8): 0.9}}, "temperature", "top_p", folder / "heat.png", "Heat")
    flat = np.broadcast_to(np.array(MAGENTA), (200, 1600, 3))
    image.imsave(folder / "flat.png", flat)
    wide = Table([f"column {number}" for number in range(30)], [["12,345"] * 30, [HOSTILE] * 30], HOSTILE)
    parts = [
        Picture(folder / "flat.png", "magenta"),
        Notice("dpo regressed against sft"),
        Text(HOSTILE + "x" * 500),
        wide,
        Picture(folder / "heat.png", HOSTILE, "caption"),
        Answers("李白是谁？" + "y" * 300, {"pt": HOSTILE * 9, "sft": "z" * 300, "dpo": ""}),
    ]
    return render_page("Report 报告", [Section("First", parts), Section(HOSTILE, [Text("end")])])


def browse(folder: Path, page: str, width: int, *arguments: str, height: int = 844) -> str:
    (folder / "report.html").write_text(page, encoding="utf-8")
    window = f"--window-size={width},{height}"
    address = (folder / "report.html").as_uri()
    command = [str(BROWSER), "--headless", *QUIET, f"--user-data-dir={folder}/profile", window, *arguments, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=folder).stdout


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_seen_with_its_picture(tmp_path: Path, page: str, width: int) -> None:
    height = 3000  # how far down the picture is depends on the machine's Chinese font
    browse(tmp_path, page, width, f"--screenshot={tmp_path}/shot.png", height=height)
    seen = image.imread(tmp_path / "shot.png")[:, :, :3]
    assert seen.shape[:2] == (height, width)
    assert (seen.std(axis=(0, 1)) > 0.02).all()
    magenta = (np.abs(seen - MAGENTA) < 0.02).all(axis=2)
    columns = np.flatnonzero(magenta.any(axis=0))
    assert magenta.sum() > 5000
    assert columns[-1] - columns[0] > 0.45 * width  # the picture fills a phone, and is not tiny on a desk


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of an evaluation with every chapter."""
    return Report(tmp_path_factory.mktemp("evaluation"), [PT, SFT]).page


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["page", "report"])
def test_nothing_is_wider_than_the_screen_and_nothing_is_loaded(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, width: int
) -> None:
    page = request.getfixturevalue(name)
    open_page = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace("</html>", MEASURE + "</html>")
    # A headless window that dumps its document is 500 pixels wide or wider; a frame can have the width of a phone.
    frame = (
        f'<title></title><iframe style="width: {width}px; height: 844px" srcdoc="{html.escape(open_page)}"></iframe>'
    )
    dom = browse(tmp_path, frame, 1400, "--dump-dom")
    title = re.search(r"<title>(\d+) (\d+) (\d+)</title>", dom)
    assert title, dom[:500]
    scrolled, window, requests = map(int, title.groups())
    assert window == width
    assert scrolled <= window
    assert requests == 0


def test_a_regression_is_seen_first(tmp_path: Path, report: str) -> None:
    """On a phone's first screen, without scrolling: the notice's red."""
    browse(tmp_path, report, 500, f"--screenshot={tmp_path}/shot.png")
    seen = image.imread(tmp_path / "shot.png")[:, :, :3]
    red = (seen[:, :, 0] > 0.5) & (seen[:, :, 1] < 0.25) & (seen[:, :, 2] < 0.25)
    assert red.sum() > 500


def test_the_document_holds_no_script_and_no_address(tmp_path: Path, page: str) -> None:
    tags = re.findall(r"<[a-z][^>]*>", browse(tmp_path, page, 1280, "--dump-dom"))
    assert "<main>" in tags
    assert not [tag for tag in tags if re.search(r" (src|href)=\"(?!data:|#)", tag)]
    assert not [tag for tag in tags if tag.startswith(("<script", "<link", "<iframe"))]
