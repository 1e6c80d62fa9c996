"""Faults that are planted into a stage program before it runs: what a disk, a machine or a number can do to it.

    python tests/faults.py '{"nan_loss": {"step": 3}}' mini_qwen_pt.py --config recipes/demo/pt.yaml

The functions of the libraries below the program are made to fail, and what it reads and computes is spoilt; none of
its own checks, saves or handlers is replaced.
"""

import builtins
import errno
import json
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class AtStep(TrainerCallback):
    """Calls `action` when a step ends, or with `begins` when it begins, on one rank of all."""

    def __init__(self, step: int, action: Callable[[Any], None], rank: int = 0, begins: bool = False) -> None:
        self.step, self.action, self.rank, self.begins = step, action, rank, begins

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begins and state.global_step + 1 == self.step and args.process_index == self.rank:
            self.action(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.begins and state.global_step == self.step and args.process_index == self.rank:
            self.action(kwargs["model"])


def add_to_every_trainer(callback: TrainerCallback) -> None:
    make = Trainer.__init__

    def make_with_callback(self: Trainer, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_callback(callback)

    Trainer.__init__ = make_with_callback


def nan_loss(step: int, value: float = float("nan"), micro_batch: int = 1, rank: int = 0) -> None:
    """The loss of one micro-batch becomes `value`, and with it the gradient."""
    from mini_qwen.guard import Guarded

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super(Guarded, self).compute_loss(*args, **kwargs)
        here = self.state.global_step + 1 == step and len(self.losses) + 1 == micro_batch
        return loss * value if here and self.model.training and self.args.process_index == rank else loss

    Guarded.compute_loss = compute_loss


def poisoned_row(row: int, from_step: int) -> None:
    """A row of the training data makes the loss of its batch NaN."""
    from mini_qwen.guard import Guarded

    def compute_loss(self: Any, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        ids = torch.as_tensor(self.train_dataset[row]["input_ids"])[: inputs["input_ids"].shape[1]]
        found = (inputs["input_ids"][:, : len(ids)] == ids).all(dim=1).any()
        found = found and self.state.global_step + 1 >= from_step
        loss = super(Guarded, self).compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if found and model.training else loss

    Guarded.compute_loss = compute_loss


def nan_gradient(backward_pass: int, value: float = float("nan"), rank: int = 0) -> None:
    """One number of the embedding's gradient becomes `value` in one backward pass; the loss stays as it is."""
    backward, passes = Accelerator.backward, {"done": 0}

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if passes["done"] != backward_pass:
            return gradient
        poisoned = gradient.clone()
        poisoned.view(-1)[0] = value
        return poisoned

    def backward_and_count(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> None:
        passes["done"] += 1
        if passes["done"] == 1 and self.process_index == rank:
            next(self._models[0].parameters()).register_hook(poison)
        backward(self, loss, **kwargs)

    Accelerator.backward = backward_and_count


def nan_weight(step: int, rank: int = 0) -> None:
    """One weight is not a number when the step has ended, before anything is saved."""

    def poison(model: torch.nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] = float("nan")

    add_to_every_trainer(AtStep(step, poison, rank))


def send_signal(step: int, name: str, rank: int = 0, to_group: bool = False) -> None:
    """The process gets a signal while it works on a step, or it and all its children do."""
    number, send = signal.Signals[name], os.killpg if to_group else os.kill
    add_to_every_trainer(AtStep(step, lambda _: send(os.getpid(), number), rank, begins=True))


def signal_launcher(step: int, name: str) -> None:
    """What launched the process gets a signal while rank 0 works on a step, which takes another second then."""

    def send(model: torch.nn.Module) -> None:
        os.kill(os.getppid(), signal.Signals[name])
        time.sleep(1)

    add_to_every_trainer(AtStep(step, send, begins=True))


def kill_at_step(step: int, rank: int = 0) -> None:
    """kill -9 while the process works on a step."""
    send_signal(step, "SIGKILL", rank)


def at_each_write(folder: str, action: Callable[[int, str], None]) -> None:
    """Call `action` with the number and the kind of each thing that is done to files below `folder`.

    Of a file that torch or safetensors write, twice: when half of it is there, and when it is whole.
    """
    inside, count = os.path.realpath(folder), {"writes": 0, "busy": False}

    def point(kind: str) -> None:
        count["writes"] += 1
        count["busy"] = True
        action(count["writes"], kind)
        count["busy"] = False

    def is_inside(path: object, descriptor: object = -1) -> bool:
        if not isinstance(path, str | os.PathLike):
            return False
        base = os.readlink(f"/proc/self/fd/{descriptor}") if isinstance(descriptor, int) and descriptor > 0 else ""
        return os.path.realpath(os.path.join(base, path)).startswith(inside + os.sep)

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if count["busy"] or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        reads = event == "open" and not (isinstance(args[2], int) and args[2] & WRITING)
        descriptor = args[1] if event in ("os.remove", "os.rmdir") else -1  # rmtree names files by their folder's
        if not reads and is_inside(args[0], descriptor):
            point(f"{event} {Path(args[0]).name}")

    def twice(write: Callable[..., Any], place: int) -> Callable[..., Any]:
        def write_with_points(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            if is_inside(args[place]):
                file = Path(args[place])
                count["busy"] = True
                whole = file.read_bytes()
                file.write_bytes(whole[: len(whole) // 2])
                point(f"half {file.name}")
                count["busy"] = True
                file.write_bytes(whole)
                point(f"whole {file.name}")

        return write_with_points

    torch.save = twice(torch.save, 1)
    transformers.modeling_utils.safe_save_file = twice(safetensors.torch.save_file, 1)
    sys.addaudithook(hear)


def signal_at_write(folder: str, kind: str, name: str) -> None:
    """The process gets a signal when it does something of this kind to files below `folder`, see at_each_write."""

    def act(count: int, what: str) -> None:
        if what == kind:
            os.kill(os.getpid(), signal.Signals[name])

    at_each_write(folder, act)


def kill_at_write(folder: str, number: int) -> None:
    """kill -9 at the `number`-th thing that is done to files below `folder`."""

    def act(count: int, kind: str) -> None:
        if count == number:
            print(f"killed at write {number}: {kind}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    at_each_write(folder, act)


def full_disk(folder: str, number: int) -> None:
    """From the `number`-th thing on that is done to files below `folder`, the disk has no room."""

    def act(count: int, kind: str) -> None:
        if count >= number and not kind.startswith(("os.remove", "os.rmdir", "os.rename")):
            raise OSError(errno.ENOSPC, "No space left on device")

    at_each_write(folder, act)


def fill_disk(folder: str, step: int, free: int) -> None:
    """Something else takes the room of the disk of `folder`, but for `free` bytes, while a step is made."""

    def fill(model: torch.nn.Module) -> None:
        with (Path(folder) / "filling").open("wb") as stream:
            stream.write(bytes(shutil.disk_usage(folder).free - free))

    add_to_every_trainer(AtStep(step, fill, begins=True))


def dying_worker(row: int) -> None:
    """The process that reads this row of the training data is killed, as the system does when memory runs out."""
    from mini_qwen.blocks import Blocks

    get = Blocks.__getitem__

    def get_or_die(self: Blocks, index: int) -> Any:
        if index == row and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, index)

    Blocks.__getitem__ = get_or_die


ALL = (nan_loss, poisoned_row, nan_gradient, nan_weight, send_signal, signal_launcher, kill_at_step)
ALL += (signal_at_write, kill_at_write, full_disk, fill_disk, dying_worker)
FAULTS = {fault.__name__: fault for fault in ALL}


def plant(faults: dict[str, dict[str, Any]]) -> None:
    for name, options in faults.items():
        FAULTS[name](**options)


def main() -> None:
    plant(json.loads(sys.argv[1]))
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    builtins.print(f"faults planted into {sys.argv[0]}", flush=True)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
