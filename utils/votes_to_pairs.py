"""Make preference pairs of the arena's votes, for mini_qwen_dpo.py.

    python utils/votes_to_pairs.py results/arena/votes.jsonl --output_file data/dpo/votes.jsonl
    python mini_qwen_dpo.py --train_files data/dpo/votes.jsonl

The winner of a vote is chosen against each of the others. What gives no pair is counted and printed: ties, answers
that are the same, and those from which a model would learn the wrong thing (see mini_qwen/votes.py).
"""

import argparse
import json
from pathlib import Path

from mini_qwen.votes import preference_pairs, read_votes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("votes", type=Path)
    parser.add_argument("--output_file", type=Path, required=True, help="a .jsonl of pairs")
    args = parser.parse_args(argv)
    if not args.votes.is_file():
        raise SystemExit(f"There is no file of votes '{args.votes}'. The arena of mini_qwen_web.py writes one.")
    votes, num_broken = read_votes(args.votes)
    pairs, without = preference_pairs(votes)
    print(f"{len(votes):,} votes, {len(pairs):,} pairs")
    for reason, count in without.most_common():
        print(f"no pair: {count:,} {reason}")
    if num_broken:
        print(f"not read: {num_broken:,} lines that are no votes")
    if not pairs:
        raise SystemExit(f"'{args.votes}' gives no pair, so '{args.output_file}' is not written.")
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    args.output_file.write_text(lines, encoding="utf-8")
    print(f"wrote {args.output_file}")


if __name__ == "__main__":
    main()
