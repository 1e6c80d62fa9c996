"""Score checkpoints side by side, or talk to one.

    python mini_qwen_eval.py --checkpoints results/pt results/sft results/dpo     # the recipe's parts, one table
    python mini_qwen_eval.py --config recipes/demo/eval.yaml                      # after the demo
    python mini_qwen_eval.py --chat results/dpo                                   # in the terminal

A checkpoint of the PT stage continues raw text, later ones answer in the chat template: config.json says which it is.

Reads:  checkpoint folders, and the held-out files that the recipe names.
Writes: output_dir, with results.md, results.json and training_loss.png.
"""

import time
from pathlib import Path

from transformers.utils import logging

from mini_qwen.circumstances import circumstances
from mini_qwen.evaluation import EvalData, evaluate, load_checkpoint
from mini_qwen.generation import talk
from mini_qwen.recipe import parse_recipe
from mini_qwen.report import write_report
from mini_qwen.watch import call_when_orphaned, end_as_orphan


def main(argv: list[str] | None = None) -> None:
    call_when_orphaned(end_as_orphan)
    (args,) = parse_recipe(EvalData, argv=argv, default="recipes/eval.yaml")
    logging.set_verbosity_error()

    if args.chat is not None:
        model, tokenizer = load_checkpoint(args.chat)
        talk(model, tokenizer, args.max_new_tokens, args.temperature, args.top_p, args.repetition_penalty)
        return

    started = time.time()
    records = evaluate(args)
    print(write_report(Path(args.output_dir), args.prompts, records, circumstances(started)))


if __name__ == "__main__":
    main()
