"""DeepSpeed's checkpoints without running code from them: tensors, plain values, and the classes named here."""

from enum import Enum
from typing import Any

import torch


def enum_member(kind: type[Enum], name: str) -> Enum:
    """`getattr` for the files of Python 3.11.0 to 3.11.3, which pickle a member of an enum as that; nothing else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise ValueError(f"the file asks for {name!r} of {kind!r}, which is no enum")
    return kind[name]


def load_deepspeed_safely() -> None:
    """Make DeepSpeed read its files with `weights_only` and an explicit list of its own classes.

    As it comes, DeepSpeed 0.19 unpickles whatever a checkpoint holds, which runs the code that a forged one brings.
    Every class on the list only holds numbers. What else stands in a file is refused by torch, with its name.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    harmless = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler, (enum_member, "builtins.getattr")]

    def load(self: TorchCheckpointEngine, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location=map_location, weights_only=True)

    TorchCheckpointEngine.load = load
