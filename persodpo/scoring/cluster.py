"""Scorers on a Ray cluster by Ray Data's map_batches; Ray is optional (``pip install 'persodpo[ray]'``).

A cluster named by RAY_ADDRESS is used, else one is started here. Every worker makes its own scorer from its own disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.scoring.score import Engine, Item, Scored, Scorer, fingerprint


class _Worker:
    def __init__(self, make: Callable[[str], Scorer], name: str, expected: str) -> None:
        self.scorer = make(name)
        if fingerprint(self.scorer) != expected:
            raise PersodpoError(f"A Ray worker has other files, packages or number types for scorer {name}.")

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        scored = self.scorer.score([Item(tuple(one[0]), *one[1:]) for one in json.loads(rows["batch"][0])])
        return {"number": [rows["number"][0]], "values": [scored.values.tolist()], "unread": [scored.unread.tolist()]}


def ray_engine(make: Callable[[str], Scorer], workers: int) -> Engine:
    """Return an engine of `persodpo.scoring.score.score_items` that scores on a Ray cluster.

    Args:
        make: Makes a scorer by its name, in a worker; a function of a module, or a partial of one.
        workers: How many scorers run at once; GPUs of the cluster are shared among them.
    """
    try:
        import ray.data  # noqa: PLC0415 - optional, and slow to load
    except ImportError as error:
        raise PersodpoError(
            "Ray is not installed; pip install 'persodpo[ray]', or set engine.ray_workers=null."
        ) from error

    def engine(scorer: Scorer, batches: Sequence[Sequence[Item]]) -> Iterator[tuple[int, Scored]]:
        rows = [{"number": number, "batch": json.dumps(batch)} for number, batch in enumerate(batches)]
        if not rows:
            return
        ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / workers)
        scored = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker, fn_constructor_args=(make, scorer.name, fingerprint(scorer)), batch_size=1, num_gpus=gpus or None,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
        )  # fmt: skip
        try:
            for row in scored.iter_rows():
                yield int(row["number"]), Scored(np.array(row["values"]), np.array(row["unread"]))
        except ray.exceptions.RayError as error:
            raise PersodpoError(
                f"A Ray worker of scorer {scorer.name} failed ({error}); look at Ray's logs."
            ) from error

    return engine
