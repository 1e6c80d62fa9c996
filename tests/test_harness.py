"""mini_qwen/harness.py: what lm-eval asks is answered with the model's own probabilities."""

import pytest
import torch
from conftest import MakeModel
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.chat import encode_chat
from mini_qwen.encoding import encode_text
from mini_qwen.harness import HarnessModel, cut
from mini_qwen.options import score_options
from mini_qwen.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> PreTrainedModel:
    return tiny_model()


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, values, index) for index, values in enumerate(arguments)]


def log_prob(model: PreTrainedModel, before: list[int], after: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(after)[:, None]).sum().item()


def test_loglikelihood_is_that_of_the_text_as_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [("Anna lives", " in a house"), ("Victor has", " a dog"), ("Anna lives", " near the river.")]
    found = HarnessModel(model, tokenizer).loglikelihood(requests("loglikelihood", *pairs))
    for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
        before, whole = (encode_text(tokenizer, [text])[0].tolist() for text in (context, context + continuation))
        assert whole[: len(before)] == before
        assert total == pytest.approx(log_prob(model, before, whole[len(before) :]), abs=1e-4)
        assert not is_greedy


def test_what_the_model_writes_is_greedy_and_generate_until_writes_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    harness = HarnessModel(model, tokenizer)
    settings = {"until": [], "max_gen_toks": 5}
    contexts = ["Anna lives", "In the morning", "Anna lives"]
    answers = harness.generate_until(requests("generate_until", *((context, settings) for context in contexts)))
    assert answers[0] == answers[2] != answers[1]
    for context, answer in zip(contexts, answers, strict=True):
        before = harness.encode_context(context)
        with torch.no_grad():
            ids = model.generate(torch.tensor([before]), max_new_tokens=5, do_sample=False)[0, len(before) :].tolist()
        assert tokenizer.decode(ids) == answer
    end = answers[0][2]
    (shorter,) = harness.generate_until(requests("generate_until", (contexts[0], settings | {"until": [end]})))
    assert shorter == answers[0].split(end)[0]
    with pytest.raises(ValueError, match="do_sample"):
        harness.generate_until(requests("generate_until", ("Anna", {"do_sample": True})))


def test_cut() -> None:
    assert cut("a\nb Q: c", ["Q:", "\n"]) == "a"
    assert cut("a\nb", "\n") == "a"
    assert cut("a\nb", []) == cut("a\nb", [""]) == "a\nb"


def test_blanks_between_context_and_continuation_belong_to_the_continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    harness = HarnessModel(model, tokenizer)
    assert harness.encode_pair("Anna ", "lives") == harness.encode_pair("Anna", " lives")
    before, after = harness.encode_pair("Anna", " lives")
    assert tokenizer.decode(before) == "Anna" and tokenizer.decode(after) == " lives"


def test_a_token_that_would_span_the_border_is_not_made(tiny_model: MakeModel) -> None:
    joined = train_tokenizer(["a:// b:// c://"] * 50, vocab_size=270)
    texts = ["a:", "// b", "a:// b"]
    context, continuation, whole = (encode_text(joined, [text])[0].tolist() for text in texts)
    assert whole[: len(context)] != context  # "://" is a token
    harness = HarnessModel(tiny_model(), joined)
    assert harness.encode_pair("a:", "// b") == (context, continuation)


def test_an_empty_context_is_the_end_of_the_text_before(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ((total, _),) = HarnessModel(model, tokenizer).loglikelihood(requests("loglikelihood", ("", "Anna")))
    expected = log_prob(model, [tokenizer.eos_token_id], encode_text(tokenizer, ["Anna"])[0].tolist())
    assert total == pytest.approx(expected, abs=1e-4)


def test_a_chat_context_is_one_turn_and_no_text_is_a_control_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "Where? <|im_end|>"
    harness = HarnessModel(model, tokenizer, chat=True)
    before, after = harness.encode_pair(text, "yes<|im_end|>")
    turns = [{"role": "user", "content": text}]
    assert before == encode_chat(tokenizer, turns, add_generation_prompt=True).ids.tolist()
    assert tokenizer.decode(before + after).endswith("assistant\nyes<|im_end|>")
    assert before.count(tokenizer.eos_token_id) == 1
    raw = HarnessModel(model, tokenizer).encode_pair(text, "yes<|im_end|>")
    for ids in (after, *raw):
        assert tokenizer.eos_token_id not in ids


def test_options_of_one_context_share_its_computation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    contexts: list[int] = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, out: contexts.append(len(args[0])))
    pairs = [("Anna lives", letter) for letter in (" A", " B", " C", " A")] + [("Victor", " A")]
    rated = HarnessModel(model, tokenizer, batch_size=1).rate(pairs)
    handle.remove()
    first_passes = [width for width in contexts if width == 1]
    assert len(first_passes) >= 2 and len(contexts) <= 4  # two prompts, and at most one second pass for each
    assert rated[0] == rated[3] != rated[4]


def test_rolling_loglikelihood_scores_every_token_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "Anna lives in a small house near the river."
    ids = encode_text(tokenizer, [text])[0].tolist()
    end = [tokenizer.eos_token_id]
    whole = HarnessModel(model, tokenizer).loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("",)))
    assert whole == [pytest.approx(log_prob(model, end, ids), abs=1e-4), 0.0]
    harness = HarnessModel(model, tokenizer, max_length=5)  # windows of 4 tokens, each after what comes before it
    assert len(ids) > 8
    (total,) = harness.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    windows = [log_prob(model, end, ids[:4])]
    windows += [
        log_prob(model, ids[max(0, min(at + 4, len(ids)) - 5) : at], ids[at : at + 4]) for at in range(4, len(ids), 4)
    ]
    assert total == pytest.approx(sum(windows), abs=1e-4)


def test_too_long_a_context_is_the_callers_mistake(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(AssertionError):
        HarnessModel(model, tokenizer, max_length=3).rate([("Anna lives in a small house", " A")])


def test_pairs_score_as_their_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [("小明住在", "河边"), ("小明 ", " A"), ("", "小明")]
    harness = HarnessModel(model, tokenizer)
    for (before, after), rated in zip(
        map(lambda pair: harness.encode_pair(*pair), pairs), harness.rate(pairs), strict=True
    ):
        ((alone,),) = score_options(model, [before], [[after]], "test")
        assert rated.score.sum_log_prob == pytest.approx(alone.sum_log_prob, abs=1e-4)
