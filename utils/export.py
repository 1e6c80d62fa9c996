"""Make of a checkpoint what other programs load: a folder for vLLM and transformers, GGUF, Ollama, the Hub.

    python utils/export.py results/dpo --to vllm                      # and transformers: results/dpo-vllm
    python utils/export.py results/dpo --to gguf --dtype fp16         # llama.cpp: results/dpo-gguf/dpo-fp16.gguf
    python utils/export.py results/dpo --to ollama                    # that and a Modelfile
    python utils/export.py results/dpo --to hub --results results/eval --license apache-2.0 --language zh en
    python utils/export.py results/dpo --to hub --push OWNER/NAME     # the only one that uses the network

Everything is checked before anything is written; what is written has its name only when it is whole. docs/export.md
says what each program does with it, and where its answers may differ.
"""

import argparse
from pathlib import Path

from transformers.utils import logging

from mini_qwen.export import Checkpoint, check_target, default_target, open_checkpoint, written_whole
from mini_qwen.hub import check_repo_id, push
from mini_qwen.model_card import make_card
from mini_qwen.model_folder import write_model_folder
from mini_qwen.ollama import make_modelfile
from mini_qwen.weights import DTYPES


def write_model(checkpoint: Checkpoint, target: Path, card: str | None) -> str:
    with written_whole(target, checkpoint.num_bytes) as folder:
        write_model_folder(checkpoint, folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return f"vllm serve {target}"


def write_gguf_folder(checkpoint: Checkpoint, target: Path, with_modelfile: bool) -> str:
    try:
        from mini_qwen.gguf_file import check_supported, file_name, write_gguf
    except ModuleNotFoundError:
        raise SystemExit(
            "GGUF is written with the gguf library: pip install -c constraints.txt -e '.[export]'"
        ) from None
    check_supported(checkpoint)
    with written_whole(target, checkpoint.num_bytes) as folder:
        write_gguf(checkpoint, folder / file_name(checkpoint))
        if with_modelfile:
            (folder / "Modelfile").write_text(make_modelfile(checkpoint, file_name(checkpoint)), encoding="utf-8")
    if with_modelfile:
        return f"ollama create {checkpoint.name} -f {target / 'Modelfile'}"
    return f"llama-server -m {target / file_name(checkpoint)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder that a stage wrote, or a checkpoint-N inside")
    parser.add_argument("--to", required=True, choices=["vllm", "gguf", "ollama", "hub"])
    parser.add_argument("--output_dir", type=Path, help="default: beside the checkpoint, with the kind in its name")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as the checkpoint stores its weights")
    parser.add_argument("--results", help="hub: output_dir of an evaluation of this checkpoint, for the card")
    parser.add_argument("--license", help="hub: such as apache-2.0")
    parser.add_argument("--language", nargs="+", default=[], help="hub: such as zh en")
    parser.add_argument("--push", metavar="OWNER/NAME", help="hub: upload the folder; a new repository is private")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()

    for key in ("results", "license", "language", "push"):
        if args.to != "hub" and getattr(args, key):
            raise SystemExit(f"--{key} is for --to hub, not --to {args.to}.")
    if args.push:
        check_repo_id(args.push)
    target = args.output_dir or default_target(args.checkpoint, args.to)
    check_target(target)
    checkpoint = open_checkpoint(args.checkpoint, args.dtype)
    if args.to in ("vllm", "hub"):
        about = (args.license, args.language, args.results, args.push)
        card = make_card(checkpoint, *about) if args.to == "hub" else None
        use = write_model(checkpoint, target, card)
    else:
        use = write_gguf_folder(checkpoint, target, with_modelfile=args.to == "ollama")
    print(f"wrote {target}: {checkpoint.describe()}. {use}")
    if args.push:
        print(f"uploaded to {push(target, args.push)}")


if __name__ == "__main__":
    main()
