"""The trainers of the three stages: those of transformers and TRL, guarded, on rows that are token ids already."""

from typing import Any

from datasets import Dataset
from torch.utils.data import Sampler
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer

from mini_qwen.guard import Guarded
from mini_qwen.sampler import ByLength


class GuardedTrainer(Guarded, Trainer):
    """transformers' Trainer, guarded: for PT."""


class GuardedSFTTrainer(Guarded, SFTTrainer):
    """TRL's SFTTrainer, guarded."""


class PreparedDPOTrainer(Guarded, DPOTrainer):
    """TRL's DPOTrainer on pairs that are token ids already, of which it would otherwise make texts to tokenise."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """With train_sampling_strategy group_by_length, an order by seed that is the same in all processes.

        The order that transformers takes then depends on the state of torch's generator in each process.
        """
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self.args.train_batch_size * self.args.world_size
        return ByLength(list(rows["length"]), batch_size, self.args.data_seed)
