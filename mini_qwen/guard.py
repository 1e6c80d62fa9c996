"""What all trainers do beside training: stop at what is not finite, save whole checkpoints only, stop when asked."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput

from mini_qwen.checkpoint import UNFINISHED, publish, rotate, write_manifest
from mini_qwen.disk import checkpoint_bytes, explain_full_disk
from mini_qwen.finiteness import check_step, check_weights, name_rows
from mini_qwen.interruption import EXIT_CODE, StopAtStepBorder, ignore_signals, interruption
from mini_qwen.optimizer import take_rates
from mini_qwen.unpickling import load_deepspeed_safely
from mini_qwen.watch import Heartbeat


class Guarded:
    """Stands before a Trainer among the bases of a class; overrides seven of the Trainer's private methods."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[torch.Tensor] = []  # of the micro-batches of the step under way
        self.aside: Path | None = None  # where a checkpoint is written until it is whole
        self.fingerprint: dict[str, Any] = {}  # goes into every manifest
        self.heartbeat: Heartbeat | None = None
        super().__init__(*args, **kwargs)
        # The Trainer's own deletion knows neither what is whole nor, at the end of a run, what was just saved.
        self.checkpoint_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.border = StopAtStepBorder()
        self.add_callback(self.border)
        if self.args.deepspeed_plugin is not None:
            load_deepspeed_safely()

    # Training

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train to the end. Leaves the program with code 75 when it was asked to stop, behind a checkpoint."""
        interruption.training = True
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            # Its worker reads so many batches ahead of the step, and accelerate one.
            ahead = self.args.dataloader_num_workers * (self.args.dataloader_prefetch_factor or 2) + 1
            ahead += self.args.gradient_accumulation_steps
            raise SystemExit(f"{error}\nIt was reading {name_rows(self, 0, ahead)}.") from error
        finally:
            interruption.training = False
        if self.border.stopped:
            if self.is_world_process_zero():
                print(f"stopped at step {self.state.global_step:,}; --resume_from_checkpoint true goes on from there")
            self.leave(EXIT_CODE)
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor | float:
        """Called once a step, before the optimizer's; under DeepSpeed behind it."""
        norm = super()._get_grad_norm(*args, **kwargs)
        losses, self.losses = self.losses, []
        check_step(self, losses, norm)
        if self.heartbeat is not None:
            self.heartbeat.step = self.state.global_step + 1
        return norm

    def _run_epoch(self, **kwargs: Any) -> None:
        """The Trainer looks at max_steps behind a step only: a run that resumes at its end would make one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Leaves torch's generator alone, so that evaluating changes nothing of what is learnt.

        The DataLoader draws a seed, and low_memory rounds and dropout drops by that generator.
        """
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        loader.base_dataloader.worker_init_fn = partial(ignore_signals, loader.base_dataloader.worker_init_fn)
        return loader

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            take_rates(self.optimizer, self.lr_scheduler, self.args)

    # Saving

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        return super()._get_output_dir(*args, **kwargs) if self.aside is None else str(self.aside)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write the checkpoint aside, hash it, and give it its name; only then an older one may go."""
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        with self.written_aside() as aside:
            super()._save_checkpoint(*args, **kwargs)
            best = self.state.best_model_checkpoint
            is_best = best is not None and Path(best).parent == aside
            if is_best:
                self.state.best_model_checkpoint = str(output_dir / Path(best).name)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                for script in (aside / name).glob("*.py"):
                    script.unlink()  # DeepSpeed's zero_to_fp32.py, which would unpickle what the folder holds
                if is_best:  # it was written with the path aside
                    self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
                write_manifest(aside / name, self.fingerprint, time.time() - self.args.started)
                publish(aside / name, output_dir / name)
                rotate(output_dir, self.checkpoint_limit, output_dir / name, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def written_aside(self) -> Iterator[Path]:
        """The folder for what is not whole yet. Raises SystemExit, with figures, when the disk is full."""
        output_dir = Path(self.args.output_dir)
        self.aside = output_dir / UNFINISHED
        try:
            self.aside.mkdir(parents=True, exist_ok=True)
            yield self.aside
        except (OSError, RuntimeError, SafetensorError) as error:
            full = explain_full_disk(error, output_dir, self.aside, checkpoint_bytes(self))
            shutil.rmtree(self.aside, ignore_errors=True)
            raise full or error from error
        finally:
            if self.is_world_process_zero():  # another would take it away while the first begins to write into it
                with contextlib.suppress(OSError):  # not empty
                    self.aside.rmdir()
            self.aside = None

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        check_weights(self)
        super().save_model(*args, **kwargs)

    def _save(self, output_dir: str, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        # A pickle that nothing reads back; the recipe stands in run.json and the fingerprint.
        (Path(output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's, written beside every checkpoint, says what TRL knows; run.json says what this run did."""

    # Leaving

    def leave(self, code: int) -> None:
        """Finish this process's part; a run that was stopped ends with its code here.

        One process of several ends without Python's teardown, in which threads of the libraries now and then abort it.
        """
        several = self.args.world_size > 1
        if self.heartbeat is not None:  # others see this one alive for as long as any is at work
            self.accelerator.wait_for_everyone()
            self.heartbeat.end()
            self.accelerator.wait_for_everyone()
            self.heartbeat.clear()
        self.end()
        interruption.leave()
        if several:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if code:
            raise SystemExit(code)
