"""Ollama's Modelfile: the chat template in Go's template language, where to stop, and how mini_qwen's chat samples."""

from mini_qwen.chat import TEMPLATE, skeleton
from mini_qwen.evaluation import EvalData
from mini_qwen.export import Checkpoint
from mini_qwen.tokenizer import END_OF_TURN

ROLES = ("system", "user", "assistant")


def around(role: str) -> tuple[str, str]:
    """What the chat template writes before and behind the content of a turn.

    >>> around("user")
    ('<|im_start|>user\\n', '<|im_end|>\\n')
    """
    pieces = skeleton(TEMPLATE, (role,), False)
    at = next(number for number, piece in enumerate(pieces) if piece.turn == 0)
    return "".join(piece.text for piece in pieces[:at]), "".join(piece.text for piece in pieces[at + 1 :])


def go_template() -> str:
    """The chat template in Go's language, which has the same text for every turn but the name of its role."""
    before, behind = around("user")
    assert all(around(role) == (before.replace("user", role), behind) for role in ROLES)
    opening, _ = around("assistant")
    turn = before.replace("user", "{{ .Role }}") + "{{ .Content }}" + behind
    return "{{ range .Messages }}" + turn + "{{ end }}" + opening


def make_modelfile(checkpoint: Checkpoint, gguf_name: str) -> str:
    """A Modelfile beside the GGUF of that name. A checkpoint of the PT stage continues the prompt as it is.

    Ollama's own defaults would keep 40 tokens of the vocabulary, look back 64 tokens for repetitions, and read prompts
    beyond what the model has positions for.
    """
    sampling = EvalData(checkpoints=[]).chat_sampling()
    template = go_template() if checkpoint.speaks_chat else "{{ .Prompt }}"
    parameters = {
        "stop": f'"{END_OF_TURN}"',
        "num_ctx": checkpoint.config.max_position_embeddings,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": -1,  # as far as the context reaches
    }
    lines = [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    return "\n".join([f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""', *lines]) + "\n"
