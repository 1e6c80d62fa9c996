"""A reply: the text of one answer while a thread generates it, for whoever reads it, fast or slowly or no more."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

logger = logging.getLogger(__name__)

Finish = Literal["stop", "length", "cancelled"]


class Ended(Exception):
    """Raised into a generation that is to go no further: its text has ended, or nobody wants it any more."""


class StopStrings:
    """Lets text through up to the stop string that is complete first, and never a part of one.

    stop "END": "the E" lets "the " through, then "nd" lets "End" through
    stop "END": "the E" lets "the " through, then "ND." ends the text there
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = [text for text in stop if text]
        self.held = ""  # text that may be the beginning of a stop string
        self.found = False

    def pass_on(self, text: str) -> str:
        text = self.held + text
        found = [(place + len(stop), place) for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.held, self.found = "", True
            return text[: min(found)[1]]
        lengths = (range(min(len(stop) - 1, len(text)), 0, -1) for stop in self.stop)
        starts = [
            next((length for length in some if text.endswith(stop[:length])), 0)
            for stop, some in zip(self.stop, lengths, strict=True)
        ]
        border = len(text) - max(starts, default=0)
        self.held = text[border:]
        return text[:border]


class Reply:
    """An answer in the making. One thread writes it, others read; none waits for a slow reader.

    Iterating gives the text in pieces of whole characters as they come, from the beginning, and ends with the answer.
    """

    def __init__(self, stop: Sequence[str] = (), on_cancel: Callable[["Reply"], None] | None = None) -> None:
        self.text = ""
        self.num_tokens = 0  # generated so far, the end token included
        self.finish: Finish | None = None  # None: not yet, or it failed
        self.error: str | None = None  # what ended a generation that failed
        self.ended = False
        self.stop = StopStrings(stop)
        self.on_cancel = on_cancel
        self.changed = threading.Condition()
        self.watcher: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[str]:
        """Raises RuntimeError, with its words, where the generation failed."""
        position = 0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.ended or len(self.text) > position)  # noqa: B023
                piece = self.text[position:]
            if piece:
                position += len(piece)
                yield piece
            elif self.error is not None:
                raise RuntimeError(self.error)
            else:
                return

    def cancel(self) -> None:
        """End it for its readers now, and its generation with the next token. May be called at any time."""
        self.end("cancelled")
        if self.on_cancel is not None:
            self.on_cancel(self)

    def watch(self, watcher: Callable[[], None] | None) -> None:
        """Have `watcher` called, in the writing thread, at every change from now on; None: no more."""
        with self.changed:
            self.watcher = watcher

    def check(self) -> None:
        """Raises Ended where the generation is to go no further."""
        if self.ended:
            raise Ended

    def write(self, text: str, num_tokens: int) -> None:
        """Add what the generation has decoded. Raises Ended where it is to end."""
        self.check()
        self.num_tokens = num_tokens
        self.add(self.stop.pass_on(text))
        if self.stop.found:
            self.end("stop")
            raise Ended

    def end(self, finish: Finish | None, error: str | None = None) -> None:
        """The first end counts: an answer that was cancelled stays so."""
        with self.changed:
            if self.ended:
                return
            if finish in ("stop", "length"):
                self.text += self.stop.held
            self.finish, self.error, self.ended = finish, error, True
        self.tell()

    def add(self, text: str) -> None:
        if text:
            with self.changed:
                self.text += "" if self.ended else text
            self.tell()

    def tell(self) -> None:
        with self.changed:
            self.changed.notify_all()
            if self.watcher is None:
                return
            try:
                self.watcher()
            except Exception as error:  # its event loop may be closed; other readers, and who cancels, go on
                logger.warning("A reply is watched no more: %s: %s", type(error).__name__, error)
                self.watcher = None
