"""The weights of a checkpoint as they lie on the disk: all there, finite, each stored once, in the type asked for."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_weights(folder: Path, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Name -> tensor in the type it is stored in, for each weight of the model that `config` describes.

    A model whose output weight is its embedding has it once: an equal copy, as DeepSpeed leaves beside it under
    ZeRO-2 in bf16, is left out.

    Raises SystemExit, naming the weight, when one is missing, unknown, of another shape or type, or not finite, and
    when what the config calls one weight is stored as two different ones.
    """
    found = load_all(folder)
    for name, weight in found.items():
        if DTYPE_NAMES.get(weight.dtype) is None:
            raise SystemExit(
                f"'{folder}' stores {name} as {weight.dtype}; known types are {', '.join(DTYPES)}. Export the "
                "checkpoint that it was made from."
            )
        if not torch.isfinite(weight).all():
            raise SystemExit(f"'{folder}': the weight {name} is not finite. Take an earlier checkpoint.")
    if config.tie_word_embeddings:
        drop_copy(folder, found)
    expected = shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise SystemExit(
                f"'{folder}' lacks the weight {name}, which the model of its config.json has. Take another "
                "checkpoint; an adapter must be merged into its model first."
            )
        if tuple(found[name].shape) != shape:
            raise SystemExit(
                f"'{folder}' stores {name} as {tuple(found[name].shape)}, but by its config.json it is {shape}. The "
                "two files are of different models; fetch both again."
            )
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise SystemExit(
            f"'{folder}' stores {unknown[0]}, which the model of its config.json does not have. The two files are of "
            "different models; fetch both again."
        )
    return {name: found[name] for name in expected}


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                if name in found:
                    raise SystemExit(f"{file} stores {name}, which another file beside it does too. Remove one.")
                found[name] = stored.get_tensor(name)
    return found


def drop_copy(folder: Path, found: dict[str, torch.Tensor]) -> None:
    """Take the output weight out, where it stands beside the embedding that it equals."""
    if OUTPUT not in found or EMBEDDING not in found:
        return
    output, embedding = found.pop(OUTPUT), found[EMBEDDING]
    if output.shape != embedding.shape or not torch.equal(output, embedding):
        raise SystemExit(
            f"'{folder}' says in config.json that the output weight is the embedding (tie_word_embeddings: true), but "
            f"stores {OUTPUT} and {EMBEDDING} with different values. A program that loads it would drop one of them "
            "without a word. Set tie_word_embeddings to false if both were trained, or take another checkpoint."
        )


def shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of the model's weights, each once; no memory is taken for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def common_dtype(weights: dict[str, torch.Tensor]) -> torch.dtype:
    """The type that holds all of the weights exactly."""
    dtypes = [weight.dtype for weight in weights.values()]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def check_range(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Raises SystemExit for a weight that is too large for the type; fp16 ends at 65,504."""
    for name, weight in weights.items():
        if weight.dtype != dtype and not torch.isfinite(weight.to(dtype)).all():
            raise SystemExit(
                f"The weight {name} reaches {weight.abs().max().item():.3g}, more than {DTYPE_NAMES[dtype]} can hold "
                f"({torch.finfo(dtype).max:.3g}). Export in bf16 or fp32: --dtype bf16."
            )
