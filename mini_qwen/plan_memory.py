"""The planner's memory: what a GPU holds when a training step is at its peak.

Bytes are worked out from what the installed libraries do: transformers' eager Qwen2 with SDPA attention, torch's
autograd and autocast, DeepSpeed's ZeRO. bench/plan.py compares them with the memory of real steps.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import Qwen2Config

from mini_qwen.linear_head import CHUNK_NUMBERS, chunks
from mini_qwen.plan_parameters import count_parameters, layer_matrices, product_weights, widths

# autocast: weights cast for each product: fp32 ones (one process, DDP), low_memory's in fp16. half: weights of 2 bytes
# that are not (DeepSpeed, low_memory in bf16).
Compute = Literal["fp32", "autocast", "half"]
LossHead = Literal["chunked", "full"]

# DeepSpeed 0.19, runtime/zero/config.py: reduce_bucket_size in elements, allocated whole whatever the model's size,
# and stage3_max_live_parameters, below which a gathered weight is kept.
BUCKET_ELEMENTS = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Step:
    """What one process computes between two moments at which its activations are gone: a micro-batch."""

    rows: int  # sequences, both sides of each pair counted
    length: int  # tokens of a row, padding included
    compute: Compute
    accumulation: int = 1  # micro-batches a step
    masked: bool = False  # rows hold several documents, or padding: SDPA gets a mask
    checkpointing: bool = False  # activation_checkpointing
    loss_head: LossHead = "chunked"
    half_weights: bool = False  # low_memory: 2 bytes, though in fp16 they are cast for each product
    chunk_numbers: int = CHUNK_NUMBERS["cuda"]  # in the logits that exist at a time
    row_kernels: bool = True  # Triton is there: probabilities need no place of their own

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def width(self) -> int:
        """Bytes of a number in a matrix product."""
        return 4 if self.compute == "fp32" else 2

    @property
    def weight_width(self) -> int:
        return 2 if self.half_weights or self.compute == "half" else 4

    @property
    def gradient_width(self) -> int:
        """Bytes of a weight's gradient: those of `low_memory` in fp16 are fp32."""
        return 2 if self.compute == "half" else 4

    @property
    def stream_width(self) -> int:
        """Bytes of a number in the residual stream, which autocast leaves in fp32."""
        return 2 if self.compute == "half" else 4


def norm_bytes(hidden: int, compute: Compute) -> int:
    """RMSNorm keeps its input in fp32, the normalised copy in the stream's type, and one fp32 number, a token."""
    return hidden * (6 if compute == "half" else 8) + 4


def layer_bytes(config: Qwen2Config, step: Step) -> int:
    """Bytes that autograd saves of one layer for each token.

    Two norms; what q, k and v are made of, and gate and up (autocast casts it anew for each of the five); queries,
    keys, values and the attention's result with fp32 sums of each head; gate, its SiLU, up, and their product. RoPE
    and the residual sums save nothing. A mask makes SDPA repeat keys and values for all heads, and each layer keeps
    its own copy of the mask in the compute type: a row's length of numbers for each token.

    The full recipe, masked, a token: half 65.6 kB, autocast 75.8 kB, fp32 123.0 kB.
    """
    hidden, queries, keys, inner = widths(config)
    inputs = {"fp32": 8, "autocast": 10, "half": 4}[step.compute] * hidden
    seen = 2 * (queries - keys) + step.length if step.masked else 0
    products = step.width * (2 * queries + 2 * keys + 4 * inner + seen)
    return 2 * norm_bytes(hidden, step.compute) + inputs + products + 4 * config.num_attention_heads


def activation_bytes(config: Qwen2Config, step: Step) -> int:
    """Bytes that autograd holds as the backward pass begins, without the loss: all layers and the last norm.

    With checkpointing only what enters each layer.
    """
    stream = config.hidden_size * step.stream_width
    layer = stream if step.checkpointing else layer_bytes(config, step)
    return step.tokens * (config.num_hidden_layers * layer + norm_bytes(config.hidden_size, step.compute))


def head_bytes(config: Qwen2Config, step: Step) -> int:
    """Bytes of logits, and of the gradients formed from them, when they are most.

    full: the head's input; log-probabilities, their gradient and the logits' gradient together, each fp32 [tokens,
    vocabulary]; later the logits' gradient beside the head's. chunked (mini_qwen/linear_head.py): of a chunk its
    logits in the compute type, without Triton its probabilities in fp32; the fp32 gradient of the head's matrix; the
    head's input, its labelled tokens and their gradient.

    12 x 1,024 tokens of 151,936 and hidden size 1,024: full 22.4 GB; chunked, half, 1.26 GB.
    """
    logits, matrix = step.tokens * config.vocab_size, 4 * config.vocab_size * config.hidden_size
    hidden = step.tokens * config.hidden_size
    if step.loss_head == "full":
        return max(12 * logits, 4 * logits + matrix) + step.width * hidden
    chunk = chunks(step.tokens, max(1, step.chunk_numbers // config.vocab_size))[0].stop * config.vocab_size
    a_logit = step.width if step.row_kernels else step.width + 4
    return a_logit * chunk + matrix + (3 * step.stream_width + step.width) * hidden


def cast_bytes(config: Qwen2Config, step: Step) -> int:
    """Bytes of weights that autocast has cast for their products.

    Of all weights, for autocast keeps casts of fp32 weights until the forward pass ends, and autograd those of any.
    With checkpointing 2-byte weights have neither: then those of the head, and of one layer at a time.
    """
    if step.compute != "autocast":
        return 0
    if step.half_weights and step.checkpointing:
        return 2 * (layer_matrices(config) // config.num_hidden_layers + config.vocab_size * config.hidden_size)
    return 2 * product_weights(config)


def layer_moment_bytes(config: Qwen2Config, step: Step) -> int:
    """Bytes beside the activations as the backward pass goes through a layer.

    The gradients of its stream and inside its MLP; with checkpointing the layer's own activations, computed anew; of
    a tied head the gradient of its matrix, which waits for the embedding's.
    """
    waiting = 4 * config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    again = layer_bytes(config, step) if step.checkpointing else 0
    gradients = 2 * config.hidden_size * step.stream_width + 2 * config.intermediate_size * step.width
    return step.tokens * (again + gradients) + waiting


def memory(config: Qwen2Config, step: Step, state_bytes: int, zero: int = 0, gpus: int = 1) -> dict[str, int]:
    """Bytes on one GPU by part at the moment when they are most: in the loss, a layer's backward pass, or the update.

    Args:
        state_bytes: of the optimizer for all parameters: 8 each for AdamW.
        zero: 0: one process or DDP; 1, 2, 3: DeepSpeed, which adds fp32 masters, shared like the optimizer's state.

    Gradients of earlier micro-batches lie beside the activations of the last. With one micro-batch a step they only
    come as the activations go. DDP keeps buckets as large as the gradients. DeepSpeed keeps one of BUCKET_ELEMENTS
    through the backward pass, casts its share of the gradients to fp32 for the update, and does not free gathered
    weights of ZeRO-3 below LIVE_PARAMETERS.

    The full recipe, ZeRO-2 on 6 GPUs: weights 2.00 GB, masters and AdamW 2.00 GB, gradients 0.33 GB.
    """
    parameters = count_parameters(config)
    width = step.weight_width
    masters = 4 * parameters if zero else 0
    gradients = step.gradient_width * parameters // (gpus if zero >= 2 else 1)
    buckets = BUCKET_ELEMENTS * width if zero else 4 * parameters * (gpus > 1)
    gathered = width * min(parameters, LIVE_PARAMETERS) if zero == 3 else 0
    backward = {
        "weights": width * parameters // (gpus if zero == 3 else 1),
        "weights cast to 2 bytes": cast_bytes(config, step),
        "gradients": gradients if step.accumulation > 1 else 0,
        "optimizer": (state_bytes + masters) // (gpus if zero else 1),
        "activations": activation_bytes(config, step),
        "loss head": 0,
        "a layer's backward pass": 0,
        "communication": buckets + gathered,
    }
    update = dict.fromkeys(backward, 0) | {
        "weights": backward["weights"],
        "optimizer": backward["optimizer"],
        "gradients": gradients + masters // gpus,
        "communication": 0 if zero else buckets,
    }
    in_loss = backward | {"loss head": head_bytes(config, step)}
    in_layer = backward | {"a layer's backward pass": layer_moment_bytes(config, step)}
    return max(in_loss, in_layer, update, key=lambda parts: sum(parts.values()))
