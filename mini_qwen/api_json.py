"""JSON of the API: read strictly, written on one line, and errors in OpenAI's form."""

import json
from typing import Any

# JSON leaves these as they are, and some readers of event streams take them for line ends.
LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client gets in place of an answer; `param` names the field of its request that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


def read_json(body: bytes) -> dict[str, Any]:
    """The object that the body is. Raises ApiError; also for NaN, and for text that no UTF-8 can hold."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON number")

    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=refuse)
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError("The body holds half a character pair (a lone surrogate), which is no text.") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(f"The body is not JSON in UTF-8: {str(error)[:200]}.") from None
    if not isinstance(fields, dict):
        raise ApiError(f"The body is {show(fields)}, but must be a JSON object.")
    return fields


def show(value: Any) -> str:
    """The beginning of a value, for a message."""
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 80 else words[:80] + "..."


def to_json(value: Any) -> bytes:
    """On one line, in UTF-8; NaN would be an error of ours."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escaped in LINE_ENDS.items():
        text = text.replace(character, escaped)
    return text.encode()


def to_event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def error_body(error: ApiError) -> dict[str, Any]:
    usual = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = TYPES.get(error.status, usual)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
