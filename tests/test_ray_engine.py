"""Ray: the same table as in this process, a clear sentence where a worker dies, raises, or Ray is not there."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scoring_fakes import Letters, ask, small_world, write_run
from test_scoring_run import computing, models  # noqa: F401 - a fixture

from persodpo.errors import PersodpoError
from persodpo.runfolder import RunFolder
from persodpo.scoring.cache import ScoreCache
from persodpo.scoring.engine import score_items
from persodpo.scoring.ray_engine import RayBackend
from persodpo.stages.score import make_scores


class Deadly(Letters):
    """Ends its worker's process at a certain text."""

    def score(self, texts):
        if any(text == "deadly" for _, text in texts):
            os._exit(1)
        return super().score(texts)


class Refusing(Letters):
    """Refuses a certain text."""

    def score(self, texts):
        if any(text == "refused" for _, text in texts):
            raise PersodpoError("Model 'x' gives values that are not finite; fetch it again.")
        return super().score(texts)


def make(name: str, kind: type[Letters] = Letters) -> Letters:
    return kind(name, limit=3)


def test_without_ray_there_is_one_sentence(tmp_path, monkeypatch, models):  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    run = RunFolder(computing(tmp_path, models, "engine.scorers=ray"))
    write_run(run, *small_world())
    with pytest.raises(PersodpoError, match=r"pip install 'persodpo\[ray\]', or set engine.scorers=local"):
        make_scores(run)


@pytest.fixture(scope="module")
def cluster():
    """A local cluster of two workers for all tests of this module."""
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'persodpo[ray]')")
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers unfold what these modules define
    backend = RayBackend(make, 2)
    backend._start()
    yield backend
    ray.shutdown()
    patch.undo()


@pytest.mark.slow
def test_two_workers_give_the_scores_of_this_process(tmp_path, cluster):
    asked = ask(*(f"text {n} {'x' * (n % 7)}" for n in range(60)), "text 0 ")
    with ScoreCache(tmp_path / "local.sqlite") as cache:
        here, tally = score_items(make("coherence"), asked, cache, batch=8)
    with ScoreCache(tmp_path / "ray.sqlite") as cache:
        there, retold = score_items(make("coherence"), asked, cache, batch=8, backend=cluster)
        again, found = score_items(make("coherence"), asked, cache, backend=cluster)
    assert (here == there).all()
    assert (here == again).all()
    assert found.scored == 0
    assert (tally.truncated, dict(tally.notes)) == (retold.truncated, pytest.approx(dict(retold.notes)))
    assert (tally.distinct, tally.scored) == (retold.distinct, retold.scored) == (60, 60)


@pytest.mark.slow
def test_a_dead_worker_is_one_sentence_and_finished_batches_stay(tmp_path, cluster):
    backend = RayBackend(partial(make, kind=Deadly), 2)
    asked = ask(*(f"a longer text {n}" for n in range(40)), "deadly")
    with ScoreCache(tmp_path / "scores.sqlite") as cache:
        scorer = make("coherence", Deadly)
        with pytest.raises(
            PersodpoError, match=r"A Ray worker of scorer coherence died or failed .*; look at Ray's logs"
        ):
            score_items(scorer, asked, cache, batch=2, backend=backend)
        _, tally = score_items(scorer, asked[:-1], cache, batch=2, backend=backend)
        assert tally.distinct == 40
        assert tally.scored < 40


@pytest.mark.slow
def test_a_scorers_own_sentence_comes_through(tmp_path, cluster):
    backend = RayBackend(partial(make, kind=Refusing), 2)
    with (
        ScoreCache(tmp_path / "scores.sqlite") as cache,
        pytest.raises(PersodpoError, match=r"^Model 'x' gives values that are not finite; fetch it again\.$"),
    ):
        score_items(make("coherence", Refusing), ask("fine", "refused"), cache, batch=1, backend=backend)


@pytest.mark.slow
def test_a_worker_with_another_scorer_is_refused(tmp_path, cluster):
    with (
        ScoreCache(tmp_path / "s.sqlite") as cache,
        pytest.raises(PersodpoError, match="another coherence scorer than"),
    ):
        score_items(Letters("coherence", checkpoint="other"), ask("text"), cache, backend=cluster)


@pytest.mark.slow
def test_the_stage_gives_the_same_tables_over_ray(tmp_path, cluster, models):  # noqa: F811
    runs = []
    for engine in ("local", "ray"):
        run = RunFolder(computing(tmp_path / engine, models, f"engine.scorers={engine}"))
        write_run(run, *small_world(12))
        make_scores(run)
        runs.append(run)
    for table in ("scores", "evaluation/scores", "thresholds", "scorers", "probes"):
        local, ray = (run.read(table) for run in runs)
        numbers = local.select_dtypes("number").columns
        assert np.allclose(local[numbers], ray[numbers], atol=1e-9, equal_nan=True), table
        assert local.drop(columns=numbers).equals(ray.drop(columns=numbers)), table
    assert runs[0].provenance("scores")["settings"] == runs[1].provenance("scores")["settings"]
