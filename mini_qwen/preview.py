"""Look before paying: the first row that the model will train on, decoded, with the trained tokens marked."""

from transformers import PreTrainedTokenizerBase, Trainer

from mini_qwen.blocks import IGNORED

GREEN, PLAIN = "\033[32m", "\033[0m"


def mark_trained(tokenizer: PreTrainedTokenizerBase, ids: list[int], trained: list[bool]) -> str:
    """The text of `ids`, its trained stretches in green between ⟦ ⟧.

    Stretches are decoded whole, since a single token may be half a character; one that would end within a character
    goes on to the character's end.
    """
    text, start = "", 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or trained[at] != trained[start]:
            part = tokenizer.decode(ids[start:at])
            if part.endswith("\ufffd") and at < len(ids):
                continue
            text += f"{GREEN}⟦{part}⟧{PLAIN}" if trained[start] else part
            start = at
    return text


def print_first_row(trainer: Trainer, max_tokens: int = 200) -> None:
    """Print the beginning of the first training row, as the collator makes it; of a pair, the chosen side."""
    if not trainer.is_world_process_zero():
        return
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids = batch["input_ids"][0].tolist()[:max_tokens]
    trained = batch["completion_mask"][0] > 0 if "completion_mask" in batch else batch["labels"][0] != IGNORED
    print(f"first row, {sum(trained[: len(ids)])} of its first {len(ids)} tokens trained ⟦so⟧:")
    print(mark_trained(trainer.processing_class, ids, trained.tolist()))
