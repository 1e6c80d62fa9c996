"""Checkpoints to export, and `utils/export.py` called as its command line calls it."""

import importlib.util
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]


def load_program() -> Any:
    spec = importlib.util.spec_from_file_location("export_program", ROOT / "utils/export.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export(checkpoint: Path, to: str, target: Path, *words: str) -> Path:
    load_program().main([str(checkpoint), "--to", to, "--output_dir", str(target), *words])
    return target


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
