"""Schemas: the forms in which people keep conversations and pairs, read as turns."""

from typing import Any

from mini_qwen.rows import Fields

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "observation", "ipython")
Turn = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# A file of conversations has all columns of one of these; the others are read where they are there.
CONVERSATIONS = [["conversations"], ["messages"], ["prompt", "completion"], ["instruction", "output"]]
CONVERSATION_COLUMNS = [*sum(CONVERSATIONS, []), "input", "history", "system", "tools"]
PAIRS = [["chosen", "rejected"], ["prompt", "completion", "label"], ["messages", "label"]]
PAIR_COLUMNS = ["prompt", "conversations", "instruction", "input", "history", "system", "tools"]
PAIR_COLUMNS += ["chosen", "rejected", "completion", "messages", "label"]


class BadRow(Exception):
    """A row that cannot be trained on and is dropped under this reason."""


def read_text(content: Any) -> str:
    """The text of a turn: a string, or a list of parts `{"type": "text", "text" or "value": str}`.

    Raises BadRow for text that is missing or blank or that no UTF-8 can hold, and for parts of another type.
    """
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) and part.get("type") == "text" else {} for part in content]
        texts = [part.get("value") if part.get("text") is None else part["text"] for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise BadRow("a turn with parts that are not text")
        content = "".join(texts)
    if not isinstance(content, str) or not content.strip():
        raise BadRow("empty turn")
    check_unicode(content)
    return content


def check_unicode(text: str) -> None:
    """Raises BadRow for half a character pair (a lone surrogate), which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("not valid Unicode") from None


def read_turns(value: Any, place: str) -> list[Turn]:
    """Turns in either spelling, `from`/`value` or `role`/`content`, as `role`/`content` with known roles.

    Raises:
        SystemExit: an unknown role: data of another kind must not be trained on by mistake.
        BadRow: no list, no turns, turns of tools, text that is missing or blank.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRow("no turns")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise BadRow("malformed turn")
        role = turn.get("from") or turn.get("role")
        content = turn.get("value") if turn.get("value") is not None else turn.get("content")
        if role in TOOL_ROLES or turn.get("tool_calls"):
            raise BadRow("turns of tools")
        if not isinstance(role, str) or role not in ROLES:
            raise SystemExit(
                f"{place}: unknown role {role!r:.80}. Known roles are {', '.join(ROLES)}; "
                "map or remove this turn first."
            )
        if ROLES[role] != "system" or content not in (None, ""):  # no system turn may be written as an empty one
            turns.append({"role": ROLES[role], "content": read_text(content)})
    if not turns:
        raise BadRow("no turns")
    return turns


def as_turns(value: Any, role: str, place: str) -> list[Turn]:
    """A text as one turn of `role`, turns as they are."""
    return read_turns(value if isinstance(value, list | dict) else [{"role": role, "content": value}], place)


def present(values: Fields) -> Fields:
    """The columns that hold something: None is no value, and neither is NaN, which pandas writes for none."""
    return {name: value for name, value in values.items() if value is not None and value == value}


def read_column(values: Fields, name: str) -> str:
    """The text of a column, "" where it has none. Raises BadRow for a number, a list, or the like."""
    text = values.get(name, "")
    if not isinstance(text, str):
        raise BadRow(f"'{name}' that is not text")
    return text


def read_instruction(values: Fields) -> list[Any]:
    """The alpaca columns as raw turns: `system`, `history` (pairs of question and answer), `instruction` + `input`."""
    earlier = values.get("history") or []
    if not isinstance(earlier, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in earlier):
        raise BadRow("malformed history")
    question = "\n".join(filter(None, (read_column(values, name) for name in ("instruction", "input"))))
    spoken = [*(text for pair in earlier for text in pair), question]
    return [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(spoken)]


def read_prompt(values: Fields, place: str) -> list[Turn]:
    """The turns before an answer, in whichever columns they are; none where there are none."""
    prompt = values.get("prompt")
    if prompt is None:
        prompt = values.get("conversations") or values.get("messages")
    if prompt is None and "instruction" in values:
        prompt = read_instruction(values)
    return as_turns(prompt, "user", place) if prompt else []


def with_system(turns: list[Turn], values: Fields) -> list[Turn]:
    """With the `system` column as first turn, where the turns have none."""
    if turns and turns[0]["role"] == "system":
        return turns
    system = read_column(values, "system")
    return [{"role": "system", "content": read_text(system)}, *turns] if system.strip() else turns


def read_conversation(values: Fields, place: str) -> list[Turn]:
    """The turns of a row, as they come. Raises BadRow and SystemExit as `read_turns` does."""
    values = present(values)
    check_tools(values)
    whole = values.get("conversations") or values.get("messages")  # of which `prompt` only repeats the first turn
    if whole:
        return with_system(read_turns(whole, place), values)
    if values.get("instruction") and values.get("output"):
        # Beside them `prompt` may be the whole example in some template, with the answer, for the model to copy.
        turns, answer = read_turns(read_instruction(values), place), values["output"]
    else:
        turns, answer = read_prompt(values, place), values.get("completion", values.get("output"))
    if answer is not None:
        turns = turns + as_turns(answer, "assistant", place)
    if not turns:
        raise BadRow("no turns")
    return with_system(turns, values)


def check_tools(values: Fields) -> None:
    """Raises BadRow where the row names tools: none of the template's turns could call them."""
    if values.get("tools") not in (None, "", [], "[]"):
        raise BadRow("turns of tools")


def check_order(turns: list[Turn]) -> None:
    """Raises BadRow unless the turns are (system), user, assistant, user, assistant ..., and the last an answer."""
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    if not spoken or spoken[-1] != "assistant":
        raise BadRow("no answer")
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or any(turn["role"] == "system" for turn in turns[1:]):
        raise BadRow("turns out of order")


def longer_prompt(values: Fields, asked: list[Turn], place: str) -> list[Turn]:
    """The turns before an answer, of which `asked` stand in both sides; `prompt` may hold more of them, or fewer.

    Raises BadRow where it is another prompt.
    """
    if not asked:
        return read_prompt(values, place)
    prompt = as_turns(values["prompt"], "user", place) if values.get("prompt") else []
    own, sides = ([(turn["role"], turn["content"].strip()) for turn in turns] for turns in (prompt, asked))
    if own[-len(sides) :] == sides:
        return asked if len(own) == len(sides) else prompt
    if own not in (sides[: len(own)], sides[len(sides) - len(own) :]):
        raise BadRow("'prompt' that is not the one in chosen and rejected")
    return asked


def read_pair(values: Fields, place: str) -> tuple[list[Turn], str, str]:
    """Prompt turns, chosen answer, rejected answer. The prompt stands in columns of its own, in both sides, or both.

    Raises BadRow: an answer is missing or empty, the sides have different prompts, `prompt` is another one than
    theirs, or there is none.
    """
    values = present(values)
    check_tools(values)
    chosen, rejected = (as_turns(values.get(side), "assistant", place) for side in ("chosen", "rejected"))
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise BadRow("last turn is not an answer")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("different prompts in chosen and rejected")
    turns = with_system(longer_prompt(values, chosen[:-1], place), values)
    if not turns or turns[-1]["role"] != "user":
        raise BadRow("prompt does not end with a question")
    check_order([*turns, chosen[-1]])
    return turns, chosen[-1]["content"], rejected[-1]["content"]
