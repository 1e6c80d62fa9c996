"""prepare.sh fetches exactly what its table says, survives interruptions, and checks what arrived.

The hub clients are stand-ins that copy from a local folder; prepare.sh and utils/prepare_data.py are the real ones.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
HUBS = ["modelscope", "huggingface"]
LARGE = [
    "film_entertainment",
    "literature_emotion",
    "computer_communication",
    "current_affairs_government_administration",
    "mathematics_statistics",
]
MODEL = "models/Qwen2.5-0.5B-Instruct"
MODEL_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
PAIR = [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}]

FAKES = {
    "fake_hub.py": """
import fnmatch, os, shutil
from pathlib import Path

REMOTE = Path(os.environ["FAKE_REMOTE"])

def sizes(repo, folder):
    if "FAKE_ERROR" in os.environ:
        raise ConnectionError(os.environ["FAKE_ERROR"])
    base = REMOTE / repo
    size = os.environ.get("FAKE_SIZE")
    found = {p.relative_to(base).as_posix(): int(size or p.stat().st_size) for p in base.rglob("*") if p.is_file()}
    prefix = f"{folder.strip('/')}/".lstrip("/")
    return {path: size for path, size in found.items() if path.startswith(prefix)}

def bring(repo, patterns, local_dir):
    if "FAKE_SILENT" in os.environ:
        return
    for path in sizes(repo, ""):
        target = Path(local_dir) / path
        if target.exists() or not any(fnmatch.fnmatch(path, pattern) for pattern in patterns):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(os.environ["FAKE_LOG"], "a+", encoding="utf-8") as log:
            log.seek(0)
            if len(log.readlines()) == int(os.environ.get("FAKE_STOP_AFTER", -1)):
                Path(local_dir, "half.parquet").write_bytes((REMOTE / repo / path).read_bytes()[:9])
                raise TimeoutError("the line went dead")
            log.write(f"{repo}/{path}\\n")
        shutil.copy(REMOTE / repo / path, target)
""",
    "modelscope/__init__.py": "",
    "modelscope/hub/__init__.py": "",
    "modelscope/hub/api.py": """
from fake_hub import sizes

class HubApi:
    def get_model_files(self, model_id, revision=None, root=None, recursive=True):
        return [{"Path": path, "Size": size} for path, size in sizes(model_id, "").items()]

    def get_dataset_files(self, repo_id, *, root_path="/", recursive=True, page_number=1, page_size=100):
        found = sorted(sizes(repo_id, root_path).items(), reverse=True)
        entries = [{"Path": path.rpartition("/")[0], "Type": "tree"} for path, _ in found[:1]]
        entries += [{"Path": path, "Size": size, "Type": "blob"} for path, size in found]
        return entries[(page_number - 1) * page_size : page_number * page_size]
""",
    "modelscope/hub/snapshot_download.py": """
from fake_hub import bring

def snapshot_download(model_id=None, *, repo_type=None, allow_patterns=None, local_dir=None):
    assert (repo_type == "model") == model_id.startswith("Qwen/")
    bring(model_id, allow_patterns, local_dir)
""",
    "huggingface_hub/__init__.py": """
from fake_hub import bring

def snapshot_download(repo_id, *, repo_type=None, allow_patterns=None, local_dir=None):
    assert (repo_type == "model") == repo_id.startswith("Qwen/")
    bring(repo_id, allow_patterns, local_dir)
""",
    "huggingface_hub/hf_api.py": """
from dataclasses import dataclass
from fake_hub import sizes

@dataclass
class RepoFile:
    path: str
    size: int

@dataclass
class RepoFolder:
    path: str

class HfApi:
    def list_repo_tree(self, repo_id, path_in_repo=None, *, recursive=False, repo_type=None):
        assert (repo_type == "model") == repo_id.startswith("Qwen/")
        found = sizes(repo_id, path_in_repo or "")
        yield RepoFolder("7M")
        yield from (RepoFile(path, size) for path, size in sorted(found.items(), reverse=True))
""",
}


class Workplace:
    """A checkout with prepare.sh, a pretended hub, and a place to look at what happened."""

    def __init__(self, base: Path) -> None:
        self.root, self.remote, self.log = base / "check out", base / "remote", base / "log.txt"
        self.elsewhere, self.fakes = base / "elsewhere", base / "fakes"
        self.elsewhere.mkdir()
        (self.root / "utils").mkdir(parents=True)
        shutil.copy(ROOT / "prepare.sh", self.root)
        shutil.copy(ROOT / "utils/prepare_data.py", self.root / "utils")
        python = self.root / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        for name, text in FAKES.items():
            (self.fakes / name).parent.mkdir(parents=True, exist_ok=True)
            (self.fakes / name).write_text(text, encoding="utf-8")

    def run(self, *args: object, **env: object) -> subprocess.CompletedProcess[str]:
        """Run prepare.sh from another folder."""
        full = {
            **os.environ,
            "PYTHONPATH": str(self.fakes),
            "FAKE_REMOTE": str(self.remote),
            "FAKE_LOG": str(self.log),
        }
        full.update({name: str(value) for name, value in env.items()})
        command = ["bash", str(self.root / "prepare.sh"), *map(str, args)]
        return subprocess.run(
            command, cwd=self.elsewhere, env=full, capture_output=True, text=True, encoding="utf-8", check=False
        )

    def transferred(self) -> list[str]:
        """The files that the pretended clients sent, repository first, since the last call."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def tree(self, folder: str) -> list[str]:
        """All files below a folder of the checkout, hidden ones too."""
        return sorted(p.relative_to(self.root).as_posix() for p in (self.root / folder).rglob("*") if p.is_file())


def table(path: Path, rows: int, **columns: object) -> None:
    """Write `rows` equal rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([columns] * rows), path)


def one_paragraph(text: str) -> bool:
    """Whether an error is a single line of prose, without a traceback."""
    return len(text.strip().splitlines()) == 1 and "Traceback" not in text


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """A workplace whose hub has more than is wanted: other qualities, other versions, weights, a long listing."""
    place = Workplace(tmp_path)
    corpus = place.remote / "BAAI/IndustryCorpus2"
    table(tmp_path / "pt.parquet", 2, text="words", num_words=1)
    for line in place.run("--list", "--only", "pt").stdout.splitlines():
        folder = next((word.removeprefix("data/pt/") for word in line.split() if word.startswith("data/pt/")), None)
        for number in (801, 10, 1200, 726) if folder else ():
            for quality in ("high", "middle"):
                target = corpus / folder.replace("/high", f"/{quality}") / f"rank_{number:05d}.parquet"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tmp_path / "pt.parquet", target)
    (corpus / "README.md").write_text("about", encoding="utf-8")
    instruct = place.remote / "BAAI/Infinity-Instruct"
    for shard in range(2):
        table(instruct / f"7M/train-{shard:05d}-of-00002.parquet", 3, id=1, conversations=TURNS)
    for folder in ("Gen", "0625", "7M_domains"):
        table(instruct / folder / "train-00000-of-00001.parquet", 5, id="x", conversations=TURNS)
    preference = place.remote / "BAAI/Infinity-Preference"
    for split, rows in (("train", 7), ("test", 4)):
        table(preference / f"data/{split}-00000-of-00001.parquet", rows, prompt="q", chosen=PAIR, rejected=PAIR)
    for number in range(230):
        (preference / "pictures").mkdir(exist_ok=True)
        (preference / f"pictures/{number:03d}.png").write_bytes(b"")
    model = place.remote / "Qwen/Qwen2.5-0.5B-Instruct"
    model.mkdir(parents=True)
    for name in MODEL_FILES:
        (model / name).write_text('{"a": 1}', encoding="utf-8")
    for name in ("merges.txt", "model.safetensors", "LICENSE"):
        (model / name).write_text("a b", encoding="utf-8")
    return place


def test_list_needs_neither_python_nor_network(tmp_path: Path) -> None:
    shutil.copy(ROOT / "prepare.sh", tmp_path)
    done = subprocess.run(
        ["bash", str(tmp_path / "prepare.sh"), "--list"], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pt = [line for line in done.stdout.splitlines() if "data/pt/" in line]
    assert len(pt) == 20 and len({line.split("data/pt/")[1].split()[0] for line in pt}) == 20
    assert all("/high " in line for line in pt)
    limited = [line for line in pt if "first 3" in line]
    assert sorted(line.split("data/pt/")[1].split("/high")[0] for line in limited) == sorted(
        f"{name}/english" for name in LARGE
    )
    for told in ("data/sft/7M", "7,449,106", "data/sft/Gen", "data/dpo", "59,338", MODEL, "40.5G"):
        assert told in done.stdout


def test_list_of_one_stage(place: Workplace) -> None:
    out = place.run("--list", "--only", "dpo", "--only", "model").stdout
    assert "data/dpo" in out and MODEL in out and "data/pt" not in out and "data/sft" not in out


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--frobnicate"], "--frobnicate"),
        (["pt"], "pt"),
        (["--only", "rm"], "rm"),
        (["--only"], "--only"),
        (["--hub", "elsewhere"], "elsewhere"),
        (["--list", "--check"], "--check"),
    ],
)
def test_wrong_options_are_named(place: Workplace, args: list[str], named: str) -> None:
    done = place.run(*args)
    assert done.returncode == 2 and named in done.stderr and one_paragraph(done.stderr)
    assert place.transferred() == []


def test_help_names_every_option(place: Workplace) -> None:
    done = place.run("--help")
    assert done.returncode == 0
    for option in ("--list", "--check", "--only", "--hub", "--to", "--help"):
        assert option in done.stdout


@pytest.mark.parametrize("hub", HUBS)
def test_exactly_the_wanted_files_arrive_and_a_second_run_fetches_nothing(place: Workplace, hub: str) -> None:
    done = place.run("--hub", hub)
    assert done.returncode == 0, done.stderr
    asked = place.transferred()
    assert len(asked) == len(set(asked)) == 15 * 4 + 5 * 3 + 2 + 1 + 2 + 6
    for name in LARGE:
        folder = f"data/pt/{name}/english/high"
        assert place.tree(folder) == [f"{folder}/rank_{number:05d}.parquet" for number in (10, 726, 801)]
        assert len(place.tree(f"data/pt/{name}")) == 7
    assert place.tree("data/sft") == [
        "data/sft/7M/train-00000-of-00002.parquet",
        "data/sft/7M/train-00001-of-00002.parquet",
        "data/sft/Gen/train-00000-of-00001.parquet",
    ]
    assert place.tree("data/dpo") == [f"data/dpo/{split}-00000-of-00001.parquet" for split in ("test", "train")]
    assert {Path(path).name for path in place.tree("models")} == MODEL_FILES | {"merges.txt"}
    assert len(place.tree("data")) == 15 * 4 + 5 * 3 + 3 + 2, "the download leaves nothing else behind"

    again = place.run("--hub", hub)
    assert again.returncode == 0 and place.transferred() == []
    assert "0 of 3 files to fetch" in again.stdout


@pytest.mark.parametrize("hub", HUBS)
def test_interrupted_download_continues(place: Workplace, hub: str) -> None:
    cut = place.run("--hub", hub, "--only", "pt", FAKE_STOP_AFTER=6)
    assert cut.returncode == 1 and one_paragraph(cut.stderr)
    for told in (hub, "data/pt/", "BAAI/IndustryCorpus2", "the line went dead", "same command again"):
        assert told in cut.stderr
    first = place.transferred()
    assert len(first) == 6
    wrong = [path for path in place.tree("data/pt") if pq.read_metadata(place.root / path).num_rows != 2]
    assert not wrong, "a half file is never where training would read it"

    # Another stage in between must not throw away what the interrupted one holds.
    assert place.run("--hub", hub, "--only", "dpo").returncode == 0
    assert len(place.transferred()) == 2

    done = place.run("--hub", hub, "--only", "pt")
    assert done.returncode == 0, done.stderr
    second = place.transferred()
    assert not set(first) & set(second)
    assert len(first) + len(second) == len(place.tree("data/pt")) == 15 * 4 + 5 * 3
    assert not [path for path in place.tree("data") if "half" in path or ".download" in path]


@pytest.mark.parametrize("hub", HUBS)
def test_incomplete_file_is_fetched_again(place: Workplace, hub: str) -> None:
    assert place.run("--hub", hub, "--only", "sft").returncode == 0
    place.transferred()
    damaged = place.root / "data/sft/Gen/train-00000-of-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert place.run("--hub", hub, "--only", "sft").returncode == 0
    assert place.transferred() == ["BAAI/Infinity-Instruct/Gen/train-00000-of-00001.parquet"]


@pytest.mark.parametrize("hub", HUBS)
def test_without_network_one_paragraph_says_so(place: Workplace, hub: str) -> None:
    done = place.run("--hub", hub, "--only", "sft", FAKE_ERROR="name resolution failed\nfor the host")
    assert done.returncode == 1 and one_paragraph(done.stderr)
    for told in (hub, "data/sft/7M", "name resolution failed", "network", "same command again"):
        assert told in done.stderr


def test_closed_repository_says_how_to_log_in(place: Workplace) -> None:
    done = place.run("--hub", "huggingface", "--only", "sft", FAKE_ERROR="401 Client Error")
    assert done.returncode == 1 and one_paragraph(done.stderr) and "hf auth login" in done.stderr


def test_client_that_returns_without_the_files_is_noticed(place: Workplace) -> None:
    done = place.run("--hub", "huggingface", "--only", "dpo", FAKE_SILENT=1)
    assert done.returncode == 1 and one_paragraph(done.stderr) and "did not arrive" in done.stderr


def test_full_disk_is_noticed_before_the_download(place: Workplace) -> None:
    done = place.run("--only", "model", FAKE_SIZE=10**18)
    assert done.returncode == 1 and one_paragraph(done.stderr)
    assert "6,000,000,000,000,000,000 bytes" in done.stderr and "--to" in done.stderr
    assert place.transferred() == []


def test_python_without_pyarrow_is_refused_before_the_download(place: Workplace) -> None:
    (place.root / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    done = place.run("--only", "model")
    assert done.returncode == 1 and one_paragraph(done.stderr)
    assert "pyarrow" in done.stderr and ".venv/bin/python" in done.stderr and "pip install" in done.stderr


def test_folder_that_the_hub_lacks_is_named(place: Workplace) -> None:
    shutil.rmtree(place.remote / "BAAI/Infinity-Instruct/Gen")
    done = place.run("--only", "sft")
    assert done.returncode == 1 and one_paragraph(done.stderr) and "Gen" in done.stderr
    assert place.transferred() == []


@pytest.mark.parametrize(("hub", "package"), [("modelscope", "modelscope"), ("huggingface", "huggingface_hub")])
def test_missing_client_says_how_to_install_it(place: Workplace, hub: str, package: str) -> None:
    gone = f"raise ModuleNotFoundError(\"No module named '{package}'\")"
    (place.fakes / package / "__init__.py").write_text(gone, encoding="utf-8")
    done = place.run("--hub", hub)
    assert done.returncode == 1 and one_paragraph(done.stderr)
    assert f".venv/bin/pip install {package}" in done.stderr


def test_to_names_another_folder_relative_to_the_caller(place: Workplace) -> None:
    done = place.run("--only", "model", "--to", "big disk")
    assert done.returncode == 0, done.stderr
    assert (place.elsewhere / "big disk" / MODEL / "tokenizer.json").is_file()
    assert place.tree("models") == []


def test_check_passes_and_counts_rows_without_a_client(place: Workplace) -> None:
    assert place.run().returncode == 0
    shutil.rmtree(place.fakes)
    done = place.run("--check", FAKE_ERROR="no network")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:]}
    assert len(lines) == 25 and {cells[-1] for cells in lines.values()} == {"ok"}
    assert lines["data/pt/news_media/english/high/*.parquet"][:2] == ["4", "8"]
    assert lines["data/sft/7M/*.parquet"][:2] == ["2", "6"]
    assert lines["data/dpo/train-*.parquet"][:2] == ["1", "7"]
    assert lines[MODEL][0] == "6"


def test_check_names_every_kind_of_damage(place: Workplace) -> None:
    assert place.run().returncode == 0
    pt = place.root / "data/pt/news_media/english/high"
    truncated = pt / "rank_00010.parquet"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    (pt / "rank_00726.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (pt / "rank_00801.parquet").write_text("\n<!DOCTYPE html><html><body>Log in</body></html>")
    table(pt / "rank_01200.parquet", 2, content="no text here")
    (place.root / "data/pt/film_entertainment/english/high/rank_00726.parquet").unlink()
    (place.root / "data/sft/7M/train-00001-of-00002.parquet").unlink()
    table(place.root / "data/dpo/test-00000-of-00001.parquet", 4, prompt="q", chosen=PAIR)
    shutil.rmtree(place.root / "data/sft/Gen")
    (place.root / MODEL / "tokenizer.json").unlink()
    (place.root / MODEL / "config.json").write_text(json.dumps({"a": 1})[:-1], encoding="utf-8")
    (place.root / MODEL / "merges.txt").write_text("", encoding="utf-8")

    done = place.run("--check")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    told = {
        "news_media/english/high/rank_00010.parquet": "cut off or damaged",
        "rank_00726.parquet": "Git LFS pointer",
        "rank_00801.parquet": "HTML page",
        "rank_01200.parquet": "no column text",
        "film_entertainment/english/high": "2 of 3 files",
        "data/sft/7M": "1 of 2 files",
        "data/sft/Gen": "missing",
        "data/dpo/test-00000-of-00001.parquet": "no column rejected",
        "tokenizer.json": "missing",
        f"{MODEL}/config.json": "cut off or damaged",
        "merges.txt": "empty",
    }
    for name, reason in told.items():
        assert any(name in line and reason in line for line in done.stderr.splitlines()), (name, reason)
    results = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()[1:]}
    assert sum(result == "problem" for result in results.values()) == 6
    assert results["data/dpo/train-*.parquet"] == "ok"
    assert place.run("--check", "--only", "sft").returncode == 1


def test_check_of_an_empty_place_fails(place: Workplace) -> None:
    done = place.run("--check", "--only", "model")
    assert done.returncode == 1 and "tokenizer.json is missing" in done.stderr


def test_download_ends_with_the_check(place: Workplace) -> None:
    table(place.remote / "BAAI/Infinity-Preference/data/test-00000-of-00001.parquet", 4, prompt="only")
    done = place.run("--only", "dpo")
    assert done.returncode == 1 and "no column chosen and rejected" in done.stderr
