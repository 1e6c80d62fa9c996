"""Make preference pairs of the arena's votes, for mini_qwen_dpo.py.

    python utils/votes_to_pairs.py results/arena/votes.jsonl --output_file data/votes/pairs.jsonl
    python mini_qwen_dpo.py --config recipes/demo/dpo.yaml --train_files data/votes/pairs.jsonl --output_dir results/me

DPO goes on from the demo's SFT checkpoint here, on any CPU; without --config it takes the recipe of the large model.
The winner of a vote is chosen against each of the others. What gives no pair is counted and printed: ties, answers
that are the same, and those from which a model would learn the wrong thing (see mini_qwen/votes.py).
"""

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from mini_qwen.checkpoint import UNFINISHED
from mini_qwen.files import brief
from mini_qwen.integrity import sync
from mini_qwen.votes import preference_pairs, read_votes


def check_output(file: Path, votes: Path) -> None:
    """Raises SystemExit for a file that would be overwritten, and for a name by which DPO could not read it."""
    if file.suffix != ".jsonl":
        raise SystemExit(f"--output_file is '{file}', but must end in .jsonl.")
    if file.exists() and file.samefile(votes):
        raise SystemExit(f"--output_file is '{file}', the votes themselves. Name another one.")
    if file.exists() or file.is_symlink():
        raise SystemExit(f"'{file}' is there already. Remove it, or name another --output_file.")


def write_pairs(file: Path, pairs: list[dict[str, Any]]) -> None:
    """All of them or none."""
    aside = file.with_name(f"{UNFINISHED}-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
        sync(aside)
        os.replace(aside, file)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def convert(file: Path, output_file: Path) -> None:
    check_output(output_file, file)
    votes, num_broken = read_votes(file)
    pairs, without = preference_pairs(votes)
    print(f"{len(votes):,} votes, {len(pairs):,} pairs")
    for reason, count in without.most_common():
        print(f"no pair: {count:,} {reason}")
    if num_broken:
        print(f"not read: {num_broken:,} lines that are no votes")
    if not pairs:
        raise SystemExit(f"'{file}' gives no pair, so '{output_file}' is not written.")
    write_pairs(output_file, pairs)
    print(f"wrote {output_file}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("votes", type=Path)
    parser.add_argument("--output_file", type=Path, required=True, help="a .jsonl of pairs")
    args = parser.parse_args(argv)
    if not args.votes.is_file():
        raise SystemExit(f"There is no file of votes '{args.votes}'. The arena of mini_qwen_web.py writes one.")
    try:
        convert(args.votes, args.output_file)
    except OSError as error:
        raise SystemExit(f"The pairs cannot be made: {brief(error)}") from None


if __name__ == "__main__":
    main()
