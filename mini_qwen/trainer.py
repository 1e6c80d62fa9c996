"""What all trainers do beside training: stop at what is not finite, save whole checkpoints only, stop when asked."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from mini_qwen.checkpoint import UNFINISHED, publish, rotate, write_manifest
from mini_qwen.disk import checkpoint_bytes, explain_full_disk
from mini_qwen.interruption import EXIT_CODE, StopAtStepBorder, interruption
from mini_qwen.unpickling import load_deepspeed_safely
from mini_qwen.watch import Heartbeat

SHOWN_ROWS = 8
SHOWN_TOKENS = 20


class Guarded:
    """Stands before a Trainer among the bases of a class; overrides four of the Trainer's private methods."""

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
            ahead = max(1, self.args.dataloader_num_workers * (self.args.dataloader_prefetch_factor or 2))
            raise SystemExit(f"{error}\nIt was reading {self.name_rows(0, ahead)}.") from error
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
        """Called once a step, before the optimizer's; under DeepSpeed behind it, which skips what is not finite."""
        norm = super()._get_grad_norm(*args, **kwargs)
        losses, self.losses = self.losses, []
        if self.heartbeat is not None:
            self.heartbeat.step = self.state.global_step + 1
        finite = torch.stack([torch.isfinite(loss) for loss in losses])
        # fp16 scales its losses up until a gradient is infinite; the scaler then skips the step and halves the scale.
        norm_is_finite = torch.isfinite(torch.as_tensor(norm, device=finite.device)) | self.gives_way()
        if not (finite.all() & norm_is_finite).item():
            self.stop_at_not_finite([loss.item() for loss in losses], float(norm))
        return norm

    def gives_way(self) -> bool:
        """Whether an infinite gradient is no fault: in fp16, as long as the loss can be scaled down further."""
        scaler = self.accelerator.scaler
        return self.args.fp16 and (scaler is None or scaler.get_scale() >= 1)

    def stop_at_not_finite(self, losses: list[float], norm: float) -> NoReturn:
        wrong = [number for number, loss in enumerate(losses) if not abs(loss) < float("inf")]
        first, count = (wrong[0], 1) if wrong else (0, len(losses))
        raise SystemExit(
            f"Step {self.state.global_step + 1:,}, rank {self.args.process_index}: the loss is "
            f"{', '.join(map(str, losses))}, the gradient's norm {norm}. The run stops before that reaches a "
            f"checkpoint; go on from the newest with --resume_from_checkpoint true. This came from "
            f"{self.name_rows(first, count)}. Look at them; if they are as they should be, lower learning_rate, raise "
            "warmup_steps, or use bf16 or fp32 in place of fp16."
        )

    def name_rows(self, first: int, count: int) -> str:
        """The rows of `count` micro-batches, from number `first` of the step under way on, by index and beginning."""
        per_step = self.args.gradient_accumulation_steps
        loader = self.callback_handler.train_dataloader
        num_batches = self.state.global_step % max(1, -(-len(loader) // per_step)) * per_step + first
        batches = islice(iter(loader.batch_sampler), num_batches, num_batches + count)
        rows = [index for batch in batches for index in batch]
        shown = ", ".join(f"{index} ({self.begin_of(index)!r})" for index in rows[:SHOWN_ROWS])
        return f"rows {shown}" + f" and {len(rows) - SHOWN_ROWS} more" * (len(rows) > SHOWN_ROWS)

    def begin_of(self, index: int) -> str:
        row = self.train_dataset[index]
        ids = row["input_ids" if "input_ids" in row else "prompt_ids"][:SHOWN_TOKENS]
        return self.processing_class.decode(ids)

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
        broken = [name for name, weight in self.model.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise SystemExit(
                f"Step {self.state.global_step:,}: {broken[0]} and {len(broken) - 1} more weights are not finite and "
                "are not saved. Go on from the newest checkpoint with --resume_from_checkpoint true and a lower "
                "learning_rate, which --allow_changes learning_rate permits."
            )
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
