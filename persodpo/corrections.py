"""What can be mended of the released method, by the ids of the audit (``release/findings.yaml``); ids with B are our own.

What a profile does not list in ``corrections`` stays as the authors did it, so that each correction can be measured alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

Correction = Literal["A1", "A3", "A4", "A5", "A10a", "A10b", "A10c", "A12", "A18", "B1", "B2"]
CORRECTIONS: dict[Correction, str] = {
    "A1": "the published coherence column, which is scrambled, is left out and its weight shared by the other signals",
    "A3": "the bonus for JSON is looked for in the completion, not in text that was taken out of its JSON",
    "A4": "perso pairs keep completions as generated, instead of writing both sides anew as valid JSON",
    "A5": "answers may have the tokens that the word limit takes, instead of as many tokens as words",
    "A10a": "prompts have one persona sentence a line, instead of sentences joined without a space",
    "A10b": "NLI scorers are asked about sentence pairs, instead of one joined text",
    "A10c": "persona distance strips punctuation and parts persona sentences, instead of joining them as they are",
    "A12": "train dialogues whose context or personas are in the valid split make no pairs",
    "A18": "an answer is one JSON object with nothing after it, no placeholder (A11), no loop, not any span that parses",
    "B1": "length counts each sentence once, and a response that says one twice is never chosen (ours, as B2)",
    "B2": "where no spaces stand between words, each Han character or kana counts as one, and four letters of Thai",
}
#: What arm ``corrected`` switches on: every one that needs neither new answers nor new scores.
WITHOUT_ASKING: tuple[Correction, ...] = ("A1", "A3", "A4", "A10a", "A12", "A18", "B1", "B2")
#: The comment of the setting.
MENDED = "\n  ".join(["what is mended, or all:", *map(": ".join, CORRECTIONS.items())])


def in_order(corrections: tuple[Correction, ...]) -> tuple[Correction, ...]:
    """Return corrections in the order of the audit, each once."""
    return tuple(correction for correction in CORRECTIONS if correction in corrections)


def _or_all(value: Any) -> Any:
    return tuple(CORRECTIONS) if value == "all" else value


#: The type of the setting; ``all`` stands for every one.
Corrections = Annotated[tuple[Correction, ...], BeforeValidator(_or_all), AfterValidator(in_order)]
#: Those that need neither new answers nor new scores, so that an ablation may switch them on.
Reranking = Literal["A1", "A3", "A4", "A12", "A18", "B1", "B2"]
