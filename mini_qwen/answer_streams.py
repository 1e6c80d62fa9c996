"""Answers while they are written: each as far as it has come, with its own failure; one call stops them all."""

import random
import threading
import time
from collections.abc import Iterator, Sequence

from mini_qwen.backends import Backend, Settings
from mini_qwen.files import brief
from mini_qwen.reply import Reply
from mini_qwen.schemas import Turn

BETWEEN_LOOKS = 0.05  # seconds; a page is not told of every single token
LONGEST_WAIT = 0.5  # seconds without news, after which a closed page is noticed all the same


class AnswerStream:
    """One answer of one backend, and how it goes. A failure ends this one and no other."""

    def __init__(
        self, backend: Backend, turns: list[Turn], settings: Settings, raw: bool, news: threading.Event
    ) -> None:
        """Begin to ask; `news` is set whenever there is more to show."""
        self.name, self.raw, self.settings, self.news = backend.name, raw or not backend.speaks_chat, settings, news
        self.started = time.monotonic()
        self.ended: float | None = None
        try:
            self.reply = backend.answer(turns, settings, self.raw)
        except (Exception, SystemExit) as error:
            self.reply = Reply()
            self.reply.end(None, error=brief(error) or type(error).__name__)
        self.reply.watch(self.look)
        self.look()

    def look(self) -> None:
        if self.reply.ended and self.ended is None:
            self.ended = time.monotonic()
        self.news.set()

    def cancel(self) -> None:
        self.reply.cancel()

    @property
    def text(self) -> str:
        """As far as it has come, without the marks of bytes that are no character."""
        return self.reply.text.replace("\ufffd", "")

    @property
    def num_tokens(self) -> int:
        return self.reply.num_tokens

    @property
    def finish(self) -> str | None:
        return self.reply.finish

    @property
    def error(self) -> str | None:
        return self.reply.error

    @property
    def done(self) -> bool:
        return self.ended is not None

    @property
    def seconds(self) -> float:
        """Since the question was asked, to the answer's end if it has come."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def rate(self) -> float:
        """Tokens a second, the time before the first one included."""
        return self.num_tokens / max(self.seconds, 1e-3)


def ask_all(
    backends: Sequence[Backend], turns: list[Turn], settings: Settings, raw: bool = False
) -> list[AnswerStream]:
    """Ask all backends the same at the same time."""
    news = threading.Event()
    return [AnswerStream(backend, turns, settings, raw, news) for backend in backends]


def follow(streams: Sequence[AnswerStream]) -> Iterator[None]:
    """Returns to its reader at once, and then whenever there is something new to show, until all have ended.

    Closing the iterator, as happens when a page is closed, stops the generations.
    """
    news = streams[0].news
    try:
        yield
        while not all(stream.done for stream in streams):
            news.wait(LONGEST_WAIT)
            news.clear()
            yield
            time.sleep(BETWEEN_LOOKS)
    finally:
        for stream in streams:
            stream.cancel()


def draw_order(backends: Sequence[Backend], blind: bool) -> list[Backend]:
    """The backends as they were named, or so mixed that their places tell nothing."""
    return random.SystemRandom().sample(list(backends), len(backends)) if blind else list(backends)
