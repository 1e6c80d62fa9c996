"""A study: parts measured for each checkpoint, each kept when it is finished, so that a second run goes on."""

import json
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.cache import hash_of, source_hash
from mini_qwen.chat import TEMPLATE
from mini_qwen.checkpoint import MANIFEST
from mini_qwen.circumstances import device_name, versions_of
from mini_qwen.files import find_files, identity
from mini_qwen.resumption import write_whole
from mini_qwen.training import choose_precision

MEASURES = ("lm-eval", "rouge-score")
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Part(NamedTuple):
    """One thing to measure: what it depends on beside the checkpoint, and how it is measured."""

    name: str
    settings: Any  # recipe values
    files: list[str]
    measure: Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Any]]


class Study:
    """Figures of checkpoints in `folder`/parts, one file for each checkpoint and part.

    A file is named by a hash of the checkpoint, the settings, the data files, the source, the precision, the device
    with its threads, and the versions of the libraries: what was measured is not measured again until one differs, so
    that all figures of a report are of the machine and the versions that it names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "parts"
        self.folder.mkdir(parents=True, exist_ok=True)
        modules = sorted(module.stem for module in Path(__file__).parent.glob("*.py"))
        self.source = source_hash(tuple(modules)) + hash_of(TEMPLATE)

    def measure(self, checkpoint: str, parts: list[Part], load: Callable[[str], Loaded]) -> dict[str, Any]:
        """The figures of all parts together. The checkpoint is loaded once, and only if a part is missing."""
        loaded: Loaded | None = None
        figures: dict[str, Any] = {}
        for part in parts:
            file = self.file(checkpoint, part)
            if not file.is_file():
                loaded = loaded or load(checkpoint)
                found = part.measure(*loaded)
                for old in self.folder.glob(f"{escape(self.stem(checkpoint, part))}-*.json"):
                    old.unlink()
                write_whole(file, found)
            else:
                print(f"{part.name}: as measured before")
            figures |= json.loads(file.read_text(encoding="utf-8"))
        return figures

    def stem(self, checkpoint: str, part: Part) -> str:
        place = hash_of(str(Path(checkpoint).resolve()))[:6]
        return f"{Path(checkpoint).name}-{place}-{part.name}"

    def file(self, checkpoint: str, part: Part) -> Path:
        data = [identity(file) for file in find_files(part.files)]
        circumstances = [choose_precision(), device_name(), torch.__version__, transformers.__version__]
        circumstances += measure_versions().items()
        key = hash_of([identify_checkpoint(Path(checkpoint)), part.settings, data, circumstances, self.source])
        return self.folder / f"{self.stem(checkpoint, part)}-{key}.json"


def measure_versions() -> dict[str, str]:
    """Of the libraries that measure and have no part in a training; those that are not installed are left out."""
    return versions_of(MEASURES)


def identify_checkpoint(folder: Path) -> Any:
    """The hashes of its files where a manifest has them; else their sizes and times."""
    if (folder / MANIFEST).is_file():
        return (folder / MANIFEST).read_text(encoding="utf-8")
    return [identity(file) for file in sorted(folder.iterdir()) if file.is_file()]
