"""AdamW in five bytes a weight: bf16 weights with a further byte of precision, and moments of eight bits.

fp32 masters, moments and gradients are 16 bytes a weight; here they are 7, gradients included:

    2   weights, bf16, which the model computes with
    1   eight bits more of each weight, so that updates far below bf16's steps are kept
    2   two moments of 8 bits, and 8 bytes a block of 256 for their scales
    2   gradients, bf16, the sum over a step's micro-batches rounded without bias

Every rounding is at random, and right on average. Without the further byte that is not enough at a learning rate of
5e-7: bf16's steps near 0.02 are 250 times the update, and the rounding alone carries the weights four times as far as
the training does (bench/low_memory.py).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from mini_qwen.rounding import BLOCK, MEAN, SQUARE, decode, encode, join, round_to_bf16, split

CHUNK = 2**20  # weights that are updated at a time: what is computed in fp32 stays below 0.1 GB


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) on bf16 weights, computed in fp32.

    A state holds for each weight, in rows of BLOCK: `low` int8, the byte behind the bf16 weight; `mean` int8 and
    `square` uint8, the moments, with `mean_scale` and `square_scale` fp32 for each row. Vectors, and matrices whose
    size is no multiple of BLOCK, have fp32 moments, and rows of one.

    Gradients may be bf16 or fp32. Raises ValueError for weights that are not bf16.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        wrong = {str(weight.dtype) for group in self.param_groups for weight in group["params"]} - {"torch.bfloat16"}
        if wrong:
            raise ValueError(f"LowMemoryAdamW is for bf16 weights, not {', '.join(sorted(wrong))}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    if not state:
                        state.update(new_state(weight))
                    state["step"] += 1
                    update(weight, state, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved, bit for bit: torch's own casts what it loads to the weights' type."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, saved in state_dict["state"].items():
            weight = weights[index]
            self.state[weight] = {
                name: value.to(weight.device, copy=True) if isinstance(value, torch.Tensor) else value
                for name, value in saved.items()
            }


def has_blocks(weight: torch.Tensor) -> bool:
    return weight.ndim > 1 and weight.numel() % BLOCK == 0


def state_bytes(weights: Iterable[torch.Tensor]) -> int:
    """Of all states: 3 bytes a weight and two scales a block, or 9 bytes a weight."""
    return sum(
        3 * weight.numel() + 8 * weight.numel() // BLOCK if has_blocks(weight) else 9 * weight.numel()
        for weight in weights
    )


def new_state(weight: torch.Tensor) -> dict[str, Any]:
    in_blocks = has_blocks(weight)
    low = torch.zeros_like(weight, dtype=torch.int8).view(-1, BLOCK if in_blocks else 1)
    if not in_blocks:
        moments = {name: torch.zeros_like(low, dtype=torch.float32) for name in ("mean", "square")}
        return {"step": 0, "low": low} | moments
    scale = low.new_zeros((len(low), 1), dtype=torch.float32)
    return {
        "step": 0,
        "low": low,
        "mean": torch.zeros_like(low),
        "square": torch.zeros_like(low, dtype=torch.uint8),
        "mean_scale": scale,
        "square_scale": scale.clone(),
    }


def update(weight: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of one weight's state and of the weight, CHUNK numbers at a time."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    corrections = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
    shape = state["low"].shape
    all_high, all_gradients = weight.view(shape), weight.grad.reshape(shape)
    size = max(1, CHUNK // shape[1])
    for start in range(0, shape[0], size):
        rows = slice(start, start + size)
        part = {name: value[rows] for name, value in state.items() if name != "step"}
        gradient = all_gradients[rows].float()
        mean, square = read_moments(part)
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        full = join(all_high[rows], part["low"])
        full.mul_(1 - rate * group["weight_decay"])
        full.addcdiv_(mean, (square / corrections[1]).sqrt_().add_(group["eps"]), value=-rate / corrections[0])
        high, low = split(full)
        all_high[rows].copy_(high)
        part["low"].copy_(low)
        write_moments(part, mean, square)


def read_moments(part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32, to be changed in place: the state's own where it has them in fp32."""
    if "mean_scale" not in part:
        return part["mean"], part["square"]
    mean = decode(part["mean"].abs(), part["mean_scale"], MEAN) * part["mean"].sign()
    return mean, decode(part["square"], part["square_scale"], SQUARE)


def write_moments(part: dict[str, torch.Tensor], mean: torch.Tensor, square: torch.Tensor) -> None:
    if "mean_scale" not in part:
        return
    codes, scale = encode(mean.abs(), MEAN, lowest=0)
    part["mean"].copy_(codes * mean.sign())
    part["mean_scale"].copy_(scale)
    codes, scale = encode(square, SQUARE, lowest=1)
    part["square"].copy_(codes)
    part["square_scale"].copy_(scale)


def low_memory_optimizer(model: PreTrainedModel, args: TrainingArguments) -> LowMemoryAdamW:
    """For a bf16 model; matrices get the recipe's weight decay. Also settles how the model sums up its gradients.

    In bf16 where it computes in bf16. fp16 needs them in fp32, 2 bytes a weight more: they are scaled up, and the
    scaler cannot look at bf16 on a GPU.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        if args.precision == "fp16":
            weight.grad_dtype = torch.float32
        else:
            weight.register_hook(adds_without_bias(weight))
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2]},
    ]
    return LowMemoryAdamW(groups, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)


def adds_without_bias(weight: torch.nn.Parameter) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook on a leaf that adds to its bf16 gradient, rounded at random.

    Rounded to the nearest, the sum over 1,024 micro-batches came out 2% too short and 15% off, for its steps become
    larger than what is added; so it is 4% off, and not too short (bench/low_memory.py).
    """

    @torch.no_grad()
    def add(gradient: torch.Tensor) -> torch.Tensor:
        if weight.grad is None:
            return gradient
        total, addend = weight.grad.view(-1), gradient.reshape(-1)
        for start in range(0, len(total), CHUNK):
            part = slice(start, start + CHUNK)
            total[part] = round_to_bf16(total[part].float() + addend[part].float())
        return gradient.new_zeros(()).expand_as(gradient)  # autograd adds what a hook returns

    return add


@torch.no_grad()
def widen(model: PreTrainedModel, optimizer: LowMemoryAdamW) -> None:
    """Make the model fp32, with the further byte of its weights, to be written down. It cannot be trained on then."""
    optimizer.zero_grad()
    for weight in model.parameters():
        assert weight.dtype == torch.bfloat16
        low = optimizer.state[weight]["low"].view_as(weight) if weight in optimizer.state else None
        weight.data = weight.data.float() if low is None else join(weight.data, low)
