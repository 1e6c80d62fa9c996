"""Stage 2, supervised fine-tuning: the pretrained model learns to answer, and to stop.

    bash run.sh sft                                          # the full recipe, a process for each GPU
    python mini_qwen_sft.py --config recipes/demo/sft.yaml   # a CPU and mini_data

The recipe holds every hyperparameter; the command line overrides it, for example `--learning_rate 2e-5`.

Reads:  the checkpoint folder that mini_qwen_pt.py wrote, and conversations from the recipe's train_files.
Writes: output_dir, with model, tokenizer, trainer_state.json, run.json, data_ledger.json and training_loss.png.
"""

from mini_qwen import run
from mini_qwen.blocks import BlockCollator
from mini_qwen.conversations import ConversationData, prepare_conversations
from mini_qwen.model import TrainedModel, load_model, needs_flat_rows
from mini_qwen.optimizer import make_optimizer
from mini_qwen.preview import print_first_row
from mini_qwen.recipe import parse_recipe
from mini_qwen.tokenizer import load_tokenizer
from mini_qwen.trainers import GuardedSFTTrainer
from mini_qwen.training import AnswerConfig


def main(argv: list[str] | None = None) -> None:
    recipe = parse_recipe(ConversationData, AnswerConfig, TrainedModel, argv=argv, default="recipes/sft.yaml")
    data_args, training_args, model_args = recipe
    run.begin(training_args, *recipe)

    tokenizer = load_tokenizer(model_args.checkpoint)

    # Every assistant turn's words and its <|im_end|> are trained, nothing else; rows that are too long lose early
    # turns or the middle of the question, never the end of an answer.
    train_blocks, eval_blocks, ledger = prepare_conversations(
        data_args, tokenizer, training_args.max_length, training_args.seed
    )
    run.show_data(training_args, ledger)

    model = load_model(model_args, tokenizer, training_args.precision, "sft", training_args.low_memory)
    trainer = GuardedSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_blocks.as_dataset(),
        eval_dataset=eval_blocks and eval_blocks.as_dataset(),
        processing_class=tokenizer,
        data_collator=BlockCollator(tokenizer.pad_token_id, flatten=needs_flat_rows(model)),
        optimizers=(make_optimizer(model, training_args, training_args.muon_learning_rate), None),
    )
    run.show_start(trainer)
    print_first_row(trainer)  # see what is trained on before paying for it

    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    run.finish(trainer, result, ledger, *recipe)


if __name__ == "__main__":
    main()
