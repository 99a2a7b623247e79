"""Scoring: distinct texts once, the cache and what must not answer from it, kills, refusals, what is reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import profile_in
from scorer_models import counting_bert, counting_t5
from scoring_fakes import Letters, ask, small_world, write_run

from persodpo.errors import PersodpoError
from persodpo.imports import imported_modules
from persodpo.method import METRICS
from persodpo.pairs import WORST_CASE
from persodpo.runfolder import RunFolder
from persodpo.scoring import score
from persodpo.scoring.score import Item, ScoreCache, Scored, computed_metrics, fingerprint, score_items
from persodpo.scoring.signals import PersonaDistance, write_input
from persodpo.scoring.words import WordMeans
from persodpo.stages.score import CACHE, make_scores


@pytest.fixture
def cache(tmp_path):
    with ScoreCache(tmp_path / "scores.sqlite") as made:
        yield made


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(score, "BATCH", 2)


def test_equal_texts_are_scored_once_in_batches_of_like_length(cache):
    scorer, items = Letters(), ask("b", "a", "ccc", "a", "b", "dddd")
    values, tally = score_items(scorer, items, cache)
    assert values.tolist() == [scorer.value(item) for item in items]
    assert scorer.batches == [["dddd", "ccc"], ["b", "a"]]
    assert (tally.responses, tally.distinct, tally.scored) == (6, 4, 4)


def test_a_second_run_asks_nothing_and_reports_the_same(tmp_path):
    first, second = Letters(limit=2), Letters(limit=2)
    with ScoreCache(tmp_path / "scores.sqlite") as cache, ScoreCache(tmp_path / "scores.sqlite") as other:
        values, tally = score_items(first, ask("abcd", "b", "xyzx", "b"), cache)
        again, repeated = score_items(second, ask("b", "abcd", "xyzx", "b"), other)
        more, extended = score_items(second, ask("abcd", "new"), other)
    assert values[[1, 0, 2, 3]].tolist() == again.tolist()
    assert (second.asked, repeated.scored, extended.scored, extended.distinct) == (["new"], 0, 1, 2)
    assert tally.unread == repeated.unread == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert more[0] == values[0]


def test_another_key_name_or_text_bound_is_another_score(cache):
    score_items(Letters(), ask("a"), cache)
    for other in (Letters(name="ue_score"), Letters(key="other"), Letters(limit=3)):
        score_items(other, ask("a"), cache)
        assert len(other.asked) == 1
    texts = [(("ab", "c"), ""), (("a", "bc"), ""), (("a", "b", "c"), ""), ((), "a\ud800"), ((), "a\ud801")]
    assert len({score.item_key("s", Item(personas, "", "", response)) for personas, response in texts}) == 5


def test_the_fingerprint_holds_the_setting_and_the_code_that_a_scorer_runs():
    vectors = Path(__file__).with_name("conftest.py")  # any file has a hash
    one, same = (PersonaDistance(WordMeans(vectors)) for _ in range(2))
    assert fingerprint(one) == fingerprint(same) != fingerprint(PersonaDistance(WordMeans(vectors, "as_released")))
    sources = imported_modules("persodpo.scoring.signals", "persodpo.scoring")
    assert {f"persodpo.scoring.{name}" for name in ("signals", "models", "score", "words")} <= sources


SCRIPT = """
import sys
from pathlib import Path
from scoring_fakes import Letters, ask
from persodpo.scoring import score

score.BATCH = 2
with score.ScoreCache(Path(sys.argv[1])) as cache:
    score.score_items(Letters(killed_before=2), ask(*"abcdefgh"), cache)
"""


def test_a_killed_run_loses_at_most_the_batch_under_way(tmp_path):
    path, scorer = tmp_path / "scores.sqlite", Letters()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    with ScoreCache(path) as cache:
        values, tally = score_items(scorer, ask(*"abcdefgh"), cache)
    assert (tally.distinct, tally.scored, len(scorer.asked)) == (8, 4, 4)
    assert values.tolist() == [scorer.value(item) for item in ask(*"abcdefgh")]


class Broken(Letters):
    """Gives a value that is no number to one text, until it is mended."""

    wrong: float | None = np.nan

    def score(self, items):
        scored = super().score(items)
        bad = [self.wrong is not None and item.response == "bad" for item in items]
        return scored._replace(values=np.where(bad, self.wrong or 0, scored.values))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused_by_name_and_not_kept(cache, wrong):
    scorer = Broken()
    scorer.wrong = wrong
    with pytest.raises(PersodpoError, match=r"Scorer coherence gave 1 scores .* not finite.*to the response 'bad'"):
        score_items(scorer, ask("aaaa", "bbbb", "bad", "c"), cache)
    scorer.wrong = None
    _, tally = score_items(scorer, ask("aaaa", "bbbb", "bad", "c"), cache)
    assert tally.scored == 2  # the batch before it was kept


def test_another_number_of_values_and_a_lost_batch_are_refused(cache):
    class Short(Letters):
        def score(self, items):
            return Scored(np.zeros(len(items) - 1), np.zeros(len(items)))

    with pytest.raises(PersodpoError, match="one a text"):
        score_items(Short(), ask("a", "b"), cache)
    lossy = lambda scorer, batches: [(0, scorer.score(batches[0]))]  # noqa: E731
    with pytest.raises(PersodpoError, match="gave no score to 1 texts"):
        score_items(Letters(), ask("aaa", "b", "c"), cache, engine=lossy)


def test_a_store_of_answers_is_not_taken_for_a_cache(store):
    before = store.path.read_bytes()
    with pytest.raises(PersodpoError, match="an SQLite file of another program"):
        ScoreCache(store.path)
    assert store.path.read_bytes() == before


def test_only_readable_responses_are_scored_and_the_others_reported(cache):
    dialogues, responses = small_world()
    dialogues = dialogues.assign(personas=[[], *dialogues["personas"][1:]])
    metrics, report, _ = computed_metrics(responses, dialogues, [Letters(name) for name in METRICS], cache)
    assert len(metrics) == 10 == (responses["outcome"] == "ok").sum()
    assert set(metrics.columns) == {"dialogue_id", "model", "parsed", *METRICS}
    assert report.set_index(["scorer", "quantity"])["value"]["coherence"].to_dict() == {
        "responses": 10, "not_read": 2, "without_text": 1, "empty_personas": 3, "distinct_texts": 10, "unread": 0,
    }  # fmt: skip
    with pytest.raises(PersodpoError, match="dialogue d0: there is no such dialogue"):
        computed_metrics(responses, dialogues[1:], [], cache)


@pytest.fixture(scope="module")
def models(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("models")
    vectors = folder / "vectors.txt"
    vectors.write_text("agree 1 0\ndeny 0 1\ngood 1 1\nx 0.5 -1\n")
    return {
        "coherence": counting_t5(folder / "t5"), "c_score": counting_bert(folder / "bert"), "ue_score": folder / "bert",
        "persona_distance": vectors,
    }  # fmt: skip


def computing(folder, models, *overrides):
    chosen = [f"scoring.models.{metric}={path}" for metric, path in models.items()]
    accepted = f"scoring.accept_failed_probes=[{', '.join(METRICS)}]"
    more = ["scoring.source=compute", accepted]
    return profile_in(folder, *chosen, *more, *overrides)


@pytest.fixture(scope="module")
def computed_run(tmp_path_factory, models):
    run = RunFolder(computing(tmp_path_factory.mktemp("run"), models))
    write_run(run, *small_world())
    return run, make_scores(run)[-1]


def test_the_stage_computes_imputes_and_ranks(computed_run):
    run, report = computed_run
    scores = run.read("scores").set_index(["dialogue_id", "model"])
    assert len(scores) == 12
    # "agree x" entails "agree good x" and "deny w0" contradicts it; contradiction comes first
    assert scores.loc[("d0", "m2"), "c_score"] == -1
    cut_off, unread = scores.loc[("d3", "m3")], scores.loc[("d1", "m3")]
    assert cut_off["imputed"]
    assert cut_off[list(METRICS)].to_dict() == WORST_CASE
    assert not unread["imputed"]
    assert np.isnan(unread["quality"])
    assert scores["quality"].notna().sum() == 11
    # one "good" among the 17 other tokens of question, response, history and end mark: see `counting_t5`
    text, _ = write_input("agree good x", "User1: agree x w0")
    others = sum(word != "good" for word in text.split()) + 1
    share = 1 / (1 + np.exp(-np.sqrt(2) / np.hypot(1, others)))
    assert scores.loc[("d0", "m1"), "coherence"] == pytest.approx(share, abs=1e-6)
    assert "scores, coherence: 10 responses" in str(report)


def test_the_stage_says_what_scorers_saw_and_what_probes_found(computed_run):
    run, report = computed_run
    probes = run.read("probes")
    assert set(probes["scorer"]) == set(METRICS)
    order = probes[probes["probe"].isin(["permutation", "batch size", "padding"])]
    assert len(order) == 12
    assert order["passed"].all()
    assert not probes["passed"].all()
    assert any(note.startswith("warning: coherence enters the quality score although") for note in report.notes)
    seen = run.read("scorers").set_index(["table", "scorer", "quantity"])["value"]
    assert seen["scores", "coherence", "responses"] == 10
    assert 0 < seen["scores", "persona_distance", "unread"] < 1
    assert set(run.provenance("scores")["settings"]["scorers"]) == set(METRICS)


def test_an_unchanged_stage_is_skipped_with_its_warnings_and_a_changed_one_uses_the_cache(computed_run, models):
    run, _ = computed_run
    again = make_scores(run)[-1]
    assert again.skipped
    assert any(note.startswith("warning:") for note in again.notes)
    profile = run.profile.model_copy(update={"name": "other"})
    other = RunFolder(profile)
    write_run(other, *small_world())
    tallies = [note for note in make_scores(RunFolder(profile))[-1].notes if note.startswith("scores, ")]
    assert len(tallies) == 4
    assert all("10 distinct texts, 10 from the cache" in tally for tally in tallies)
    assert other.read("scores").equals(run.read("scores"))
    assert (run.root.parent / CACHE).is_file()


def test_a_scorer_that_fails_its_probes_may_not_enter_the_quality_score(tmp_path, models):
    run = RunFolder(computing(tmp_path, models, "scoring.accept_failed_probes=[c_score, ue_score]"))
    write_run(run, *small_world())
    with pytest.raises(PersodpoError, match=r"\(coherence: .*accept_failed_probes=\[coherence, "):
        make_scores(run)
    assert not run.path("scores").exists()


def test_extras_are_reported_beside_the_scores():
    dialogues, responses = small_world()
    responses.loc[0, "response"] = "a b a b a b a b"
    extras = score.extras_table(responses, dialogues).set_index(["dialogue_id", "model"])
    assert extras.loc[("d0", "m1")].to_dict() == {
        "rouge_l": 0.0, "distinct_1": 0.25, "distinct_2": pytest.approx(2 / 7), "words": 8,
        "repetition": pytest.approx(1 - 2 / 5),
    }  # fmt: skip
    # the reference "agree x good", the response "agree good x": two words in order of three
    assert extras.loc[("d1", "m1"), "rouge_l"] == pytest.approx(2 / 3)
    known = extras.loc[("d1", "m3")].dropna()
    assert list(known.index) == ["words"]
    assert extras.loc[("d3", "m3"), "words"] == 1
    assert pd.isna(extras.loc[("d0", "m3"), "distinct_2"])


def test_without_ray_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PersodpoError, match=r"pip install 'persodpo\[ray\]', or set scoring.ray_workers=null"):
        score.ray_engine(Letters, 2)


@pytest.mark.slow
def test_the_stage_gives_the_same_tables_over_ray(tmp_path, monkeypatch, models):
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'persodpo[ray]')")
    runs = []
    for workers in ("null", "2"):
        run = RunFolder(computing(tmp_path / workers, models, f"scoring.ray_workers={workers}"))
        write_run(run, *small_world(12))
        make_scores(run)
        runs.append(run)
    ray.shutdown()
    for table in ("scores", "evaluation/scores", "thresholds", "scorers", "probes"):
        local, clustered = (run.read(table) for run in runs)
        pd.testing.assert_frame_equal(local, clustered, atol=1e-9)
    assert runs[0].provenance("scores")["settings"] == runs[1].provenance("scores")["settings"]
