"""mini_qwen/sampler.py: every row once, batches of like length, an order that the seed and the epoch decide."""

from pathlib import Path

import numpy as np
from conftest import MakeModel
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mini_qwen.preferences import PreferenceData, prepare_preferences
from mini_qwen.sampler import BATCHES_SORTED_TOGETHER, ByLength
from mini_qwen.trainers import PreparedDPOTrainer
from mini_qwen.training import PreferenceConfig

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = st.lists(st.integers(1, 1024), max_size=80)


def pad_share(lengths: np.ndarray, order: list[int], batch_size: int) -> float:
    batches = [lengths[order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return 1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)


@given(lengths=LENGTHS, batch_size=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_every_row_once_in_an_order_of_seed_and_epoch(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    sampler, twin = ByLength(lengths, batch_size, seed), ByLength(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    twin.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)
    assert order == list(twin) == list(twin)  # the generator's state is not that of the last use


@given(lengths=LENGTHS, batch_size=st.integers(1, 9))
def test_whole_batches_are_neighbours_in_length(lengths: list[int], batch_size: int) -> None:
    """Within one window, between the shortest and the longest row of a batch lies no row of another batch."""
    order = list(ByLength(lengths, batch_size, seed=1))
    whole = len(lengths) - len(lengths) % batch_size
    assert len(lengths) <= BATCHES_SORTED_TOGETHER * batch_size or batch_size == 1
    spans = sorted(
        (min(values), max(values))
        for start in range(0, whole, batch_size)
        if (values := [lengths[row] for row in order[start : start + batch_size]])
    )
    assert all(before[1] <= after[0] for before, after in zip(spans[:-1], spans[1:], strict=True)) or batch_size == 1


def test_epochs_and_seeds_differ_and_little_is_padding() -> None:
    lengths = np.random.default_rng(0).integers(20, 1024, 4000)
    sampler = ByLength(lengths.tolist(), 8, seed=42)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler) and first != list(ByLength(lengths.tolist(), 8, seed=43))
    shuffled = np.random.default_rng(1).permutation(len(lengths)).tolist()
    assert pad_share(lengths, first, 8) < 0.02 < 0.3 < pad_share(lengths, shuffled, 8)
    firsts = lengths[first[::8]]
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.2  # long batches do not follow long ones


def test_the_dpo_trainer_draws_pairs_by_length(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tiny_model: MakeModel
) -> None:
    data = PreferenceData(
        [str(ROOT / "mini_data/dpo/train-00000-of-00001.parquet")], cache_dir=str(tmp_path / "cache")
    )
    pairs, _, _ = prepare_preferences(data, tokenizer, max_length=512)
    made = {}
    for strategy in ("group_by_length", "random"):
        args = PreferenceConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=8,
            train_sampling_strategy=strategy,
            precompute_ref_log_probs=False,
            report_to=[],
        )
        model = tiny_model()
        trainer = PreparedDPOTrainer(
            model=model, ref_model=tiny_model(), args=args, train_dataset=pairs, processing_class=tokenizer
        )
        made[strategy] = pad_share(np.array(pairs["length"]), list(trainer._get_train_sampler()), 8)
    assert made["group_by_length"] < 0.5 * made["random"]
