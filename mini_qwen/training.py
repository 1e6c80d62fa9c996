"""What all training stages share in their settings: the machine's precision and device, and safe defaults."""

import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import TrainingArguments
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from trl import DPOConfig, SFTConfig

Precision = Literal["auto", "bf16", "fp16", "fp32"]
LossHead = Literal["auto", "chunked", "library"]
Attention = Literal[
    "auto", "eager", "sdpa", "varlen", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
]


def choose_precision(wanted: Precision = "auto") -> Precision:
    """The compute type: bf16 where the GPU has it, fp16 on older GPUs, fp32 on a CPU. Weights stay fp32 in all cases.

    A CPU computes in fp32 unless told otherwise, so that its results are the same on every machine.
    """
    if wanted != "auto":
        return wanted
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def choose_attention(
    wanted: Attention = "auto", precision: Precision = "fp32", packed: bool = True, dropout: float = 0.0
) -> Attention:
    """Flash attention where the GPU (compute capability 8 or newer) can, else `sdpa`.

    Of the flash attentions that are installed the newest that the GPU can; else `varlen`, torch's own, which is for
    packed rows of 16-bit numbers and knows no dropout.

    Raises SystemExit when `varlen` is asked for where it cannot be.
    """
    obstacles = {
        "pairs are padded, not packed": not packed,
        f"attention_dropout is {dropout}": dropout > 0,
        "precision is fp32, and it computes in bf16 or fp16": precision == "fp32",
    }
    if wanted == "varlen" and any(obstacles.values()):
        reason = next(reason for reason, stands in obstacles.items() if stands)
        raise SystemExit(f"attn_implementation: varlen is not possible here: {reason}. Leave the key out.")
    if wanted != "auto":
        return wanted
    capability = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if capability < 8 or precision == "fp32":
        return "sdpa"
    if capability == 9 and is_flash_attn_3_available():
        return "flash_attention_3"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    return "varlen" if packed and dropout == 0 else "sdpa"


@dataclass
class StageKeys:
    """Recipe keys that every training stage has beside those of its trainer."""

    needs_gpu: bool = False  # refuse to start on a machine without a GPU
    precision: Precision = "auto"
    loss_head: LossHead = "auto"  # chunked: ours; library: the full logits in PT, TRL's own head in SFT and DPO
    compile_layers: bool = False  # torch.compile for each layer: its small operations become one
    low_memory: bool = False  # 7 bytes a weight (fp16: 9) in place of 16, on one process: see mini_qwen/low_memory.py
    muon_learning_rate: float | None = None  # set: Muon for the matrices at this rate, AdamW for all else
    prepare_only: bool = False  # prepare the data, print the counts, and leave
    resume_from_checkpoint: bool | str | None = None  # a checkpoint folder; true: the newest one; auto: or none
    allow_changes: list[str] | None = None  # in what a resumed run may differ from the one that wrote the checkpoint

    # Our collators make the tensors; columns that the model's signature lacks must reach them.
    remove_unused_columns: bool = False
    # A loss that is not finite must be seen in the log, not filtered out of it.
    logging_nan_inf_filter: bool = False

    decided: ClassVar[dict[str, str]] = {  # keys that a recipe may not set, and what to set instead
        "bf16": "precision: bf16",
        "fp16": "precision: fp16",
        "use_cpu": "CUDA_VISIBLE_DEVICES= in the environment",
        "gradient_checkpointing": "activation_checkpointing",
        "torch_compile": "compile_layers: true",
        "torch_compile_backend": "compile_layers: true",
        "torch_compile_mode": "compile_layers: true",
        "bf16_full_eval": "precision: evaluation computes as training does",
        "fp16_full_eval": "precision: evaluation computes as training does",
        "enable_jit_checkpoint": "nothing: every run saves when it is asked to stop",
        "ignore_data_skip": "nothing: a resumed run goes on with the row behind the last one",
        "trust_remote_code": "nothing: no code is run that comes with a checkpoint",
    } | dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push")
        + ("hub_revision",),
        "nothing: upload the finished folder, 'hf upload REPOSITORY FOLDER', with the token of 'hf auth login'",
    )

    def __post_init__(self) -> None:
        if self.needs_gpu and not self.prepare_only and not torch.cuda.is_available():
            raise ValueError(
                "this recipe is written for a GPU (needs_gpu: true), and torch sees none here. For a first run on a "
                "CPU use the recipes in recipes/demo, or pass --needs_gpu false to run this one on the CPU."
            )
        self.started = time.time()
        if self.low_memory:
            self.check_low_memory()
        if self.muon_learning_rate is not None and (self.optim != TrainingArguments.optim or self.optim_args):
            raise ValueError(
                "muon_learning_rate brings its own optimizers; leave optim and optim_args out of the recipe, or set "
                "muon_learning_rate: null."
            )
        self.precision = choose_precision(self.precision)
        self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        self.use_cpu = not torch.cuda.is_available()
        self.dataloader_pin_memory = not self.use_cpu
        # Else accelerate takes the seed that torch's generator has at that moment, and DPO changes it on the way.
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        super().__post_init__()

    def check_low_memory(self) -> None:
        """Raises ValueError for keys that do not go with `low_memory`; settles the precision on a CPU."""
        if self.muon_learning_rate is not None or self.optim != TrainingArguments.optim:
            raise ValueError(
                "low_memory: true brings its own optimizer; leave muon_learning_rate and optim out of the recipe."
            )
        if self.load_best_model_at_end:
            raise ValueError(
                "low_memory: true cannot load_best_model_at_end: the weights' further byte is the optimizer's."
            )
        if self.precision == "auto" and not torch.cuda.is_available():
            self.precision = "bf16"
        if self.precision == "fp32":
            raise ValueError("low_memory: true holds bf16 weights; precision can be auto, bf16 or fp16, not fp32.")


@dataclass
class PTConfig(StageKeys, TrainingArguments):
    """Pretraining: the keys of transformers' TrainingArguments and ours."""


@dataclass
class AnswerConfig(StageKeys, SFTConfig):
    """Supervised fine-tuning: the keys of TRL's SFTConfig and ours."""

    gradient_checkpointing: bool | None = None  # TRL's default is on: 1.3 times slower where memory allows it off
    decided: ClassVar[dict[str, str]] = StageKeys.decided | dict.fromkeys(
        ("padding_free", "packing_strategy", "eval_packing", "completion_only_loss", "assistant_only_loss")
        + ("dataset_text_field", "dataset_num_proc", "dataset_kwargs", "shuffle_dataset", "chat_template_path")
        + ("eos_token", "pad_token", "pad_to_multiple_of", "truncation_mode"),
        "nothing: rows are prepared by mini_qwen.conversations, see docs/data.md",
    )

    def __post_init__(self) -> None:
        # Rows come prepared: tokenised, masked, shortened and packed by mini_qwen.conversations.
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()


@dataclass
class PreferenceConfig(StageKeys, DPOConfig):
    """Direct preference optimisation: the keys of TRL's DPOConfig and ours."""

    decided: ClassVar[dict[str, str]] = StageKeys.decided | dict.fromkeys(
        ("dataset_num_proc", "padding_free", "pad_token", "pad_to_multiple_of", "truncation_mode"),
        "nothing: pairs are prepared by mini_qwen.preferences, see docs/data.md",
    )
    decided["label_smoothing_factor"] = "label_smoothing"
    # The reference would be scored by layers that are not compiled, and differ from the policy in its last digits.
    decided["compile_layers"] = "nothing: layers are compiled in PT and SFT, where all batches have like sizes"
    gradient_checkpointing: bool | None = None
    train_sampling_strategy: str = "group_by_length"  # batches of pairs of like length, see mini_qwen/sampler.py
    precompute_ref_log_probs: bool = True  # one pass before training, so that no second model is held
