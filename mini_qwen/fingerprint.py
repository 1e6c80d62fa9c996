"""What makes two executions the same run: the data, the model's form, the recipe's numbers, the machine's layout."""

import dataclasses
import difflib
import hashlib
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer

from mini_qwen.blocks import Blocks
from mini_qwen.cache import DIGEST, hash_of, tokenizer_hash
from mini_qwen.circumstances import versions

# Settings that decide when something is written, shown or measured, or that stand under a name of their own.
NEUTRAL_PREFIXES = ("logging_", "log_", "eval_", "save_", "hub_", "push_", "trackio_", "report_", "include_", "do_")
NEUTRAL_PREFIXES += ("ddp_", "fsdp")
NEUTRAL = {"output_dir", "per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics", "disable_tqdm"}
NEUTRAL |= {"run_name", "project", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "debug"}
NEUTRAL |= {"resume_from_checkpoint", "allow_changes", "prepare_only", "needs_gpu", "local_rank", "use_cpu"}
NEUTRAL |= {"skip_memory_metrics", "restore_callback_states_from_checkpoint", "deepspeed"}
NEUTRAL |= {f"dataloader_{name}" for name in ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")}
NEUTRAL |= {"dataloader_multiprocessing_context", "dataloader_in_order"}
NEUTRAL |= {"parallelism_config", "torch_empty_cache_steps", "bf16", "fp16"}
# Stand in the optimizer's state and come back with it, whatever the recipe says.
IN_CHECKPOINT = {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "low_memory"}
# Of a config: who wrote it and where it lies.
FOREIGN_CONFIG = {"transformers_version", "_name_or_path", "dtype", "use_cache", "architectures", "training_stage"}


def make_fingerprint(trainer: Trainer) -> dict[str, Any]:
    """Names and values that a run and its continuation have in common, as JSON holds them.

    Equal fingerprints and the same checkpoint give the same weights, bit for bit, on one kind of machine.
    """
    args, model = trainer.args, trainer.model
    found = {
        "data": hash_rows(trainer.train_dataset),
        "data_rows": len(trainer.train_dataset),
        "tokenizer": tokenizer_hash(trainer.processing_class),
        "attention": model.config._attn_implementation,
        "device": args.device.type,
        "processes": args.world_size,
        "distribution": describe_distribution(trainer),
    }
    if model.config.training_stage != "pt":
        found["start_weights"] = hash_weights(model)
    config = {key: value for key, value in model.config.to_dict().items() if key not in FOREIGN_CONFIG}
    found |= {f"model.{key}": plain(value) for key, value in config.items()}
    found |= {
        field.name: plain(getattr(args, field.name))
        for field in dataclasses.fields(args)
        if field.name not in NEUTRAL and not field.name.startswith(NEUTRAL_PREFIXES)
    }
    return found | {f"versions.{name}": version for name, version in versions().items()}


def plain(value: Any) -> Any:
    """As it comes back from JSON: enums by their value, tuples as lists, other objects in words."""
    value = getattr(value, "value", value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def describe_distribution(trainer: Trainer) -> str:
    plugin = trainer.args.deepspeed_plugin
    if plugin is not None:
        return f"DeepSpeed ZeRO-{plugin.zero_stage}"
    if trainer.args.world_size == 1:
        return "none"
    return trainer.args.distributed_state.distributed_type.value


def hash_rows(rows: Blocks | Dataset) -> str:
    """Of all tokens, and of which of them stand together and are learnt; in their order.

    Of blocks by the hashes that their preparation left, so that nothing is read again; of pairs by their columns.
    """
    blocks = rows if isinstance(rows, Blocks) else getattr(rows, "blocks", None)
    if blocks is not None:
        digests = [(folder / DIGEST).read_text() for folder in (blocks.folder.parent, *blocks.store.folders)]
        return hash_of([blocks.isolate, *digests])
    digest = hashlib.sha256()
    names = sorted(name for name in rows.column_names if name.endswith("_ids"))
    assert names, rows.column_names
    for name in names:
        for chunk in rows.data.column(name).chunks:
            for numbers in (pc.list_value_length(chunk), chunk.flatten()):
                digest.update(name.encode() + np.ascontiguousarray(numbers.to_numpy(zero_copy_only=False)).data)
    return digest.hexdigest()[:16]


def hash_weights(model: PreTrainedModel) -> str:
    """Of all parameters: 1.8 GB a second on one core."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def check_same_run(saved: dict[str, Any], now: dict[str, Any], place: str, allowed: list[str]) -> None:
    """Raises SystemExit when the fingerprints differ in a name that is not `allowed`, with both values.

    Allowing `versions` or `model` allows all names that begin so.
    """
    names = sorted(saved.keys() | now.keys())
    groups = {name.partition(".")[0] for name in names if "." in name}
    for name in allowed:
        if name not in {*names, *groups}:
            near = difflib.get_close_matches(name, [*names, *groups], n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise SystemExit(f"allow_changes names '{name}', which no run has.{hint}")
    differing = [name for name in names if saved.get(name) != now.get(name)]
    fixed = sorted(IN_CHECKPOINT.intersection(differing, allowed))
    if fixed:
        raise SystemExit(
            f"{', '.join(fixed)} cannot change when a run goes on: the checkpoint brings its optimizer. Go back to "
            f"{', '.join(f'{name} {saved[name]!r}' for name in fixed)}, or begin a new run."
        )
    differing = [name for name in differing if name not in allowed and name.partition(".")[0] not in allowed]
    if differing:
        values = "; ".join(f"{name} was {saved.get(name)!r}, is {now.get(name)!r}" for name in differing)
        raise SystemExit(
            f"This is not the run that wrote {place}: {values}. Go back to those values, or name what is meant to "
            f"change: --allow_changes {' '.join(differing)}"
        )
