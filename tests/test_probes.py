"""Probes: sound scorers pass, and every kind of fault that probes are there for is found."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
from scoring_fakes import Letters, ask

from persodpo.errors import PersodpoError
from persodpo.release.checks import scored_response
from persodpo.scoring import probes
from persodpo.scoring.probes import CASES, KNOWN, admit, order_verdicts, probe
from persodpo.scoring.score import Scored
from persodpo.scoring.signals import PersonaDistance
from persodpo.scoring.words import WordMeans


class Rule:
    """A scorer made of a rule over an item, to show what probes accept and refuse."""

    def __init__(self, name, rule) -> None:
        """Name the scorer; the rule takes personas (joined by a bar), context, reference and response."""
        self.name, self.rule = name, rule

    key = "rule"

    def score(self, items):
        values = [self.rule("|".join(item.personas), item.context, item.reference, item.response) for item in items]
        return Scored(np.array(values, dtype=float), np.zeros(len(items)))


def words(text: str) -> set[str]:
    return {word.strip(".,?!:").lower() for word in text.split()} - {"the", "a", "is", "it", "of", "in", "you", "what"}


def overlap(_, context, __, response) -> float:
    return len(words(context) & words(response)) / (1 + len(words(context)))


def entailment(personas, _, __, response) -> int:
    if response in personas.split("|"):
        return 1
    return -1 if " not " in response else 0


def echo(personas, _, reference, response) -> int:
    return (entailment(personas, "", "", response) == 1) * (1 + (reference == response))


SOUND = {"coherence": overlap, "c_score": entailment, "ue_score": echo}


def failed(verdicts) -> set[str]:
    return {verdict.probe for verdict in verdicts if not verdict.passed}


def test_cases_differ_and_deny_what_they_say():
    assert len(CASES) == len({case.personas for case in CASES}) == len({case.context for case in CASES}) == 16
    for case in CASES:
        assert " not " in case.denial
        assert case.context.splitlines()[-1].startswith("User1: ")
        assert len(words(case.personas[0]) & words(case.denial)) >= 2


@pytest.mark.parametrize("name", SOUND)
def test_sound_scorers_pass(name):
    verdicts = probe(Rule(name, SOUND[name]))
    assert not failed(verdicts), verdicts
    assert len(verdicts) == len(KNOWN[name]) + 3


@pytest.mark.parametrize("setting", ["as_released", "corrected"])
def test_word_vectors_pass(tmp_path, setting):
    """Vectors drawn at random know nothing but which words are the same, and that is enough."""
    source = random.Random(0)
    vocabulary = sorted(
        {w for case in CASES for text in (*case.personas, case.reply) for w in (*words(text), *text.lower().split())}
    )
    lines = [f"{word} {' '.join(f'{source.gauss(0, 1):.4f}' for _ in range(50))}" for word in vocabulary]
    (tmp_path / "vectors.txt").write_text("\n".join(lines) + "\n")
    assert not failed(probe(PersonaDistance(WordMeans(tmp_path / "vectors.txt", setting), setting)))


@pytest.mark.parametrize(
    ("name", "rule", "expected"),
    [
        ("coherence", lambda *_: 0.7, {"shuffled context", "empty text"}),
        ("coherence", lambda *texts: 1 - overlap(*texts), {"shuffled context", "empty text"}),
        ("coherence", lambda _, __, ___, response: len(response), {"shuffled context"}),
        ("c_score", lambda *_: 0, {"copied persona", "contradiction"}),
        ("c_score", lambda *_: 1, {"contradiction", "swapped persona", "empty text"}),
        ("c_score", lambda _, __, ___, response: 1 if response else 0, {"contradiction", "swapped persona"}),
        ("c_score", lambda *texts: -entailment(*texts), {"copied persona", "contradiction"}),
        ("ue_score", lambda *_: 0, {"copied persona"}),
        ("ue_score", lambda *_: 2, {"contradiction", "swapped persona", "empty text"}),
        ("persona_distance", lambda *_: 0, {"copied persona", "swapped persona"}),
        ("persona_distance", lambda *_: 1, {"swapped persona", "empty text"}),
    ],
)
def test_scorers_that_know_nothing_fail(name, rule, expected):
    assert failed(probe(Rule(name, rule))) == expected


def test_tossed_coins_fail():
    for seed in range(5):
        assert failed(
            probe(Rule("c_score", lambda *texts, seed=seed: zlib.crc32(repr((seed, texts)).encode()) % 3 - 1))
        )


class Scrambled(Letters):
    """Scores as the release did (audit A1)."""

    def score(self, items):
        straight = super().score
        windows = (straight(items[start : start + 8]).values for start in range(len(items)))
        values = np.concatenate(list(windows))[: len(items)]
        return Scored(values, np.zeros(len(values)))


def test_the_released_coherence_loop_fails_the_order_probes():
    items = ask(*(letter * 3 for letter in "abcdefghijklmnopqrstuvwxyz"))
    straight, scrambled = Letters().score(items).values, Scrambled().score(items).values
    assert (scrambled == straight[scored_response(len(items))]).all()
    assert sorted(scrambled.tolist()) != sorted(straight.tolist())
    assert {"permutation", "batch size"} <= failed(order_verdicts(Scrambled()))
    assert not failed(order_verdicts(Letters()))


class Faulty(Letters):
    """Gives right scores, but for one fault."""

    def __init__(self, fault) -> None:
        """Take what is done to the right values."""
        super().__init__()
        self.fault = fault

    def score(self, items):
        values = np.asarray(self.fault(super().score(items).values, items))
        return Scored(values, np.zeros(len(values)))


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (lambda values, _: np.sort(values), {"permutation", "batch size", "padding"}),
        (lambda values, _: values + 0.1 * (len(values) == 1), {"batch size"}),
        (lambda values, texts: values + 1e-4 * max(len(item.response) for item in texts), {"batch size", "padding"}),
        (lambda values, _: values - values.mean(), {"batch size", "padding"}),
        (lambda values, _: values[:-1], {"permutation", "batch size", "padding"}),
        (lambda values, _: values + np.linspace(0, 9e-6, len(values)), set()),
    ],
    ids=["sorted", "alone", "padding", "batch mean", "one lost", "rounding"],
)
def test_order_probes_find_each_fault(fault, expected):
    assert failed(order_verdicts(Faulty(fault))) == expected


def test_half_precision_may_round(monkeypatch):
    noisy = lambda values, _: values + np.linspace(0, 0.01, len(values))  # noqa: E731
    assert failed(order_verdicts(Faulty(noisy)))
    monkeypatch.setattr(probes, "dtype_name", lambda: "bfloat16")
    verdicts = order_verdicts(Faulty(noisy))
    assert not failed(verdicts)
    assert all("0.02" in verdict.expected for verdict in verdicts)


def test_a_scorer_that_gives_no_number_is_one_sentence():
    with pytest.raises(PersodpoError, match="coherence did not give one finite score"):
        probe(Rule("coherence", lambda *_: float("nan")))


def test_who_may_enter_the_quality_score():
    found = probe(Rule("c_score", lambda *_: 0)) + probe(Rule("ue_score", echo))
    weights = {"c_score": 0.5, "ue_score": 0.5}
    with pytest.raises(PersodpoError, match=r"c_score: copied persona found 0 of 16 where"):
        admit(found, weights, [])
    with pytest.raises(PersodpoError, match="c_score: copied"):
        admit(found, weights, ["ue_score"])
    assert admit(found, weights, ["c_score"]) == [
        "c_score enters the quality score although it failed its probes: copied persona, contradiction"
    ]
    assert admit(found, {"c_score": 0.0, "ue_score": 1.0}, []) == []
