"""What a client of the API asks for: JSON of OpenAI's form, checked field by field, or refused with what is wrong."""

import difflib
import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mini_qwen.api_json import ApiError, read_json, show
from mini_qwen.sampling import Sampling
from mini_qwen.schemas import BadRow, Turn, read_text

Endpoint = Literal["chat", "text"]
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that would change the answer, with the values (as JSON) that ask for nothing; null asks for nothing in all.
NEUTRAL = {
    "n": {"1"},
    "best_of": {"1"},
    "logprobs": {"false"},
    "top_logprobs": {"0"},
    "echo": {"false"},
    "suffix": {'""'},
    "tools": {"[]"},
    "tool_choice": {'"none"', '"auto"'},
    "functions": {"[]"},
    "function_call": {'"none"', '"auto"'},
    "response_format": {'{"type": "text"}'},
    "modalities": {'["text"]'},
    "audio": set(),
    "frequency_penalty": {"0", "0.0"},
    "presence_penalty": {"0", "0.0"},
    "logit_bias": {"{}"},
    "reasoning_effort": {'"none"'},
    "verbosity": set(),
    "web_search_options": set(),
}
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction"}
HARMLESS |= {"prompt_cache_retention", "parallel_tool_calls"}
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # strings, characters
LOWEST_TEMPERATURE = 0.01  # below it, logits divided by the temperature leave the range of a half-precision number


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and what it gets where it does not say."""

    max_tokens: int = 2048  # of an answer
    default_tokens: int = 256  # of an answer whose request names no number
    max_bytes: int = 1_000_000  # of a request's body
    max_messages: int = 512
    body_seconds: float = 30.0  # for a body to arrive in


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None


class Request(BaseModel):
    """The fields that decide an answer. Types are strict: "5" is no number, true is no 1."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    model: str | None = None
    messages: list[Any] | None = None
    prompt: Any = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, default: Sampling) -> Sampling:
        if self.temperature is not None and 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ApiError(
                f"'temperature' is {self.temperature}: take 0, or {LOWEST_TEMPERATURE} to 2.", "temperature"
            )
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return Sampling(**{name: getattr(default, name) for name in names} | given)

    def chosen_seed(self) -> int:
        """The client's, or one drawn for this request."""
        return secrets.randbits(31) if self.seed is None else self.seed

    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def stops(self) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise ApiError("'stop' must be a text or a list of texts, none of them empty.", "stop")
        if len(stop) > MAX_STOPS or any(len(text) > MAX_STOP_LENGTH for text in stop):
            raise ApiError(f"'stop' may hold {MAX_STOPS} texts of {MAX_STOP_LENGTH} characters each.", "stop")
        return stop

    def num_tokens(self, limits: Limits, room: int) -> int:
        """How long the answer may be; `room` is what the prompt leaves of the context."""
        asked = [number for number in (self.max_tokens, self.max_completion_tokens) if number is not None]
        if len(set(asked)) > 1:
            raise ApiError("'max_tokens' and 'max_completion_tokens' differ: name one of them.", "max_tokens")
        if not asked:
            return max(1, min(limits.default_tokens, limits.max_tokens, room))
        if asked[0] > limits.max_tokens:
            named = "max_tokens" if self.max_tokens is not None else "max_completion_tokens"
            raise ApiError(f"'{named}' is {show(asked[0])}, but this server allows {limits.max_tokens:,}.", named)
        return asked[0]

    def turns(self, limits: Limits) -> list[Turn]:
        """The conversation. The last turn is a user's, since that is what is answered."""
        messages = self.messages or []
        if not messages:
            raise ApiError("'messages' must be a list of at least one message.", "messages")
        if len(messages) > limits.max_messages:
            raise ApiError(
                f"'messages' has {len(messages):,}, at most {limits.max_messages:,} are allowed.", "messages"
            )
        turns = [turn for at, message in enumerate(messages) for turn in read_message(message, f"messages[{at}]")]
        if not turns or turns[-1]["role"] != "user":
            raise ApiError("The last of 'messages' must have the role user: it is what is answered.", "messages")
        return turns

    def text(self) -> str:
        """The text to continue."""
        prompt = self.prompt[0] if isinstance(self.prompt, list) and len(self.prompt) == 1 else self.prompt
        if not isinstance(prompt, str):
            raise ApiError("'prompt' must be a text, or a list of one text: one prompt a request.", "prompt")
        if not prompt:
            raise ApiError("'prompt' is empty: there is nothing to continue.", "prompt")
        return prompt


def read_message(message: Any, place: str) -> list[Turn]:
    """One message as a turn, or as none: an empty system message says nothing."""
    if not isinstance(message, dict):
        raise ApiError(f"'{place}' must be an object with role and content.", place)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(f"'{place}.role' is {show(role)}, but must be one of {', '.join(ROLES)}.", f"{place}.role")
    for key, value in message.items():
        if key not in ("role", "content", "name") and value not in (None, [], {}):
            raise ApiError(f"'{place}.{show(key)}' is not supported here: leave it out.", f"{place}.{key:.80}")
    content = message.get("content")
    if content == "" and role != "user":
        return [] if ROLES[role] == "system" else [{"role": "assistant", "content": ""}]
    if isinstance(content, str) and role == "assistant":  # an earlier answer may be blank
        return [{"role": role, "content": content}]
    try:
        return [{"role": ROLES[role], "content": read_text(content)}]
    except BadRow as reason:
        cure = "it must be a text that is not blank, or a list of parts of type text"
        raise ApiError(f"'{place}.content': {reason}; {cure}.", f"{place}.content") from None


def read_request(body: bytes, endpoint: Endpoint) -> Request:
    """Raises ApiError for what is not JSON, has a wrong type or number, or asks for what the server cannot do."""
    fields = read_json(body)
    own, other = ("messages", "prompt") if endpoint == "chat" else ("prompt", "messages")
    known = {*Request.model_fields, *NEUTRAL, *HARMLESS} - {other}
    for key, value in fields.items():
        if key not in known:
            near = difflib.get_close_matches(key[:80], known, n=1)
            cure = f"Did you mean '{near[0]}'?" if near else "Leave it out."
            raise ApiError(f"There is no field {show(key)} here. {cure}", key[:80])
        if key in NEUTRAL and value is not None and json.dumps(value) not in NEUTRAL[key]:
            only = "Only n=1 is supported" if key == "n" else f"'{key}' is not supported"
            raise ApiError(f"{only}, and it is {show(value)}: leave it out.", key)
    if fields.get(own) is None:
        raise ApiError(f"'{own}' is missing.", own)
    try:
        request = Request.model_validate({key: value for key, value in fields.items() if key in Request.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        raise ApiError(f"'{param}' is {show(first['input'])}: {first['msg'].lower()}.", param) from None
    if request.stream_options is not None and not request.stream:
        raise ApiError("'stream_options' needs stream to be true.", "stream_options")
    return request
