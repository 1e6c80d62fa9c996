"""Training steps: today's libraries as the seed's scripts use them, and TRL's defaults, against ours; PT, SFT, DPO.

    python bench/step.py                          # about half an hour on two cores
    python bench/step.py --only pt --rounds 1

Vocabulary of 151,936 on real rows where they are, else on mini_data, and the demo's vocabulary. All variants of a
stage train on the same rows equally often, so that a ratio of seconds is one of real tokens, or pairs, a second. On a
GPU nothing is measured yet. Writes bench/results/step_STAGE.json for each.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

from tabulate import tabulate
from transformers.utils import logging

from bench.measurement import Facts, Variant, alternate, medians, processor
from bench.padding import MIXTURE
from bench.sources import MINI, SEED, read_turns, sample_files, tokenizer_path, write_conversations, write_texts
from bench.trainers import dpo, pt_naive, pt_ours, sft_ours, sft_seed, sft_trl
from mini_qwen.blocks import Blocks
from mini_qwen.circumstances import circumstances
from mini_qwen.conversations import ConversationData, prepare_conversations
from mini_qwen.documents import DocumentData, prepare_documents
from mini_qwen.model import SIZES
from mini_qwen.preferences import PreferenceData, prepare_preferences
from mini_qwen.rows import read_rows
from mini_qwen.tokenizer import load_tokenizer, train_tokenizer

RESULTS = Path(__file__).parent / "results"
WIDE = dict(zip(SIZES, (128, 4, 4, 2, 384, 151_936), strict=True))  # Qwen's vocabulary, all else small
DEMO = dict(zip(SIZES, (128, 4, 4, 2, 384, 1024), strict=True))  # recipes/demo/pt.yaml
LIBRARY = {"loss_head": "library"}
TRL_DPO = LIBRARY | {"precompute_ref_log_probs": False, "train_sampling_strategy": "random"}


def place_tokenizer(folder: Path) -> str:
    """Qwen2.5's, copied to where the variants look for it."""
    load_tokenizer(tokenizer_path()).save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def documents(folder: Path, block_size: int, num_blocks: int, tokenizer: str, texts: str) -> Facts:
    """Blocks of pretraining in `folder`/blocks."""
    data = DocumentData(train_files=[texts], block_size=block_size, eval_rows=0, cache_dir=str(folder / "cache"))
    blocks, _, ledger = prepare_documents(data, load_tokenizer(tokenizer), SEED)
    return use(blocks.folder, folder / "blocks", num_blocks) | {"tokens_of_corpus": ledger.tokens_trained}


def use(source: Path, place: Path, number: int | None = None) -> Facts:
    """Make the prepared blocks of `source`, or the first of them, those of `place`."""
    layout = json.loads((source / "blocks.json").read_text(encoding="utf-8"))
    layout["parts"] = [str((source / part).resolve()) for part in layout["parts"]]
    place.mkdir()
    (place / "blocks.json").write_text(json.dumps(layout), encoding="utf-8")
    (place / "spans").write_bytes((source / "spans").read_bytes())
    entries = (source / "table").read_bytes()
    (place / "table").write_bytes(entries if number is None else entries[: number * 16])
    blocks = Blocks(place)
    return {"rows": len(blocks), "tokens": sum(len(block["input_ids"]) for block in blocks)}


def measure_stage(variants: dict[str, Variant], folder: Path, rounds: int, **shared: object) -> Facts:
    """Medians of each variant, and how many times faster "ours" is than each other, and its share of their memory."""
    measured = alternate(variants, rounds, folder, **shared)
    middle = medians(measured)
    ours = middle["ours"]
    ratios = {
        name: {
            "times_faster_is_ours": round(facts["wall_s"] / ours["wall_s"], 2),
            "cpu_times_less": round(facts["cpu_s"] / ours["cpu_s"], 2),
            "memory_share_of_ours": round(ours["peak_growth_mb"] / facts["peak_growth_mb"], 2),
        }
        for name, facts in middle.items()
        if name != "ours"
    }
    return {"ratios": ratios, "medians": middle, "rounds": measured}


def pt(folder: Path, rounds: int) -> Facts:
    """The demo's sizes and batch: 16 blocks of 64 tokens."""
    tokenizer = train_tokenizer(read_demo_texts(), DEMO["vocab_size"])
    tokenizer.save_pretrained(folder / "tokenizer")
    data = documents(folder, 64, 640, str(folder / "tokenizer"), str(MINI / "pt"))
    return {"data": data} | measure_stage(
        {
            "naive": pt_naive,
            "ours": pt_ours,
            "ours, library's head": partial(pt_ours, **LIBRARY),
            "ours, bf16": partial(pt_ours, precision="bf16"),
            "ours, activation checkpointing": partial(pt_ours, activation_checkpointing=True),
        },
        folder,
        rounds,
        data=folder,
        sizes=DEMO,
        batch_size=16,
    )


def read_demo_texts() -> list[str]:
    return [row.values["text"] for row in read_rows(sorted((MINI / "pt").rglob("*.parquet")), ["text"])]


def pt_wide(folder: Path, rounds: int) -> Facts:
    """2 blocks of 512 tokens."""
    write_texts(folder / "texts", 0.3)
    data = documents(folder, 512, 12, place_tokenizer(folder), str(folder / "texts"))
    return {"data": data} | measure_stage(
        {
            "naive": pt_naive,
            "ours": pt_ours,
            "ours, library's head": partial(pt_ours, **LIBRARY),
            "ours, bf16": partial(pt_ours, precision="bf16"),
            "ours, bf16, library's head": partial(pt_ours, precision="bf16", **LIBRARY),
        },
        folder,
        rounds,
        data=folder,
        sizes=WIDE,
        batch_size=2,
    )


def sft(folder: Path, rounds: int, num_rows: int = 20) -> Facts:
    """Real conversations in the proportions of Infinity-Instruct's parts, up to 1,024 tokens, 4 to a batch."""
    tokenizer = load_tokenizer(place_tokenizer(folder))
    total, chosen = sum(MIXTURE.values()), []
    for part, weight in MIXTURE.items():
        rows = read_turns(sample_files(part))
        chosen += random.Random(SEED).sample(rows, min(len(rows), round(num_rows * weight / total)))
    random.Random(SEED).shuffle(chosen)
    file = str(write_conversations(chosen, folder / "messages.jsonl"))
    facts: Facts = {}
    for name, packing in (("rows", False), ("packed", True)):
        keys = {"cache_dir": str(folder / f"cache-{name}"), "max_drop_share": 1.0, "packing": packing}
        blocks, _, ledger = prepare_conversations(ConversationData(train_files=[file], **keys), tokenizer, 1024, SEED)
        facts[name] = use(blocks.folder, folder / name) | {"tokens_with_labels": ledger.tokens_trained}
    return {"data": facts} | measure_stage(
        {
            "seed": sft_seed,
            "trl": sft_trl,
            "trl, no activation checkpointing": partial(sft_trl, activation_checkpointing=False),
            "trl, packed": partial(sft_trl, activation_checkpointing=False, packing=True),
            "ours": sft_ours,
            "ours, library's head": partial(sft_ours, **LIBRARY),
        },
        folder,
        rounds,
        data=folder,
        sizes=WIDE,
        batch_size=4,
    )


def dpo_pairs(folder: Path, rounds: int, num_pairs: int = 8) -> Facts:
    """Real pairs up to 1,024 tokens, 4 to a batch, one epoch, the reference's pass included.

    Over several epochs a reference that is scored ahead is scored once; here nothing is gained by that.
    """
    tokenizer = load_tokenizer(place_tokenizer(folder))
    files = [str(file) for file in sample_files("dpo", "train*.parquet")]
    data = PreferenceData(train_files=files, cache_dir=str(folder / "cache"), max_drop_share=1.0)
    pairs = prepare_preferences(data, tokenizer, 1024)[0]
    pairs = pairs.select(sorted(random.Random(SEED).sample(range(len(pairs)), min(num_pairs, len(pairs)))))
    pairs.save_to_disk(str(folder / "pairs"))
    return {"data": {"pairs": len(pairs)}} | measure_stage(
        {
            "trl": partial(dpo, activation_checkpointing=True, **TRL_DPO),
            "trl, no activation checkpointing": partial(dpo, **TRL_DPO),
            "ours": dpo,
            "ours, random order": partial(dpo, train_sampling_strategy="random"),
            "ours, reference in memory": partial(dpo, precompute_ref_log_probs=False),
        },
        folder,
        rounds,
        data=folder,
        sizes=WIDE,
        batch_size=4,
    )


STAGES = {"pt": pt, "pt_wide": pt_wide, "sft": sft, "dpo": dpo_pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=STAGES)
    args = parser.parse_args()
    logging.set_verbosity_error()
    for stage in [args.only] if args.only else STAGES:
        started, load = time.time(), os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="mini_qwen_bench_") as folder:
            facts = STAGES[stage](Path(folder), args.rounds)
        write_record(stage, circumstances(started) | {"load_before": load}, facts)


def write_record(stage: str, circumstance: Facts, facts: Facts) -> None:
    lines = [{"variant": f"{stage}: {name}"} | ratios for name, ratios in facts["ratios"].items()]
    print(tabulate(lines, headers="keys", tablefmt="github"), flush=True)
    record = circumstance | {"processor": processor(), "gpu": "not measured"} | facts
    (RESULTS / f"step_{stage}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
