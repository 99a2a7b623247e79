"""Pairs: equivalence to plain loops, and what must never happen."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persodpo.completions import is_one_object
from persodpo.config import load_profile
from persodpo.dialogues import overlaps
from persodpo.gate import inspect_pairs, label_accuracy
from persodpo.method import METRICS, measure_scale, perso_pairs, rate, thresholds
from persodpo.pairs import build_pairs

PROFILE = load_profile("release")

ANSWER = st.tuples(
    st.integers(0, 3),
    st.sampled_from(["m1", "m2", "m3", "m4"]),
    st.sampled_from(["ok", "truncated", "no_json"]),
    st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])),
    st.sampled_from(["same", "other", 'quo"ted', "näh"]),
)
ANSWERS = st.lists(ANSWER, max_size=16, unique_by=lambda answer: answer[:2])


def tables(answers) -> dict[str, pd.DataFrame]:
    """Make responses, scores and dialogues of generated answers."""
    frame = pd.DataFrame(answers, columns=["d", "model", "outcome", "quality", "text"])
    frame["dialogue_id"] = [f"d{number}" for number in frame["d"]]
    frame["response"] = [
        None if outcome == "no_json" else text for outcome, text in zip(frame["outcome"], frame["text"], strict=True)
    ]
    frame["completion"] = "raw " + frame["text"].astype(str)
    frame["quality"] = pd.to_numeric(frame["quality"])
    dialogues = pd.DataFrame({
        "dialogue_id": [f"d{number}" for number in range(4)], "split": ["train", "train", "train", "valid"],
        "dataset": "x", "personas": [["I sing."]] * 4, "reference": "r",
        "context": [f"User1: {number}" for number in range(4)],
    })  # fmt: skip
    frame["split"] = frame["dialogue_id"].map(dialogues.set_index("dialogue_id")["split"])
    return {
        "responses": frame.drop(columns="quality"),
        "scores": frame[["dialogue_id", "model", "quality"]],
        "dialogues": dialogues,
    }


def built(made, pair_set: str, limits=(0.4, 0.6), profile=PROFILE) -> pd.DataFrame:
    return build_pairs(pair_set, limits=limits, profile=profile, **made)


@pytest.mark.slow
@settings(max_examples=150)
@given(ANSWERS, st.sampled_from([(0.25, 0.75), (0.5, 0.5), (0.0, 1.0)]))
def test_pairs_are_those_of_plain_loops(answers, limits):
    made = tables(answers)
    low, high = limits
    usable = [a for a in answers if a[3] is not None and a[2] != "no_json" and a[0] != 3]
    for pair_set in ("simple", "perso"):
        expected = []
        for chosen in usable:
            for rejected in usable:
                simple = chosen[2] == "ok" != rejected[2]
                perso = chosen[3] >= high and rejected[3] <= low and chosen[3] > rejected[3]
                if (
                    chosen[0] == rejected[0]
                    and chosen[4] != rejected[4]
                    and (simple if pair_set == "simple" else perso)
                ):
                    expected.append((f"d{chosen[0]}", chosen[1], rejected[1]))
        pairs = built(made, pair_set, limits)
        assert list(zip(pairs["dialogue_id"], pairs["chosen_model"], pairs["rejected_model"], strict=True)) == sorted(
            expected
        )
        assert (pairs["chosen"] != pairs["rejected"]).all()


def test_sides_as_released_and_corrected():
    made = tables([(0, "m1", "ok", 1.0, 'quo"ted'), (0, "m2", "truncated", 0.0, "cut")])
    row = built(made, "perso").iloc[0]
    assert json.loads(row["chosen"]) == {"response": 'quo"ted'}
    assert json.loads(row["rejected"]) == {"response": "cut"}
    assert (row["score_chosen"], row["score_rejected"]) == (1.0, 0.0)
    assert "I sing." in row["prompt"]
    corrected = built(made, "perso", profile=load_profile("release", ["corrections=[A4]"])).iloc[0]
    assert (corrected["chosen"], corrected["rejected"]) == ('raw quo"ted', "raw cut")
    simple = built(made, "simple").iloc[0]
    assert (simple["chosen"], simple["rejected"]) == ('raw quo"ted', "raw cut")


@pytest.mark.parametrize("pair_set", ["perso", "simple"])
def test_a_response_that_says_a_sentence_twice_is_never_chosen_under_b1(pair_set):
    made = tables([(0, "m1", "ok", 1.0, "It is old. It is old."), (0, "m2", "ok", 0.9, "It is old."),
                   (0, "m3", "truncated", 0.0, "It is. It is. It")])  # fmt: skip
    for corrections, chosen in (("[]", ["m1", "m2"]), ("[B1]", ["m2"])):
        pairs = built(made, pair_set, profile=load_profile("release", [f"corrections={corrections}"]))
        assert pairs["chosen_model"].tolist() == chosen
        assert set(pairs["rejected_model"]) == {"m3"}


def test_corrected_overlap_drops_dialogues_that_valid_knows():
    made = tables([(n, m, o, q, m) for n in range(3) for m, o, q in (("m1", "ok", 1.0), ("m2", "truncated", 0.0))])
    made["dialogues"].loc[0, "context"] = "User1: 3"
    made["dialogues"]["personas"] = [["A."], ["B."], ["C."], ["B."]]
    profile = load_profile("release", ["corrections=[A12]"])
    assert set(built(made, "perso")["dialogue_id"]) == {"d0", "d1", "d2"}
    assert set(built(made, "perso", profile=profile)["dialogue_id"]) == {"d2"}
    dialogues = made["dialogues"]
    assert overlaps(dialogues[:3], dialogues[3:]).tolist() == [True, True, False]


def test_lazy_frames_of_a_file_give_what_eager_ones_do(tmp_path):
    """As the benchmark goes: from a Parquet file to row numbers."""
    random, count = np.random.default_rng(0), 700
    frame = pl.DataFrame({
        "row": range(count), "dialogue_id": [f"d{n % 100}" for n in range(count)],
        **{metric: random.random(count) for metric in METRICS},
        "words": random.integers(5, 100, count), "one_object": random.random(count) < 0.7,
    }).with_columns(coherence=pl.when(pl.col("row") == 5).then(None).otherwise("coherence"))  # fmt: skip
    frame.write_parquet(tmp_path / "metrics.parquet")
    found = []
    for rows in (frame, pl.scan_parquet(tmp_path / "metrics.parquet")):
        scale = measure_scale(rows)
        rated = rate(rows, scale, PROFILE.scoring.weights.model_dump()).select("dialogue_id", "row", "quality")
        limits = thresholds(rated, 0.4, 0.6)
        pairs = perso_pairs(rated, *limits).lazy().collect(engine="streaming")
        found.append((scale, limits, sorted(pairs.select("row_chosen", "row_rejected").rows())))
    assert found[0] == found[1]
    assert (found[0][0].responses, len(found[0][2]) > 500) == (699, True)


def pairs_frame(chosen: list[str], rejected: list[str], **columns) -> pd.DataFrame:
    count = len(chosen)
    base = {
        "prompt": [f"p{n}" for n in range(count)], "chosen": chosen, "rejected": rejected, "score_chosen": 0.9,
        "score_rejected": 0.1, "dialogue_id": [f"d{n}" for n in range(count)], "chosen_model": "a", "rejected_model": "a",
    }  # fmt: skip
    return pd.DataFrame(base | columns)


def gate_of(pairs: pd.DataFrame) -> dict[str, float]:
    dialogues = pd.DataFrame({
        "dialogue_id": pairs["dialogue_id"].unique(), "split": "train", "context": "c",
        "personas": [["A."]] * pairs["dialogue_id"].nunique(),
    })  # fmt: skip
    held_out = pd.DataFrame({"dialogue_id": ["v"], "split": "valid", "personas": [["A."]], "context": "other"})
    return inspect_pairs(pairs, pd.concat([dialogues, held_out]), seed=1).set_index("check")["value"].to_dict()


def test_the_gate_sees_length_format_and_source():
    texts = [" ".join(["word"] * (20 + n % 5)) for n in range(60)]
    long, short = [json.dumps({"response": t}) for t in texts], [json.dumps({"response": t[:30]}) for t in texts]
    gate = gate_of(pairs_frame(long, short))
    assert gate["length_alone"] == 1.0
    assert gate["format_alone"] == gate["source_model_alone"] == 0.5
    assert gate["leaked_prompts"] == 60
    broken = gate_of(pairs_frame(long, [t[:-2] for t in long], chosen_model="a", rejected_model="b"))
    assert broken["format_alone"] == broken["source_model_alone"] == 1.0
    assert all(map(is_one_object, long))


def test_the_gate_counts_ties_duplicates_and_contradictions():
    pairs = pairs_frame(
        ["x", "x", "y", "z"],
        ["y", "y", "x", "z"],
        prompt="p",
        dialogue_id=["d0", "d0", "d0", "d1"],
        score_rejected=[0.1, 0.1, 0.9, 0.95],
    )
    gate = gate_of(pairs)
    assert (gate["pairs"], gate["prompts"], gate["duplicates"], gate["ties"]) == (4, 2, 1, 2)
    assert (gate["identical_sides"], gate["contradictions"], gate["fan_out_max"]) == (1, 3, 3)


def test_a_feature_without_signal_predicts_nothing():
    random = np.random.default_rng(0)
    chosen, rejected = random.random(600), random.random(600)
    accuracy = label_accuracy(chosen, rejected, np.arange(600), seed=0)
    assert accuracy == pytest.approx(0.5, abs=0.08)
    assert np.isnan(label_accuracy(chosen[:3], rejected[:3], np.zeros(3), seed=0))
