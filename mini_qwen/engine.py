"""An engine: a checkpoint that answers several requests at once, each as if it were alone."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from mini_qwen.encoding import encode_text
from mini_qwen.evaluation import load_checkpoint
from mini_qwen.generation import WholeCharacters, continue_batch, encode_prompt, speaks_chat
from mini_qwen.reply import Ended, Reply
from mini_qwen.sampling import Sampling
from mini_qwen.schemas import Turn
from mini_qwen.threads import threads_of_each
from mini_qwen.turns import turns

logger = logging.getLogger(__name__)


class Busy(Exception):
    """As many answers as may are under way or waiting."""


class Engine:
    """A checkpoint that answers several requests at once, each in a thread of its own and in a batch of its own.

    So an answer is the one that `mini_qwen_eval.py --chat` gives to the same turns with the same settings and seed,
    whatever else is asked at the same time. The threads share the weights and take turns of a token, with all cores;
    each has its own keys and values.
    """

    def __init__(self, checkpoint: str, parallel: int = 4, name: str | None = None, waiting: int = 32) -> None:
        """Load a checkpoint, on the GPU if there is one. Sets the number of threads that this process computes with.

        Args:
            parallel: answers that are under way at once.
            name: what a client calls the model; the folder as it is given when nothing is said.
            waiting: answers that may wait for others to end.

        Raises SystemExit for a folder that is no checkpoint.
        """
        if parallel < 1 or waiting < 0:
            raise ValueError(f"parallel is {parallel} and waiting {waiting}, but must be at least 1 and 0.")
        self.name = name or checkpoint
        self.model, self.tokenizer = load_checkpoint(checkpoint)
        torch.set_num_threads(threads_of_each(1))
        self.speaks_chat = speaks_chat(self.model)
        self.context: int = self.model.config.max_position_embeddings  # tokens of a prompt and its answer together
        self.parallel, self.max_waiting = parallel, waiting
        self.lock = threading.Lock()
        self.running: dict[Reply, threading.Thread] = {}
        self.waiting: deque[tuple[Reply, tuple[list[int], Sampling, int, int]]] = deque()
        self.closed = False

    def encode(self, turns: list[Turn]) -> list[int]:
        """The prompt of a conversation, in the chat template."""
        return encode_prompt(self.tokenizer, turns, chat=True)

    def encode_text(self, text: str) -> list[int]:
        """The prompt that is this text and nothing else, for raw continuation."""
        return encode_text(self.tokenizer, [text])[0].tolist()

    def answer(
        self, prompt: list[int], sampling: Sampling, max_new_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Reply:
        """Start to answer, or queue, and return at once.

        Args:
            prompt: token ids, from `encode` or `encode_text`.
            stop: texts before the first of which the answer ends.

        Raises:
            Busy: no more may wait.
            ValueError: an empty prompt, or one that with its answer does not fit into the context.
        """
        self.check_length(len(prompt), max_new_tokens)
        reply = Reply(stop, on_cancel=self.forget)
        work = (prompt, sampling, max_new_tokens, seed)
        with self.lock:
            if self.closed:
                raise Busy("The model is being closed.")
            if len(self.running) < self.parallel:
                thread = threading.Thread(target=self.work, args=(reply, work), daemon=True, name="answer")
                thread.start()
                self.running[reply] = thread
            elif len(self.waiting) < self.max_waiting:
                self.waiting.append((reply, work))
            else:
                raise Busy(f"{len(self.running)} answers are under way and {len(self.waiting)} wait: try again later.")
        return reply

    def check_length(self, num_prompt: int, max_new_tokens: int) -> None:
        """Raises ValueError with the numbers."""
        if num_prompt < 1:
            raise ValueError("The prompt is empty.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be 1 or more.")
        if num_prompt + max_new_tokens > self.context:
            raise ValueError(
                f"The prompt has {num_prompt:,} tokens and its answer up to {max_new_tokens:,}: together more than "
                f"the {self.context:,} of this checkpoint's context."
            )

    def close(self, seconds: float = 5.0) -> bool:
        """Cancel all answers and wait for their threads; whether all have ended by then."""
        with self.lock:
            self.closed = True
            replies = [*self.running, *(reply for reply, _ in self.waiting)]
            threads = list(self.running.values())
        for reply in replies:
            reply.cancel()
        ends_at = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, ends_at - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def forget(self, reply: Reply) -> None:
        """Take a cancelled reply out of the queue, if it is there; one that runs ends by itself."""
        with self.lock:
            self.waiting = deque(entry for entry in self.waiting if entry[0] is not reply)

    def work(self, reply: Reply, work: tuple[list[int], Sampling, int, int]) -> None:
        """Generate, then take on those who wait, until none does."""
        while True:
            try:
                self.generate(reply, *work)
            except BaseException:  # whatever it was, the slot is free again and those who wait are taken on
                logger.exception("The end of an answer could not be told")
            with self.lock:
                thread = self.running.pop(reply)
                if not self.waiting:
                    return
                reply, work = self.waiting.popleft()
                self.running[reply] = thread

    def generate(self, reply: Reply, prompt: list[int], sampling: Sampling, max_new_tokens: int, seed: int) -> None:
        def write(text: str) -> None:
            reply.write(text, streamer.num_tokens)
            turns.hand_on()
            reply.check()  # it may have been cancelled in the meantime

        streamer = WholeCharacters(self.tokenizer, write)
        try:
            ids = torch.tensor([prompt])
            with turns:
                output = continue_batch(
                    self.model, self.tokenizer, ids, torch.ones_like(ids), max_new_tokens, sampling, [seed], streamer
                )
            reply.end("stop" if self.tokenizer.eos_token_id in output[0].tolist() else "length")
        except Ended:
            pass
        except BaseException as error:  # a SystemExit too: it is this answer's end, not the thread's and its queue's
            words = str(error) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
            logger.error("An answer failed: %s", words, exc_info=not isinstance(error, SystemExit))
            reply.end(None, error=words)
