"""Options: the log-probability of each of several continuations of one prompt, which is computed once for all."""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

from mini_qwen.scoring import MAX_LOGITS, Score

MAX_CACHE = 2**28  # numbers in the keys and values of one batch of options: 1 GB in fp32

Ids = Sequence[int]


class Rated(NamedTuple):
    score: Score
    is_greedy: bool  # every token of the option is the most probable one in its place


def score_options(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    options: Sequence[Sequence[Ids]],
    desc: str,
    batch_size: int = 8,
) -> list[list[Score]]:
    """For each prompt and each of its options, log p(option | prompt): the sum over the option's tokens, in nats.

    Prompts [5, 6, 7] and [8, 9], the first with the options [1], [1, 2] and [3], the second with [4, 2]:

        first pass     5 6 7      its last logits give p(1), p(3) and, for the second prompt, p(4)
                       . 8 9
        second pass    5 6 7 | 1  given the keys and values of the first pass: p(2), twice
                       . 8 9 | 4

    Options of one token need no second pass. The logits of a prompt exist for its last token only.

    Args:
        prompts: token ids, at least one each; where nothing stands before the options, the end-of-text token.
        options: for each prompt its options, at least one token each; their number may differ.
        batch_size: prompts in a batch. The scores do not depend on it, rounding aside.

    Raises:
        ValueError: a prompt or an option without tokens, or not as many lists of options as prompts.
        SystemExit: a log-probability is not a number.
    """
    return [[rated.score for rated in group] for group in rate_options(model, prompts, options, desc, batch_size)]


@torch.no_grad()
def rate_options(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    options: Sequence[Sequence[Ids]],
    desc: str,
    batch_size: int = 8,
) -> list[list[Rated]]:
    """As `score_options`, and whether the model would write the option by itself."""
    check_tokens(prompts, options)
    rated: list[list[Rated]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    progress = tqdm(total=len(prompts), desc=desc, unit="prompts", leave=False)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = iter(score_batch(model, [prompts[index] for index in chosen], [options[index] for index in chosen]))
        for index in chosen:
            for number, option in enumerate(options[index]):
                total, is_greedy = next(found)
                if math.isnan(total):
                    raise SystemExit(
                        f"{desc}: the log-probability of option {number} of prompt {index} is not a number. The "
                        "weights of this checkpoint are not finite; take an earlier one."
                    )
                rated[index].append(Rated(Score(total, len(option)), is_greedy))
        progress.update(len(chosen))
    progress.close()
    return rated


def check_tokens(prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]) -> None:
    if len(prompts) != len(options):
        raise ValueError(f"{len(prompts)} prompts, but {len(options)} lists of options")
    for index, (prompt, group) in enumerate(zip(prompts, options, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {index} has no token; give the end-of-text token where nothing comes before")
        for number, option in enumerate(group):
            if not len(option):
                raise ValueError(f"option {number} of prompt {index} has no token")


def score_batch(model: PreTrainedModel, prompts: list[Ids], options: list[Sequence[Ids]]) -> list[tuple[float, bool]]:
    """The sum of each option and whether it is the most probable way on; those of the first prompt first."""
    ids, mask = filled(prompts, left=True, device=model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1].float()
    rows = [(row, option) for row, group in enumerate(options) for option in group]
    owners = torch.tensor([row for row, _ in rows], dtype=torch.long, device=model.device)
    first = torch.tensor([option[0] for _, option in rows], dtype=torch.long, device=model.device)
    totals = torch.log_softmax(logits, dim=-1)[owners, first].double()
    greedy = logits.argmax(dim=-1)[owners] == first
    longer = sorted((at for at, (_, option) in enumerate(rows) if len(option) > 1), key=lambda at: len(rows[at][1]))
    for part in parts(model, output.past_key_values, [len(rows[at][1]) for at in longer]):
        at = torch.tensor(longer[part], device=model.device)
        rest = [rows[place][1] for place in longer[part]]
        more, still_greedy = score_rest(model, output.past_key_values, mask, owners[at], rest)
        totals[at] += more
        greedy[at] &= still_greedy
    return list(zip(totals.tolist(), greedy.tolist(), strict=True))


def score_rest(
    model: PreTrainedModel, cache: Cache, mask: torch.Tensor, owners: torch.Tensor, options: list[Ids]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of options with two tokens or more, all but the first, given their prompts' keys: sums [n] fp64, flags [n]."""
    ids, option_mask = filled([option[:-1] for option in options], left=False, device=model.device)
    targets, _ = filled([option[1:] for option in options], left=False, device=model.device)
    mask = mask[owners]
    cache = copy.deepcopy(cache)  # the model extends the one it gets, and the next part needs the prompts' own
    cache.batch_select_indices(owners)
    logits = model(
        input_ids=ids,
        attention_mask=torch.cat([mask, option_mask], dim=1),
        position_ids=mask.sum(dim=1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    loss = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    greedy = ((logits.argmax(dim=-1) == targets) | (option_mask == 0)).all(dim=1)
    return -(loss * option_mask).double().sum(dim=1), greedy


def parts(model: PreTrainedModel, cache: Cache, lengths: list[int]) -> Iterator[slice]:
    """Cut options of these rising lengths into batches whose logits, keys and values stay within the memory."""
    kept = sum(layer.keys[0].numel() + layer.values[0].numel() for layer in cache.layers)
    end = len(lengths)
    while end:
        size = min(MAX_LOGITS // (model.config.vocab_size * lengths[end - 1]), MAX_CACHE // kept)
        start = max(0, end - max(1, size))
        yield slice(start, end)
        end = start


def filled(rows: list[Ids], left: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one tensor, filled up on one side with 0, and 1 where a token stands. Both [rows, longest]."""
    longest = max(len(row) for row in rows)
    gaps = [[0] * (longest - len(row)) for row in rows]
    ids = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    mask = [gap + [1] * len(row) if left else [1] * len(row) + gap for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def choose(scores: Sequence[Score], lengths: Sequence[int] | None = None, prior: Sequence[Score] | None = None) -> int:
    """The number of the best option; of equal ones the first.

    Args:
        lengths: of each option, the bytes of its text in UTF-8 or the tokens: divide the log-probability by it, so
            that a long option is not the worse for its length (lm-eval's `acc_norm` goes by its characters).
        prior: scores of the same options after a prompt that says nothing of the question. Subtracted, so that an
            option is not the better for being common: pointwise mutual information (Holtzman et al. 2021, "Surface
            Form Competition", arXiv:2104.08315).

    With p(yes | question) = 0.4, p(no | question) = 0.3 and, without the question, p(yes) = 0.8, p(no) = 0.1: "yes" is
    the more probable, "no" has become three times as probable through the question, "yes" half as probable.
    """
    values = [score.sum_log_prob for score in scores]
    if prior is not None:
        values = [value - before.sum_log_prob for value, before in zip(values, prior, strict=True)]
    if lengths is not None:
        values = [value / length for value, length in zip(values, lengths, strict=True)]
    return max(range(len(values)), key=values.__getitem__)
