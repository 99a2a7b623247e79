"""What is reported beside the quality score and never inside it: overlap with the reference, variety, length, repetition.

Nothing here knows what a good answer is: a reference is one answer of many, and variety grows as texts get shorter. In:
responses and references. Out: the extras table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from persodpo.completions import count_words

COLUMNS = ("rouge_l", "distinct_1", "distinct_2", "words", "repetition")
#: Length of the word sequences whose return counts as repetition.
REPEATED = 4


def ngrams(text: str, size: int) -> list[tuple[str, ...]]:
    """Return the sequences of ``size`` words in ``text``, lower-cased, words being what white space separates."""
    words = text.lower().split()
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def distinct(texts: Iterable[str], size: int) -> float:
    """Return distinct-n: different n-grams over all n-grams (Li et al. 2016, section 5.1).

    Args:
        texts: One response, or many that are taken together.
        size: n, at least 1.

    Returns:
        A share, 0 to 1; NaN where there is no n-gram.
    """
    found = [gram for text in texts for gram in ngrams(text, size)]
    return len(set(found)) / len(found) if found else float("nan")


def repetition(text: str) -> float:
    """Return the share of 4-grams that stood in the response before (Welleck et al. 2020, seq-rep-4); 0 if it has none."""
    found = ngrams(text, REPEATED)
    return 1.0 - len(set(found)) / len(found) if found else 0.0


def rouge_l(references: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return ROUGE-L, the F-measure of the longest common subsequence of words (Lin 2004), without stemming.

    Args:
        references: Gold answers.
        responses: One for each.

    Returns:
        Values in 0..1, 0 where either has no word.
    """
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - loads nltk

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, responses, strict=True)
    return [float(scorer.score(reference, response)["rougeL"].fmeasure) for reference, response in pairs]


def extras_table(responses: pd.DataFrame, dialogues: pd.DataFrame) -> pd.DataFrame:
    """Measure every response that has a text, recovered failures included.

    Args:
        responses: Responses table.
        dialogues: Dialogues table; gives the references.

    Returns:
        One row a response, in the order of ``responses``: dialogue_id, model, and `COLUMNS`; NaN where there is no text,
        and words 0.
    """
    keys = responses[["dialogue_id", "model"]].reset_index(drop=True)
    reference = keys["dialogue_id"].map(dialogues.set_index("dialogue_id")["reference"])
    texts = pd.Series(responses["response"].to_numpy(dtype=object), dtype=object)
    there = texts.notna() & reference.notna()
    told, gold = texts[there].tolist(), reference[there].tolist()
    measured = pd.DataFrame(
        {
            "rouge_l": rouge_l(gold, told),
            "distinct_1": [distinct([text], 1) for text in told],
            "distinct_2": [distinct([text], 2) for text in told],
            "repetition": [repetition(text) for text in told],
        },
        index=there[there].index,
        dtype=float,
    ).reindex(keys.index)
    return keys.assign(**measured, words=[count_words(text) if isinstance(text, str) else 0 for text in texts])
