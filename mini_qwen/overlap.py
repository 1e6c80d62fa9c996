"""Overlap: how much of a reference's words, or Chinese characters, an answer has in the same order."""

import re
from functools import cache
from typing import TYPE_CHECKING
from unicodedata import normalize

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

# Ideographs of Unicode's CJK blocks: extension A, the basic block, compatibility, and the planes 2 and 3.
IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(f"[{IDEOGRAPH}]|[^\\W_{IDEOGRAPH}]+")


class MixedTokenizer:
    """Text as ROUGE's tokens: every Chinese character one, else every lower-cased run of letters and digits, in NFC.

    >>> MixedTokenizer().tokenize("Qwen2是一个model, isn't it?")
    ['qwen2', '是', '一', '个', 'model', 'isn', 't', 'it']
    """

    def tokenize(self, text: str) -> list[str]:
        return TOKEN.findall(normalize("NFC", text).lower())


@cache
def scorer() -> "RougeScorer":
    # Imported here, for it brings all of nltk, which takes more than a second and serves options not used here.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=MixedTokenizer())


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence, in tokens, of answer and reference; 0 if one has no token.

        precision = common / tokens of the answer     recall = common / tokens of the reference
        F1 = 2 * precision * recall / (precision + recall)

    Tokens are those of `MixedTokenizer`: single Chinese characters, so that no word segmenter is needed, and words in
    all other scripts. Nothing is stemmed, and punctuation does not count. The library's own tokens are a-z and 0-9
    only, under which every Chinese answer scores 0.

    >>> rouge_l("小明住在北京。", "小明的家在北京")  # 小明在北京: 5 of 6, 5 of 7
    0.7692307692307692

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", by Google's rouge-score.
    """
    return float(scorer().score(target=reference, prediction=answer)["rougeL"].fmeasure)
