"""What is reported beside the quality score and never inside it: overlap with the reference, variety, length, repetition.

Nothing here knows what a good answer is: a reference is one answer of many, and variety grows as texts get shorter.
"""

from __future__ import annotations

import math

import pandas as pd

from persodpo.completions import count_words

#: Length of the word sequences whose return counts as repetition.
REPEATED = 4


def distinct_share(text: str, size: int) -> float:
    """Return distinct-n of one text: different n-grams over all n-grams, 0..1 (Li et al. 2016); NaN without any."""
    words = text.lower().split()
    grams = list(zip(*(words[start:] for start in range(size)), strict=False))
    return len(set(grams)) / len(grams) if grams else float("nan")


def extras_table(responses: pd.DataFrame, dialogues: pd.DataFrame) -> pd.DataFrame:
    """Measure every response that has a text, recovered failures included, against the references of the dialogues.

    Returns:
        One row a response, in the order of ``responses``: dialogue_id, model; rouge_l, the F-measure of the longest common
        subsequence of words (Lin 2004), 0..1, without stemming; distinct_1 and distinct_2; repetition, the share of 4-grams
        that stood in the response before (seq-rep-4, Welleck et al. 2020), 0 if it has none; and words. NaN where there is
        no text, and words 0.
    """
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - loads nltk

    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    references = dialogues.set_index("dialogue_id")["reference"]
    rows = []
    for dialogue_id, model, text in responses[["dialogue_id", "model", "response"]].itertuples(index=False):
        reference, there = references.get(dialogue_id), isinstance(text, str)
        row = {"dialogue_id": dialogue_id, "model": model, "words": count_words(text) if there else 0}
        if there and isinstance(reference, str):
            row["rouge_l"] = float(rouge.score(reference, text)["rougeL"].fmeasure)
            row |= {f"distinct_{size}": distinct_share(text, size) for size in (1, 2)}
            different = distinct_share(text, REPEATED)
            row["repetition"] = 0.0 if math.isnan(different) else 1.0 - different
        rows.append(row)
    columns = ["dialogue_id", "model", "rouge_l", "distinct_1", "distinct_2", "repetition", "words"]
    return pd.DataFrame(rows, columns=columns)
