"""The training stages as data programs see them: a recipe opened without its model."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from mini_qwen.cache import Preparation
from mini_qwen.conversations import ConversationData, conversation_preparation
from mini_qwen.documents import DocumentData, document_preparation
from mini_qwen.files import DataKeys
from mini_qwen.mixture import find_sources, read_phases
from mini_qwen.model import NewModel, TrainedModel
from mini_qwen.preferences import PreferenceData, pair_preparation
from mini_qwen.recipe import parse_recipe
from mini_qwen.tokenizer import load_tokenizer
from mini_qwen.training import AnswerConfig, PreferenceConfig, PTConfig

STAGES: dict[str, tuple[type, ...]] = {
    "pt": (DocumentData, PTConfig, NewModel),
    "sft": (ConversationData, AnswerConfig, TrainedModel),
    "dpo": (PreferenceData, PreferenceConfig, TrainedModel),
}


class StageData(NamedTuple):
    """What a recipe says of its data."""

    stage: str
    keys: DataKeys
    sources: dict[str, list[Path]]
    tokenizer: PreTrainedTokenizerBase
    max_length: int  # tokens of a block, a conversation, or either side of a pair

    @property
    def files(self) -> list[Path]:
        return [file for found in self.sources.values() for file in found]

    @property
    def preparation(self) -> Preparation:
        return self.prepare(self.max_length)

    def prepare(self, max_length: int) -> Preparation:
        """How rows of at most `max_length` tokens are made; documents are cut into blocks later."""
        if self.stage == "pt":
            return document_preparation(self.tokenizer)
        if self.stage == "sft":
            return conversation_preparation(self.keys, self.tokenizer, max_length)
        return pair_preparation(self.tokenizer, max_length)


def find_stage(recipe: str, stage: str | None = None) -> str:
    """The stage, or the one that the recipe's name has as a word: `pt_fast.yaml` is of pt."""
    named = [word for word in re.split(r"[^a-z]+", Path(recipe).stem) if word in STAGES]
    if stage is None and len(named) != 1:
        raise SystemExit(f"{recipe} does not say in its name which stage it is for. Add --stage {', '.join(STAGES)}.")
    return stage or named[0]


def open_stage(
    recipe: str, overrides: list[str], stage: str | None = None, tokenizer_path: str | None = None
) -> StageData:
    """Parse the recipe, load its tokenizer, and find its files; neither a GPU nor a checkpoint's weights are needed.

    Args:
        overrides: `--key value` words that change the recipe.
        tokenizer_path: instead of the recipe's, which for SFT and DPO is in a checkpoint that may not exist yet.
    """
    stage = find_stage(recipe, stage)
    words = ["--config", recipe, "--prepare_only", "true", *overrides]
    keys, training, model = parse_recipe(*STAGES[stage], argv=words, default=recipe)
    named: Any = model.tokenizer if stage == "pt" else model.checkpoint
    if tokenizer_path is None and not (Path(named) / "tokenizer.json").is_file():
        raise SystemExit(
            f"{recipe} takes its tokenizer from '{named}', where none is yet. Name one: --tokenizer PATH."
        )
    tokenizer = load_tokenizer(tokenizer_path or named)
    max_length = keys.block_size if stage == "pt" else training.max_length
    return StageData(stage, keys, find_sources(read_phases(keys.train_files)), tokenizer, max_length)
