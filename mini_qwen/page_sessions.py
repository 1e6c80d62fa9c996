"""PageSessions: what each open page has asked and heard, kept on the server."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from mini_qwen.answer_streams import AnswerStream
from mini_qwen.backends import Settings
from mini_qwen.schemas import Turn

MAX_SESSIONS = 500  # whose conversations are remembered


@dataclass
class Exchange:
    """A question and what is heard in answer to it."""

    question: str
    stream: AnswerStream

    @property
    def answered(self) -> bool:
        return self.stream.done and self.stream.error is None and bool(self.stream.text)


@dataclass
class Round:
    """The same question to several backends, in the order in which they stand on the page."""

    prompt: str
    system: str
    settings: Settings
    blind: bool
    streams: list[AnswerStream]
    voted: bool = False

    @property
    def done(self) -> bool:
        return all(stream.done for stream in self.streams)

    @property
    def hidden(self) -> bool:
        return self.blind and not self.voted

    @property
    def open(self) -> bool:
        """Whether there can be a vote: all have ended, two or more of them with an answer."""
        return self.done and not self.voted and sum(stream.error is None for stream in self.streams) > 1


@dataclass
class PageSession:
    """One open page: its conversation, its round in the arena."""

    exchanges: list[Exchange] = field(default_factory=list)
    round: Round | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def answering(self) -> bool:
        return any(not exchange.stream.done for exchange in self.exchanges)

    def turns(self, system: str) -> list[Turn]:
        """The conversation so far as turns. A failed answer and its question are no part of it, nor is raw text."""
        turns = [{"role": "system", "content": system}] if system.strip() else []
        for exchange in self.exchanges:
            if exchange.answered and not exchange.stream.raw:
                turns.append({"role": "user", "content": exchange.question})
                turns.append({"role": "assistant", "content": exchange.stream.text})
        return turns

    def stop(self) -> None:
        self.stop_chat()
        self.stop_round()

    def stop_chat(self) -> None:
        for exchange in self.exchanges:
            exchange.stream.cancel()

    def stop_round(self) -> None:
        for stream in self.round.streams if self.round else []:
            stream.cancel()


class PageSessions:
    """The sessions by the hash that Gradio gives each page; one that comes back finds its conversation."""

    def __init__(self) -> None:
        self.sessions: OrderedDict[str, PageSession] = OrderedDict()
        self.lock = threading.Lock()

    def of(self, session_hash: str | None) -> PageSession:
        """The page's session, or a new one, for which the one longest unused makes room, its answers stopped."""
        with self.lock:
            session = self.sessions.setdefault(session_hash or "", PageSession())
            self.sessions.move_to_end(session_hash or "")
            if len(self.sessions) > MAX_SESSIONS:
                self.sessions.popitem(last=False)[1].stop()
        return session

    def close(self, session_hash: str | None) -> None:
        """Stop what still answers a page that nobody looks at.

        Makes no session: Gradio says of anyone that he has left, also of one who never logged in.
        """
        with self.lock:
            session = self.sessions.get(session_hash or "")
        if session is not None:
            session.stop()
