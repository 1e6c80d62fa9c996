"""The chat template for programs that are not ours.

mini_qwen encodes each content by itself, and text that spells a control token stays text. Other programs render a
conversation to one string and tokenise that, control tokens included: a question with `<|im_end|>` in it would end
itself and could go on as the system. So the safe template puts a blank into what looks like a control token,
`< |im_end|>`. Every other conversation is rendered to the very text that mini_qwen's template makes.
"""

import re
from collections.abc import Iterable

from mini_qwen.chat import TEMPLATE

CONTENT = "message.content"
TURN = "{%- for message in messages -%}\n"

# Only transformers knows the marks of what is trained; without them the template renders the same text.
PLAIN = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", TEMPLATE)


def safe_template(control_tokens: Iterable[str]) -> str:
    """Jinja that renders a conversation so that no content becomes one of the control tokens.

    Raises SystemExit for a control token of one character, into which nothing can be put.
    """
    lines = [f"    {{%- set content = {CONTENT} -%}}"]
    for token in control_tokens:
        if len(token) < 2:
            raise SystemExit(
                f"The tokenizer has the control token {token!r}, of one character: no text that holds it could be "
                "told apart from it. Train a tokenizer without it."
            )
        disarmed = f"{token[0]} {token[1:]}"
        lines.append(f"    {{%- set content = content | replace({quote(token)}, {quote(disarmed)}) -%}}")
    head, turn, rest = PLAIN.partition(TURN)
    assert turn and CONTENT in rest
    return head + turn + "\n".join(lines) + "\n" + rest.replace(CONTENT, "content")


def quote(text: str) -> str:
    """As a string of Jinja."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
