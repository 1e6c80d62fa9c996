"""utils/prepare_shards.py: two workers prepare the files, and the stage finds them as if it had made them itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from mini_qwen import cache
from mini_qwen.documents import DocumentData, prepare_documents

ROOT = Path(__file__).resolve().parents[1]


def test_two_workers_prepare_what_the_stage_then_finds(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install -e '.[shards]'")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shared = str(tmp_path / "cache")
    command = [sys.executable, "utils/prepare_shards.py", "recipes/demo/pt.yaml", "--tasks", "4", "--workers", "2"]
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--cache_dir", shared, "--logs", str(tmp_path / "logs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=child_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tokens" in done.stderr  # datatrove's own report of what the tasks counted

    data = {"train_files": [str(ROOT / "mini_data/pt")], "block_size": 64, "eval_rows": 20}
    alone, _, ledger = prepare_documents(DocumentData(**data, cache_dir=str(tmp_path / "alone")), tokenizer, seed=1)
    monkeypatch.setattr(cache, "prepare_file", refuse)  # nothing is left to prepare
    monkeypatch.chdir(ROOT)
    found, _, same_ledger = prepare_documents(DocumentData(**data, cache_dir=shared), tokenizer, seed=1)
    assert same_ledger == ledger
    assert (found.spans == alone.spans).all() and (found.table == alone.table).all()
    assert all((found[at]["input_ids"] == alone[at]["input_ids"]).all() for at in range(0, len(alone), 500))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a file was prepared again")


def child_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_damaged_file_fails_its_task(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """As an error that datatrove reports; it would wait for ever for a worker that has left."""
    shards = pytest.importorskip("utils.prepare_shards", reason="datatrove is not installed")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    words = ["--train_files", str(tmp_path / "broken.parquet"), "--cache_dir", str(tmp_path / "cache")]
    step = shards.PrepareFiles(str(ROOT / "recipes/demo/pt.yaml"), words, None, str(tmp_path / "tokenizer"))
    with pytest.raises(RuntimeError, match="broken or cut off"):
        list(step.run(None, rank=0, world_size=1))
