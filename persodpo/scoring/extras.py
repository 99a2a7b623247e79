"""What is reported beside the quality score and never inside it: overlap with the reference, variety, length, repetition.

Nothing here knows what a good answer is: a reference is one answer of many, and variety grows as texts get shorter.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from persodpo.completions import count_words

#: Length of the word sequences whose return counts as repetition.
REPEATED = 4


def distinct(text: str, size: int) -> float:
    """Return distinct-n of one text: different n-grams over all n-grams, 0..1 (Li et al. 2016); NaN without any."""
    words = text.lower().split()
    grams = list(zip(*(words[start:] for start in range(size)), strict=False))
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(text: str) -> float:
    """Return the share of 4-grams that stood in the response before (Welleck et al. 2020, seq-rep-4); 0 if it has none."""
    share = distinct(text, REPEATED)
    return 0.0 if share != share else 1.0 - share  # noqa: PLR0124 - NaN


def rouge_l(references: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return ROUGE-L, the F-measure of the longest common subsequence of words (Lin 2004), 0..1, without stemming."""
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
        One row a response, in the order of ``responses``: dialogue_id, model, rouge_l, distinct_1, distinct_2,
        repetition and words; NaN where there is no text, and words 0.
    """
    keys = responses[["dialogue_id", "model"]].reset_index(drop=True)
    reference = keys["dialogue_id"].map(dialogues.set_index("dialogue_id")["reference"])
    texts = pd.Series(responses["response"].to_numpy(dtype=object), dtype=object)
    there = texts.notna() & reference.notna()
    said = texts[there].tolist()
    measured = pd.DataFrame(
        {
            "rouge_l": rouge_l(reference[there].tolist(), said),
            "distinct_1": [distinct(text, 1) for text in said],
            "distinct_2": [distinct(text, 2) for text in said],
            "repetition": [repetition(text) for text in said],
        },
        index=there[there].index,
        dtype=float,
    ).reindex(keys.index)
    return keys.assign(**measured, words=[count_words(text) if isinstance(text, str) else 0 for text in texts])
