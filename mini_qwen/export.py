"""A checkpoint for other programs: checked before anything is written, and there only when it is written whole."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from mini_qwen.checkpoint import UNFINISHED, step_of
from mini_qwen.disk import OTHER_FILES, gigabytes
from mini_qwen.files import brief
from mini_qwen.integrity import sync, sync_all
from mini_qwen.model import check_checkpoint, check_vocabulary
from mini_qwen.templates import safe_template
from mini_qwen.tokenizer import load_tokenizer
from mini_qwen.weights import DTYPE_NAMES, DTYPES, check_range, common_dtype, read_weights


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was looked through, in memory."""

    folder: Path
    stage: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    layout: dict[str, Any]  # of its tokenizer.json
    weights: dict[str, torch.Tensor]  # as stored
    dtype: torch.dtype  # that they are to be written in

    @property
    def name(self) -> str:
        """`dpo` for results/dpo, `dpo-checkpoint-500` for results/dpo/checkpoint-500."""
        return export_name(self.folder)

    @property
    def speaks_chat(self) -> bool:
        return self.stage != "pt"

    @property
    def chat_template(self) -> str | None:
        """For other programs; None for a checkpoint that continues text."""
        tokens = [token["content"] for token in self.layout["added_tokens"]]
        return safe_template(tokens) if self.speaks_chat else None

    @property
    def num_weights(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return self.num_weights * self.dtype.itemsize

    def describe(self) -> str:
        return f"{self.num_weights:,} weights in {self.dtype_name}"


def export_name(folder: Path) -> str:
    folder = folder.resolve()
    return f"{folder.parent.name}-{folder.name}" if step_of(folder) else folder.name


def open_checkpoint(path: str, dtype: str | None = None) -> Checkpoint:
    """Everything that an export needs, looked through.

    Args:
        dtype: bf16, fp16 or fp32; None: the type that holds all stored weights exactly.

    Raises SystemExit when files are missing or damaged, weights are missing, doubled or not finite or too large for
    the type, the tokenizer has more tokens than the model, and for another kind of model.
    """
    check_checkpoint(path)
    folder = Path(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder / 'config.json'} cannot be read: {brief(error)}") from None
    if config.model_type != "qwen2":
        raise SystemExit(
            f"'{path}' is a model of type {config.model_type}; only qwen2 is exported, the type that mini_qwen trains."
        )
    stage = getattr(config, "training_stage", None)
    if not isinstance(stage, str):
        raise SystemExit(
            f'{folder / "config.json"} does not say which stage made the checkpoint. Add "training_stage": "pt" if it '
            'continues text, "sft" if it answers in the chat template.'
        )
    tokenizer = load_tokenizer(path)
    check_vocabulary(config.vocab_size, tokenizer)
    layout = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    weights = read_weights(folder, config)
    wanted = common_dtype(weights) if dtype is None else DTYPES[dtype]
    check_range(weights, wanted)
    return Checkpoint(folder, stage, config, tokenizer, layout, weights, wanted)


def default_target(path: str, to: str) -> Path:
    """Beside the run: results/dpo-gguf for results/dpo and, for its checkpoints, results/dpo-checkpoint-500-gguf."""
    folder = Path(path)
    if ".." in folder.parts or len(folder.parts) < (2 if step_of(folder.resolve()) else 1):
        folder = folder.resolve()  # what the path itself says does not reach up to beside the run
    beside = folder.parent.parent if step_of(folder) else folder.parent
    return beside / f"{export_name(folder)}-{to}"


def check_target(target: Path) -> None:
    """Raises SystemExit when something is there: an export never mixes with other files, nor takes any away."""
    if target.is_dir() and not any(target.iterdir()):
        if target.resolve() == Path.cwd():
            raise SystemExit(f"'{target}' is the folder you are in, and an export takes its place. Name another one.")
        return
    if target.exists() or target.is_symlink():
        raise SystemExit(f"'{target}' is there already. Remove it, or name another --output_dir.")


@contextlib.contextmanager
def written_whole(target: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to write into, which becomes `target` in one step when the block ends, and goes when it fails.

    Args:
        target: not there, or an empty folder, which may be on another disk behind a symbolic link.
        num_bytes: about what will be written.

    Raises SystemExit for a disk without room, for a place that cannot be written to, and where something came into
    `target` in the meantime.
    """
    place = target.resolve()
    existing = next(parent for parent in place.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if num_bytes + OTHER_FILES > free:
        raise SystemExit(
            f"'{target}' needs {gigabytes(num_bytes + OTHER_FILES)}, and its disk has {gigabytes(free)} free. Free "
            "some, or name an --output_dir on another disk."
        )
    aside = place.with_name(f"{UNFINISHED}-{place.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        sync_all(aside)
        if place.is_dir():
            place.rmdir()  # raises where it is no longer empty
        aside.rename(place)
        sync(place.parent)
    except OSError as error:
        raise SystemExit(f"'{target}' cannot be written: {brief(error)}. Nothing was left behind.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
