"""What all trainers do beside training: stop at what is not finite, save whole checkpoints only, stop when asked."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from mini_qwen.checkpoint import UNFINISHED, publish, rotate, write_manifest
from mini_qwen.disk import checkpoint_bytes, explain_full_disk
from mini_qwen.finiteness import check_step, check_weights, name_rows
from mini_qwen.interruption import EXIT_CODE, StopAtStepBorder, interruption
from mini_qwen.unpickling import load_deepspeed_safely
from mini_qwen.watch import Heartbeat


class Guarded:
    """Stands before a Trainer among the bases of a class; overrides five of the Trainer's private methods."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[torch.Tensor] = []  # of the micro-batches of the step under way
        self.aside: Path | None = None  # where a checkpoint is written until it is whole
        self.fingerprint: dict[str, Any] = {}  # goes into every manifest
        self.heartbeat: Heartbeat | None = None
        super().__init__(*args, **kwargs)
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
        if self.border.stopped or interruption.requested:
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

    # Saving

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        return super()._get_output_dir(*args, **kwargs) if self.aside is None else str(self.aside)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write the checkpoint aside, hash it, and give it its name; only then an older one may go."""
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        with self.written_aside() as aside:
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                for script in (aside / name).glob("*.py"):
                    script.unlink()  # DeepSpeed's zero_to_fp32.py, which would unpickle what the folder holds
                if self.state.best_global_step:
                    self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{self.state.best_global_step}")
                    self.state.save_to_json(aside / name / TRAINER_STATE_NAME)
                write_manifest(aside / name, self.fingerprint)
                publish(aside / name, output_dir / name)
                rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def written_aside(self) -> Iterator[Path]:
        """The folder for what is not whole yet. Raises SystemExit, with figures, when the disk is full."""
        output_dir = Path(self.args.output_dir)
        self.aside = output_dir / UNFINISHED
        if self.heartbeat is not None:
            self.heartbeat.saving = True
        try:
            self.aside.mkdir(parents=True, exist_ok=True)
            yield self.aside
        except (OSError, RuntimeError, SafetensorError) as error:
            full = explain_full_disk(error, output_dir, checkpoint_bytes(self))
            shutil.rmtree(self.aside, ignore_errors=True)
            raise full or error from error
        finally:
            with contextlib.suppress(OSError):  # not empty, or another process has just done so
                self.aside.rmdir()
            self.aside = None
            if self.heartbeat is not None:
                self.heartbeat.saving = False

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
        if self.heartbeat is not None:
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


class GuardedTrainer(Guarded, Trainer):
    """transformers' Trainer, guarded: for PT."""


class GuardedSFTTrainer(Guarded, SFTTrainer):
    """TRL's SFTTrainer, guarded."""
