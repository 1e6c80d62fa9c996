"""The trainers of the three stages: those of transformers and TRL, guarded, on rows that are token ids already."""

from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import get_num_threads
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer
from trl import DPOTrainer, SFTTrainer

from mini_qwen.guard import Guarded
from mini_qwen.levers import choose_loss_head, fit_loss_head
from mini_qwen.optimizer import make_optimizer
from mini_qwen.sampler import ByLength


class Equipped(Guarded):
    """Guarded, with layers compiled where the recipe says so, and with its own optimizer under DeepSpeed.

    DeepSpeed's start drops the optimizer that it was given.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.compile_layers:
            # In place: names of weights stay, and layers of the same sizes share what is compiled once.
            for layer in self.model.base_model.layers:
                layer.compile()

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.args, self.args.muon_learning_rate)
        return super().create_optimizer(model)


class GuardedTrainer(Equipped, Trainer):
    """transformers' Trainer, guarded, with our loss head: for PT."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fit_loss_head(self.model, self.args, equal_weights=True)


class GuardedSFTTrainer(Equipped, SFTTrainer):
    """TRL's SFTTrainer, guarded, with our loss head in the place of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fit_loss_head(self.model, self.args, equal_weights=self.args.loss_type == "nll")


class PreparedDPOTrainer(Equipped, DPOTrainer):
    """TRL's DPOTrainer on pairs that are token ids already, of which it would otherwise make texts to tokenise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fit_loss_head(self.model, self.args, equal_weights=False)
        if self.ref_model is not None:
            self.fit_reference()

    def fit_reference(self) -> None:
        """A reference in memory is scored by the head of the policy, and in its precision.

        TRL has wrapped its forward pass already, for autocast or as an engine of DeepSpeed.
        """
        if self.is_deepspeed_enabled:
            fit_loss_head(self.ref_model.module, self.args, equal_weights=False)
            return
        reference = self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)
        fit_loss_head(reference, self.args, equal_weights=False)
        reference._is_accelerate_prepared = False
        self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Called before the trainer is complete; the reference is scored by the head that the policy will be.

        TRL keeps the scores in a file that it finds again by the pairs and the weights, whatever else they hang on,
        so that is added here. Finding them leaves torch's generator alone, so computing them must too: a DataLoader
        draws a seed.
        """
        fit_loss_head(self.model, self.args, equal_weights=False)
        args, weights = self.args, self._precompute_model_hash
        head = choose_loss_head(self.model, args).chosen
        scoring = [args.ld_alpha, args.precision, head, self.model.config._attn_implementation, args.device.type]
        self._precompute_model_hash = Hasher.hash([weights, *scoring, batch_size, args.world_size, get_num_threads()])
        try:
            with torch.random.fork_rng(devices=[]):
                return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = weights

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
