"""Caption metrics against several references: CIDEr-D, BLEU and ROUGE-L, as in COCO's scorer.

Source: salaniz/pycocoevalcap@ad63453c. Papers: Vedantam et al., arXiv:1411.5726 (CIDEr); Papineni et al. 2002 (BLEU);
Lin 2004 (ROUGE). METEOR and SPICE need separate Java programs and are not implemented.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fastvlm.evaluation.protocol import Protocol, mean
from fastvlm.evaluation.ptb import has_java, tokenise, tokenise_java

MAX_N = 4
SIGMA = 6.0  # CIDEr-D: width of the length penalty
BETA = 1.2  # ROUGE-L: weight of recall


def ngrams(text: str) -> Counter[tuple[str, ...]]:
    """Count the 1- to 4-grams of a tokenized text."""
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return CIDEr-D of every prediction; the corpus score is their mean. Papers report it times 100.

    Args:
        predictions: tokens separated by spaces.
        references: likewise, several per prediction; document frequencies are counted over them, per image.
    """
    counted = [[ngrams(text) for text in texts] for texts in references]
    seen = Counter(gram for texts in counted for gram in set().union(*texts))
    log_images = math.log(len(references)) if references else 0.0

    def weigh(counts: Counter) -> tuple[list[dict], list[float], int]:
        vectors: list[dict] = [{} for _ in range(MAX_N)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (log_images - math.log(max(1.0, seen[gram])))
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        length = sum(count for gram, count in counts.items() if len(gram) == 2)  # counts bigrams, like the original
        return vectors, norms, length

    scores = []
    for text, texts in zip(predictions, counted, strict=True):
        mine, norms, length = weigh(ngrams(text))
        total = 0.0
        for other, other_norms, other_length in map(weigh, texts):
            penalty = math.e ** (-((length - other_length) ** 2) / (2 * SIGMA**2))
            for n in range(MAX_N):
                shared = sum(min(w, other[n].get(g, 0.0)) * other[n].get(g, 0.0) for g, w in mine[n].items())
                if norms[n] != 0 and other_norms[n] != 0:
                    shared /= norms[n] * other_norms[n]
                total += shared * penalty / MAX_N
        scores.append(10.0 * total / len(texts))
    return scores


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return corpus BLEU-1 to BLEU-4; the brevity penalty uses the reference closest in length, the shorter if tied."""
    correct, possible = [0] * MAX_N, [0] * MAX_N
    length = reference_length = 0
    for text, texts in zip(predictions, references, strict=True):
        words = len(text.split())
        most: Counter = Counter()
        for other in texts:
            most |= ngrams(other)
        for gram, count in ngrams(text).items():
            correct[len(gram) - 1] += min(count, most[gram])
        for n in range(MAX_N):
            possible[n] += max(0, words - n)
        length += words
        reference_length += min((abs(len(other.split()) - words), len(other.split())) for other in texts)[1]
    # The small constants are the original's.
    product, scores = 1.0, []
    for n in range(MAX_N):
        product *= (correct[n] + 1e-15) / (possible[n] + 1e-9)
        scores.append(product ** (1.0 / (n + 1)))
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return [score * math.exp(1 - 1 / ratio) for score in scores] if ratio < 1 else scores


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Return the F score of the longest common subsequence, from the best precision and best recall over references."""
    mine, others = prediction.split(" "), [text.split(" ") for text in references]
    shared = [_common(other, mine) for other in others]
    precision = max(n / len(mine) for n in shared)
    recall = max(n / len(other) for n, other in zip(shared, others))
    if not precision or not recall:
        return 0.0
    return ((1 + BETA**2) * precision * recall) / (recall + BETA**2 * precision)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


class Captions(Protocol):
    """CIDEr-D as the score of a caption, with BLEU and ROUGE-L as further figures.

    Args:
        tokenizer: java, the original program, which gives COCO's own figures; python, the rules in `ptb.py`, whose
            figures are within 0.1 % of them; None takes java if it can run. The result names the one used.

    Raises:
        ValueError: an unknown tokenizer.
    """

    metric = "cider"

    def __init__(self, *, tokenizer: str | None = None):
        if tokenizer not in ("python", "java", None):
            raise ValueError(f"protocol.tokenizer={tokenizer} is not one of python, java")
        self.tokenizer = tokenizer or ("java" if has_java() else "python")

    def describe(self) -> dict[str, str]:
        near = {"java": "the original program", "python": "ptb.py, within 0.1 % of the original program's figures"}
        return {"tokenizer": f"{self.tokenizer} ({near[self.tokenizer]})"}

    def score(self, rows: Sequence[dict]) -> list[dict]:
        predictions, references = self._tokens(rows)
        scores = cider_d(predictions, references)
        return [
            {"score": score, "parsed": text, "rouge_l": rouge_l(text, texts)}
            for score, text, texts in zip(scores, predictions, references)
        ]

    def grade(self, row: dict) -> dict:
        raise ValueError("CIDEr-D of one caption alone is not defined: rarity is counted over all references")

    def summarise(self, rows: Sequence[dict]) -> dict[str, float]:
        predictions, references = self._tokens(rows)
        figures = {f"bleu_{n}": value for n, value in enumerate(bleu(predictions, references), 1)}
        return figures | {"rouge_l": mean([row["rouge_l"] for row in rows])}

    def official(self, rows: Sequence[dict]) -> list[dict]:
        return [{"image_id": row["image_id"], "caption": row["prediction"]} for row in rows]

    def _tokens(self, rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
        said, true = [row["prediction"] for row in rows], [text for row in rows for text in row["answers"]]
        cut = tokenise_java if self.tokenizer == "java" else lambda texts: list(map(tokenise, texts))
        # Predictions and references are tokenized separately, like in COCO's code: after a full stop, the program's
        # output can depend on the next line.
        predictions, tokens = cut(said), iter(cut(true))
        return predictions, [[next(tokens) for _ in row["answers"]] for row in rows]
