"""A model behind an OpenAI-compatible URL: its answers streamed, its failures in one line, its key never shown."""

import asyncio
import codecs
import threading
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import openai

from mini_qwen.backends import Settings
from mini_qwen.files import brief
from mini_qwen.reply import Ended, Reply
from mini_qwen.schemas import Turn

PAIRS = "utf-16-le"  # in which the two halves that JSON may write a character in, \ud83d and \ude42, are joined
MOST_TOKENS = 2**31  # a count beyond is none


class RemoteError(Exception):
    """What went wrong with an answer, in a line for its reader."""


class Address(NamedTuple):
    url: str
    model: str | None  # None: the first that the server lists
    name: str


def read_address(text: str) -> Address:
    """The parts of `http://host:8000/v1#model`. A missing path is /v1. Raises SystemExit for what is no such URL."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise SystemExit(f"This URL cannot be read: {error}. A right one is http://host:8000/v1.") from None
    if parts.username is not None or parts.password is not None:
        raise SystemExit(f"The URL of {parts.hostname} holds a user or password. Give its key with --api_keys.")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or text != "".join(text.split()):
        raise SystemExit(f"'{text}' is no URL of a model. Write http://host:8000/v1 or http://host:8000/v1#model.")
    place = f"{parts.hostname}:{port}" if port else parts.hostname
    model = parts.fragment or None
    url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
    return Address(url, model, f"{model} ({place})" if model else place)


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop in which all remote answers are read, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="remote").start()
    return loop


class RemoteBackend:
    speaks_chat = True
    context: int | None = None

    def __init__(self, address: Address, key: str | None, timeout: float) -> None:
        self.address, self.name, self.key, self.timeout = address, address.name, key, timeout
        self.loop = event_loop()
        self.client = openai.AsyncOpenAI(base_url=address.url, api_key=key or "none", timeout=timeout, max_retries=0)
        # From OPENAI_ORG_ID and OPENAI_PROJECT_ID of the environment; not every server may know them.
        self.client.organization = self.client.project = None

    def answer(self, turns: list[Turn], settings: Settings, raw: bool) -> Reply:
        """Cancelling the reply closes the connection, at which the server stops."""

        def hang_up(_: Reply) -> None:
            reading.cancel()

        reply = Reply(on_cancel=hang_up)
        reading = asyncio.run_coroutine_threadsafe(self.read(reply, turns, settings, raw), self.loop)
        return reply

    async def read(self, reply: Reply, turns: list[Turn], settings: Settings, raw: bool) -> None:
        """Write the reply as it comes. A chunk counts as a token until the server says how many there were.

        Half a character waits for its other half, in this chunk or the next; without it, it is a U+FFFD.
        """
        finish, opened = None, False
        pairs = codecs.getincrementaldecoder(PAIRS)("replace")
        try:
            async with await self.open(turns, settings, raw) as stream:
                opened = True
                async for chunk in stream:
                    for choice in chunk.choices[:1]:
                        text = (choice.text if raw else choice.delta.content) or ""
                        finish = choice.finish_reason or finish
                        whole = pairs.decode(text.encode(PAIRS, "surrogatepass"))
                        reply.write(whole, reply.num_tokens + bool(text))
                    # The client checks no types: a server may have sent anything in its place.
                    count = getattr(chunk.usage, "completion_tokens", None)
                    if type(count) is int and 0 < count < MOST_TOKENS:
                        reply.num_tokens = count
            if finish is None:
                raise RemoteError(f"{self.address.url} broke off its answer.")
            reply.end("length" if finish == "length" else "stop")
        except Ended:
            pass
        except Exception as error:
            reply.end(None, error=self.describe(error, opened))

    async def open(self, turns: list[Turn], settings: Settings, raw: bool) -> Any:
        """The server's stream. What not every server knows is sent only where it changes something."""
        sampling = settings.sampling
        extra: dict[str, float] = {} if sampling.top_k == 0 else {"top_k": sampling.top_k}
        extra |= {} if sampling.repetition_penalty == 1 else {"repetition_penalty": sampling.repetition_penalty}
        wishes: dict[str, Any] = {
            "model": self.address.model or await self.first_model(),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": settings.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": extra,
        }
        try:
            if raw:
                return await self.client.completions.create(prompt=turns[-1]["content"], **wishes)
            return await self.client.chat.completions.create(messages=turns, **wishes)
        except openai.BadRequestError as error:
            cure = " A server that does not know top-k or repetition penalty takes 0 and 1." if extra else ""
            raise RemoteError(self.describe(error, opened=False) + cure) from None

    async def first_model(self) -> str:
        listed = await self.client.models.list()
        if not listed.data:
            raise RemoteError(f"{self.address.url} lists no model. Name one: {self.address.url}#model.")
        self.address = self.address._replace(model=listed.data[0].id)
        return listed.data[0].id

    def describe(self, error: Exception, opened: bool) -> str:
        """The failure in a line, without the key that a server may repeat in it. `opened`: it had begun to answer."""
        if isinstance(error, RemoteError):
            return self.hide(error)
        if isinstance(error, openai.APITimeoutError):
            words = f"said nothing for {self.timeout:g} seconds."
        elif isinstance(error, openai.APIStatusError):
            words = f"answered {error.status_code}: {error.message}"
        elif isinstance(error, openai.APIConnectionError) and not opened:
            words = f"cannot be reached: {error.__cause__ or error}."
        else:
            words = f"broke off its answer: {str(error).strip() or type(error).__name__}."
        # What is cut first may keep a part of the key.
        return brief(self.hide(f"{self.address.url} {words}"))

    def hide(self, words: object) -> str:
        """Words without the key, and without half characters."""
        text = str(words).encode(PAIRS, "surrogatepass").decode(PAIRS, "replace")
        return text.replace(self.key, "***") if self.key else text
