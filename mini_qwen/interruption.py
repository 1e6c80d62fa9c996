"""Stopping on SIGTERM, Ctrl-C or hang-up: with a checkpoint at a step border that all processes agree on.

The exit code is 75 (EX_TEMPFAIL of sysexits.h): the run was stopped, and the same command with
`--resume_from_checkpoint true` goes on. A second Ctrl-C, a second or more after the first, leaves at once.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interruption:
    """Whether this process was asked to stop, and by what. There is one of them, as there is one set of handlers."""

    def __init__(self) -> None:
        self.requested: str | None = None  # what asked: the name of a signal, or a sentence
        self.asked_at = 0.0
        self.training = False  # a training loop is there to be stopped at its next step border
        self.speaks = True  # prints: only the first process does
        self.previous: dict[int, Any] = {}

    def listen(self, speaks: bool) -> None:
        """Take the signals over; one that is ignored, as `nohup` has it for SIGHUP, stays so."""
        self.requested, self.training, self.speaks = None, False, speaks
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before = signal.signal(number, self.handle)
                self.previous.setdefault(number, before)

    def leave(self) -> None:
        """Give the signals back to whom they belonged before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def handle(self, number: int, frame: FrameType | None) -> None:
        again = self.requested is not None and number == signal.SIGINT and time.monotonic() > self.asked_at + 1
        if again:
            raise SystemExit(128 + number)
        if self.requested is None:
            self.request(signal.Signals(number).name)
        if not self.training:  # there is no step to end and nothing to save
            raise SystemExit(EXIT_CODE)

    def request(self, reason: str) -> None:
        self.requested, self.asked_at = reason, time.monotonic()
        if self.speaks:
            then = "stopping at the next step border, with a checkpoint" if self.training else "stopping"
            say(f"{reason}: {then}")


def say(words: str) -> None:
    """Write to standard error from a signal's handler or a thread, which print() may be busy in the midst of.

    Where the terminal is gone, all further words go nowhere: an error here or there would end the run before it saves.
    """
    try:
        os.write(2, f"\n{words}\n".encode())
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def ignore_signals(initialise: Callable[[int], None] | None, worker: int) -> None:
    """For a data worker: a signal to the whole group is for the training to answer, which needs data until then."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialise is not None:
        initialise(worker)


interruption = Interruption()


class StopAtStepBorder(TrainerCallback):
    """Ends the training behind the step in which any of the processes was asked to stop, and saves there.

    What was not logged yet is logged at every save and behind the last step, so that no step's loss goes unlogged and
    a resumed run logs what a straight one does; one that was stopped has an entry more, at that step.
    """

    stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        asked = torch.tensor([float(interruption.requested is not None)], device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked.item():
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # whoever asked may not wait so long
        control.should_log = control.should_log or control.should_save or state.global_step >= state.max_steps
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.stopped:  # in the midst of the epoch, and saved there
            control.should_save = control.should_evaluate = False
        control.should_log = control.should_log or control.should_save
        return control
