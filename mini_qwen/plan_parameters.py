"""The planner's sizes: the parameters of a Qwen2 config, exact, and which of them multiply."""

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM


def empty_model(config: Qwen2Config, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Qwen2ForCausalLM._from_config(config, dtype=dtype)


def widths(config: Qwen2Config) -> tuple[int, int, int, int]:
    """Numbers a token has in the stream, in its queries, in its keys, and inside the MLP."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = head * config.num_key_value_heads
    return config.hidden_size, head * config.num_attention_heads, keys, config.intermediate_size


def layer_matrices(config: Qwen2Config) -> int:
    """Weights of all layers that multiply: q, k, v, o, gate, up and down."""
    hidden, queries, keys, inner = widths(config)
    return config.num_hidden_layers * hidden * (2 * queries + 2 * keys + 3 * inner)


def product_weights(config: Qwen2Config) -> int:
    """Weights that every token is multiplied with: the layers' matrices and the head, tied or not."""
    return layer_matrices(config) + config.vocab_size * config.hidden_size


def count_parameters(config: Qwen2Config) -> int:
    """Exact for any Qwen2 config: q, k and v have biases, o and the MLP none, each layer two norms and the end one.

    The full recipe: 151,936 x 1,024 (tied) + 48 x (2 x 1,024 x 1,024 + 2 x 1,024 x 256 + 3 x 1,024 x 4,864
    + 1,024 + 2 x 256 + 2 x 1,024) + 1,024 = 998,810,624.
    """
    hidden, queries, keys, _ = widths(config)
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    biases_and_norms = config.num_hidden_layers * (queries + 2 * keys + 2 * hidden) + hidden
    return embeddings + layer_matrices(config) + biases_and_norms
