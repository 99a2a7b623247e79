"""A scorer in, verdicts out: known answers it must give, and proof that each score belongs to its text.

Probes prove wiring and order, not judgement: a scorer that counts shared words can pass all of them. Known answers come from
sixteen dialogues written for this purpose (``probe_cases.json``): a copied persona must score above a denied one, the own
context above another's, an empty response low. A probe asks for most of the cases, and for more than guessing gives. Order
probes hold for every scorer: the same texts in another order, in batches of other sizes or beside a very long text must get
the same scores. The released coherence loop (audit A1) fails the second kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.scoring.models import dtype_name, remembered
from persodpo.scoring.score import Item, Scorer

#: Share of cases that must come out right; tossed coins reach it for one probe of sixteen cases in 26.
MOST = 0.75
#: Largest difference between two scores of one text; half precision rounds earlier.
TOLERANCE, HALF_TOLERANCE = 1e-5, 2e-2
#: Cases of the order probes, of two texts each: more than a window of the released loop; and how often the words of the text
#: that pads the others are repeated.
ORDERED, LONG = 5, 400
#: How far the other case is whose persona or context each case is set against.
OTHER = 7


class Case(NamedTuple):
    """A dialogue, a fitting reply, and a sentence that denies the first persona sentence."""

    personas: tuple[str, ...]
    context: str
    reply: str
    denial: str

    def item(self, response: str, **others: Any) -> Item:
        """Return a response to the case, whose reply is the reference; some fields may be others."""
        return Item(self.personas, self.context, self.reply, response)._replace(**others)


_ROWS = json.loads(Path(__file__).with_name("probe_cases.json").read_text(encoding="utf-8"))
CASES = tuple(Case(**{**row, "personas": tuple(row["personas"])}) for row in _ROWS)


@dataclass(frozen=True)
class Verdict:
    """What one probe of one scorer showed: what must hold, what was found, and whether it passed."""

    scorer: str
    probe: str
    expected: str
    found: str
    passed: bool


def _kinds_of_items(case: Case, other: Case) -> dict[str, Item]:
    """Return what a scorer is asked about a case, set against another one."""
    copy = case.personas[0]
    return {
        "copy": case.item(copy),
        "copy of all": case.item(copy, personas=(copy,)),
        "copy under others": case.item(copy, personas=other.personas),
        "copy that was asked and answered": case.item(copy, context=f"User1: {copy}", reference=copy),
        "denial": case.item(case.denial),
        "empty": case.item(""),
        "reply": case.item(case.reply),
        "reply elsewhere": case.item(case.reply, context=other.context),
        "reply to others": case.item(case.reply, personas=other.personas),
    }


class Probe(NamedTuple):
    """What must hold in a share of the cases, told from the scores of one or two kinds of items, [cases] each."""

    name: str
    expected: str
    kinds: list[str]
    holds: Callable[..., np.ndarray]
    share: float = MOST


#: Known answers, by scorer.
KNOWN = {
    "coherence": [
        Probe("shuffled context", "the reply scores higher under its own context than under another",
              ["reply", "reply elsewhere"], np.greater),
        Probe("empty text", "the reply scores above an empty response", ["reply", "empty"], np.greater),
    ],
    "c_score": [
        Probe("copied persona", "a copy of a persona sentence scores above 0", ["copy"], lambda s: s > 0),
        Probe("contradiction", "a denied persona sentence scores below its copy", ["copy", "denial"], np.greater),
        Probe("swapped persona", "a copy under other personas does not score above 0", ["copy under others"],
              lambda s: s <= 0),
        Probe("empty text", "an empty response does not score above 0", ["empty"], lambda s: s <= 0),
    ],
    "ue_score": [
        Probe("copied persona", "a persona sentence that was asked and answered scores 2",
              ["copy that was asked and answered"], lambda s: s == 2),
        Probe("contradiction", "a denied persona sentence scores 0", ["denial"], lambda s: s == 0),
        Probe("swapped persona", "a copy under other personas scores 0", ["copy under others"], lambda s: s == 0),
        Probe("empty text", "an empty response scores 0", ["empty"], lambda s: s == 0),
    ],
    "persona_distance": [
        Probe("copied persona", "a persona's copy has cosine 1", ["copy of all"], lambda s: s > 1 - 1e-6),
        Probe("swapped persona", "the reply is nearer to its own personas than to others", ["reply", "reply to others"],
              np.greater),
        Probe("empty text", "an empty response has cosine 0", ["empty"], lambda s: s == 0, 1.0),
    ],
}  # fmt: skip


def probe(scorer: Scorer) -> list[Verdict]:
    """Run every probe that applies to a scorer: known answers where its name has some, then order."""
    items = [_kinds_of_items(case, CASES[(place + OTHER) % len(CASES)]) for place, case in enumerate(CASES)]
    verdicts = []
    with remembered():
        for known_probe in KNOWN.get(scorer.name, ()):
            values = _values(scorer, [each[kind] for kind in known_probe.kinds for each in items])
            if not np.isfinite(values).all():
                raise PersodpoError(
                    f"Scorer {scorer.name} did not give one finite score a text to its probes; check its model."
                )
            right = known_probe.holds(*np.split(values, len(known_probe.kinds)))
            expected = (
                f"{known_probe.expected}, in {math.ceil(known_probe.share * len(right))} of {len(right)} cases or more"
            )
            score_text = f"{int(right.sum())} of {len(right)}"
            verdicts.append(
                Verdict(scorer.name, known_probe.name, expected, score_text, bool(right.mean() >= known_probe.share))
            )
    return [*verdicts, *order_verdicts(scorer)]


def order_verdicts(scorer: Scorer) -> list[Verdict]:
    """Look whether scores follow their texts under permutation, other batch sizes, and padding."""
    items = [case.item(response) for case in CASES[:ORDERED] for response in (case.reply, case.denial)]
    whole = _values(scorer, items)
    order = np.random.default_rng(0).permutation(len(items))
    longer = [" ".join([text or "word"] * LONG) for text in (*items[0].personas, *items[0][1:])]
    parts = {size: [items[start : start + size] for start in range(0, len(items), size)] for size in (1, 4)}
    others = {
        "permutation": [_values(scorer, [items[place] for place in order])[np.argsort(order)]],
        "batch size": [np.concatenate([_values(scorer, part) for part in batches]) for batches in parts.values()],
        "padding": [_values(scorer, [Item(tuple(longer[:-3]), *longer[-3:]), *items])[1:]],
    }
    tolerance = HALF_TOLERANCE if "16" in dtype_name() else TOLERANCE
    expected = f"the same score for the same text, within {tolerance:g}"
    worst = {name: float(np.abs(np.array(values) - whole).max()) for name, values in others.items()}
    return [
        Verdict(scorer.name, name, expected, f"largest difference {apart:.1e}", apart <= tolerance)
        for name, apart in worst.items()
    ]


def _values(scorer: Scorer, items: Sequence[Item]) -> np.ndarray:
    values = np.asarray(scorer.score(items).values, dtype=np.float64)
    # Too few or too many values are what a probe finds, not a crash of it.
    return values if values.shape == (len(items),) else np.full(len(items), np.nan)


def admit(verdicts: Sequence[Verdict], weights: Mapping[str, float], accepted: Sequence[str]) -> list[str]:
    """Refuse scorers that failed a probe, unless their signal has no weight or the profile accepts them by name.

    Returns:
        One warning for each scorer that failed and enters the quality score all the same.
    """
    failed: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if not verdict.passed and weights.get(verdict.scorer, 0.0) > 0:
            failed.setdefault(verdict.scorer, []).append(verdict)
    if refused := [scorer for scorer in failed if scorer not in accepted]:
        reasons = "; ".join(
            f"{name}: {', '.join(f'{one.probe} found {one.found} where {one.expected}' for one in failed[name])}"
            for name in refused
        )
        raise PersodpoError(
            f"Scorers failed probes and may not enter the quality score ({reasons}). Use other models, or more dialogues "
            "with other personas where heads on the encoder learn from them, set their weights to 0, or accept them by name "
            f"with scoring.accept_failed_probes=[{', '.join(failed)}]."
        )
    return [
        f"{scorer} enters the quality score although it failed its probes: {', '.join(one.probe for one in verdicts)}"
        for scorer, verdicts in failed.items()
    ]
