"""Say what a recipe's data is, before anything is trained on it: what is dropped and why, how long the rows are, which
occur twice, in what languages, and three rows as the model will see them.

    python utils/check_data.py recipes/sft.yaml
    python utils/check_data.py recipes/pt.yaml --rows 100000 --train_files data/my_documents
    python utils/check_data.py my_recipe.yaml --stage dpo --tokenizer models/Qwen2.5-0.5B-Instruct

Reads the first rows of every file, as the stage would, and writes nothing. Further --key value pairs override the
recipe. The exit status is 1 when a file cannot be read, or more of these rows are dropped than max_drop_share allows.
Whether all rows are enough for eval_rows and for a block, only the stage can tell.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mini_qwen.cache import BATCH_SIZE, Preparation
from mini_qwen.chat import TokenRow
from mini_qwen.encoding import encode_text, text_encoder
from mini_qwen.files import count_unread, find_files
from mini_qwen.inspection import count_control_text, find_duplicates, language_shares, length_histogram
from mini_qwen.ledger import Ledger
from mini_qwen.preferences import Pair
from mini_qwen.preview import mark_trained
from mini_qwen.rows import Row, check_columns
from mini_qwen.stages import STAGES, open_stage

SAMPLE_ROWS, SAMPLE_TOKENS = 3, 150
UNLIMITED = 1 << 40  # tokens: to measure rows before they are shortened


def read_some(files: list[Path], preparation: Preparation, num_rows: int) -> Iterator[Row]:
    """The first rows of each file, `num_rows` in all."""
    for number, file in enumerate(files):
        share = num_rows * (number + 1) // len(files) - num_rows * number // len(files)
        yield from islice(preparation.read(file), share)


def all_text(value: Any) -> str:
    """Every text of a row that is no name of a role, in its order."""
    if isinstance(value, dict):
        return "\n".join(filter(None, (all_text(part) for key, part in value.items() if key not in ("from", "role"))))
    if isinstance(value, list):
        return "\n".join(filter(None, map(all_text, value)))
    return value if isinstance(value, str) else ""


def print_row(tokenizer: Any, row: TokenRow, number: int) -> None:
    ids = row.ids[:SAMPLE_TOKENS].tolist()
    trained = np.ones(len(ids), bool) if row.trained is None else row.trained[:SAMPLE_TOKENS]
    more = f" ... {len(row.ids) - len(ids):,} more tokens" if len(row.ids) > len(ids) else ""
    print(f"\nsample {number}, {len(row.ids):,} tokens, trained ⟦so⟧:")
    print(mark_trained(tokenizer, ids, trained.tolist()) + more)


def as_samples(stage: str, token_rows: list[TokenRow]) -> list[TokenRow]:
    """Of a pair, which is three rows, the prompt and the chosen answer as one."""
    if stage != "dpo":
        return token_rows
    pairs = (Pair(*(row.ids for row in token_rows[at : at + 3])) for at in range(0, len(token_rows), 3))
    return [pair.side("chosen_ids") for pair in pairs]


def read_sample(
    files: list[Path], preparation: Preparation, num_rows: int
) -> tuple[Ledger, list[TokenRow], list[str]]:
    """What became of the rows, their token rows, and the texts of all that could be read."""
    ledger, token_rows, texts = Ledger(files=len(files)), [], []
    rows = read_some(files, preparation, num_rows)
    while batch := list(islice(rows, BATCH_SIZE)):
        encoded, counts = preparation.encode(batch)
        token_rows += encoded
        ledger.add(counts)
        # What no UTF-8 can hold is dropped and counted; here it must not stop the rest.
        texts += [all_text(row.values).encode(errors="replace").decode() for row in batch if row.fault is None]
    return ledger, token_rows, texts


def print_texts(texts: list[str], tokenizer: Any) -> None:
    """What the texts repeat, which languages they are in, and whether they spell control tokens."""
    found = find_duplicates(texts, encode_text(tokenizer, texts))
    print(f"\ntwice:  {found.num_exact:,} rows equal an earlier one, {found.num_near:,} nearly do (MinHash, 0.8)")
    for kind, pairs in (("equal", found.exact_pairs), ("near", found.near_pairs)):
        for earlier, later in pairs[:SAMPLE_ROWS]:
            print(f"        {kind}, {earlier:,} and {later:,} of the rows read: {texts[later][:60]!r}")
    shares = ", ".join(f"{language} {share:.1%}" for language, share in language_shares(texts).items())
    print(f"speak:  {shares}")
    spelt = count_control_text(texts, text_encoder(tokenizer).control_tokens)
    print(
        f"spell:  {spelt.control_tokens:,} rows a control token, {spelt.other_templates:,} marks of other templates; "
        "both are trained on as ordinary characters"
    )


def print_drops(ledger: Ledger) -> None:
    for reason, count in ledger.rows_dropped.most_common():
        print(f"        {count:,} dropped: {reason} (first: {ledger.first_places[reason]})")


def check_drops(ledger: Ledger, max_drop_share: float) -> None:
    """Raises SystemExit when the stage would, if all its rows were like these."""
    share = ledger.rows_dropped.total() / max(ledger.rows_read, 1)
    if not ledger.rows_kept or share > max_drop_share:
        allowed = f"max_drop_share is {max_drop_share:.0%}"
        raise SystemExit(f"\nThe stage would stop: {share:.1%} of these rows are dropped, {allowed}.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to look at (default: 20,000)")
    parser.add_argument("--stage", choices=list(STAGES), help="default: from the recipe's name")
    parser.add_argument("--tokenizer", help="default: the recipe's")
    args, overrides = parser.parse_known_args(argv)
    opened = open_stage(args.recipe, overrides, args.stage, args.tokenizer)
    test_files = find_files(opened.keys.test_files or []) if opened.stage == "dpo" else []
    check_columns([*opened.files, *test_files], opened.preparation.choices)
    ledger, token_rows, texts = read_sample(opened.files, opened.preparation, args.rows)
    _, whole_rows, _ = read_sample(opened.files, opened.prepare(UNLIMITED), args.rows)

    print(f"{args.recipe}, stage {opened.stage}: the first {ledger.rows_read:,} rows of {ledger.files:,} files")
    print(f"rows:   {ledger.rows_kept:,} kept, {ledger.rows_shortened:,} shortened to {opened.max_length:,} tokens")
    print_drops(ledger)
    test_ledger, _, _ = read_sample(test_files, opened.preparation, args.rows)
    if test_files:
        print(f"test:   {test_ledger.rows_kept:,} kept of the first {test_ledger.rows_read:,} of test_files")
        print_drops(test_ledger)
    if unread := count_unread(list(opened.sources)):
        print(f"unread: {', '.join(f'{count:,} {end}' for end, count in unread.most_common())} (no data files)")
    samples = as_samples(opened.stage, token_rows)
    print("\n" + length_histogram([len(row.ids) for row in as_samples(opened.stage, whole_rows)], opened.max_length))
    print_texts(texts, opened.tokenizer)
    for number, row in enumerate(samples[:SAMPLE_ROWS]):
        print_row(opened.tokenizer, row, number)
    for each in (ledger, test_ledger) if test_files else (ledger,):
        check_drops(each, opened.keys.max_drop_share)


if __name__ == "__main__":
    main()
