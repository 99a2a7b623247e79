"""The scorers past one machine: batches of texts in, scores out, by Ray Data's map_batches over a cluster.

Ray is optional (``pip install 'persodpo[ray]'``). A cluster named by RAY_ADDRESS is used; otherwise one is started on
this machine and ended again. Every worker makes its own scorer, so models are loaded where they run, from paths that must
exist there. Dedicated workers are not replaced when they die: what killed one would kill the next, and what was finished
is in the cache.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.scoring.engine import Texts, fingerprint
from persodpo.scoring.scorers import Scored, Scorer

#: Responses looked at together: workers load their models once for all of them.
PORTION = 65_536
_SENTENCE = re.compile(r"PersodpoError: (.+)")


class _Worker:
    """What runs on the cluster: one scorer."""

    def __init__(self, make: Callable[[str], Scorer], name: str, expected: str) -> None:
        self.scorer = make(name)
        # Scores are kept under the identity seen by the process that asks; a GPU here and none there is another one.
        if fingerprint(self.scorer) != expected:
            raise PersodpoError(
                f"A Ray worker has another {name} scorer than the process that asks it (other files, package or type of "
                "number); give all machines the same, or none or all of them a GPU."
            )

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score the batches of texts in ``rows``; numbers travel as JSON, which keeps every digit."""
        scored = [self.scorer.score([tuple(texts) for texts in json.loads(batch)]) for batch in rows["texts"]]
        return {
            "number": list(rows["number"]),
            "values": [json.dumps(np.asarray(one.values, dtype=np.float64).tolist()) for one in scored],
            "truncated": [one.truncated for one in scored],
            "notes": [json.dumps(dict(one.notes)) for one in scored],
        }


class RayBackend:
    """A backend of `persodpo.scoring.engine.score_items` that scores on a Ray cluster."""

    portion = PORTION

    def __init__(self, make: Callable[[str], Scorer], workers: int) -> None:
        """Name the cluster's work; nothing starts before the first batch.

        Args:
            make: Makes a scorer by its name, in a worker; must be a function of a module.
            workers: How many scorers run at once.

        Raises:
            PersodpoError: Ray is not installed.
        """
        try:
            import ray  # noqa: PLC0415 - optional, and slow to load
            import ray.data  # noqa: PLC0415
        except ImportError as error:
            raise PersodpoError(
                "Ray is not installed, so scorers can run in this process only; pip install 'persodpo[ray]', or set "
                "engine.scorers=local."
            ) from error
        self._ray: Any = ray  # its own annotations are partial
        self._make, self._workers, self._started = make, workers, False

    def __enter__(self) -> Self:
        """Return the backend."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """End the cluster if it was started here."""
        if self._started:
            self._ray.shutdown()
            self._started = False

    def __call__(self, scorer: Scorer, batches: Sequence[Sequence[Texts]]) -> Iterator[tuple[int, Scored]]:
        """Yield each batch's number and scores, in any order.

        Raises:
            PersodpoError: A worker died, or raised one.
        """
        if not batches:
            return
        self._start()
        rows = [{"number": number, "texts": json.dumps(batch)} for number, batch in enumerate(batches)]
        workers = min(self._workers, len(rows))
        gpus = min(1.0, self._ray.cluster_resources().get("GPU", 0.0) / workers)
        scored = self._ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker, fn_constructor_args=(self._make, scorer.name, fingerprint(scorer)), batch_size=1, num_cpus=1,
            num_gpus=gpus or None, compute=self._ray.data.ActorPoolStrategy(size=workers), max_restarts=0,
        )  # fmt: skip
        try:
            for row in scored.iter_rows():
                values = np.array(json.loads(row["values"]), dtype=np.float64)
                yield int(row["number"]), Scored(values, int(row["truncated"]), json.loads(row["notes"]))
        except self._ray.exceptions.RayError as error:
            raise PersodpoError(_why(scorer.name, error)) from error

    def _start(self) -> None:
        """Join the cluster or start one."""
        if self._ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS")
        own: dict[str, Any] = {} if address else {"num_cpus": self._workers, "include_dashboard": False}
        self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        self._started = True
        context = self._ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.actor_task_retry_on_errors = False


def _why(name: str, error: BaseException) -> str:
    """Say what went wrong on the cluster: a scorer's own sentence where there is one."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray keeps a worker's exception as an object or as the text of its trace, depending on when it was raised.
        told = _SENTENCE.findall(f"{seen}\n{getattr(seen, 'cause', '')!r}")
        if isinstance(seen, PersodpoError) or told:
            return str(told[-1] if told else seen)
        seen = seen.__cause__
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"A Ray worker of scorer {name} died or failed ({first.rstrip('.')}); look at Ray's logs, give workers more memory "
        "or use fewer, and run again, finished batches are in the cache."
    )
