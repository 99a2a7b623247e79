"""Every model type with a causal head in transformers, tiny and random: does the trainer compute what plain passes give?

Run by `make check-architectures`. For each model type, each attention (sdpa, eager) and each variant (as it comes, with a
window of 8 positions, with one of 40, as an encoder that sees both ways):

- the guard is asked for the model in float32, whose answer is the outcome, in float64 and in bfloat16;
- in each layout that it chose, log-probabilities of packed rows are held in float64 against plain forward passes over prompt
  and response alone;
- two optimiser steps are held against stock TRL's on the same pairs, in float32: losses, gradient norms, weights. Where TRL
  fails, or differs from plain passes itself, the steps of plain passes take its place.

A case is ``wrong`` where any of it disagrees, or where something fails that works in a plain pass.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

import datasets
import tiny_architectures as tiny
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

from persodpo.errors import PersodpoError
from persodpo.files import PROJECT, git_commit, versions, write_json
from persodpo.training.forward import install_packed_forward
from persodpo.training.guard import check_packing
from persodpo.training.packing import Group, Layout, pack

RESULTS = PROJECT / "benchmarks" / "results"
ATTENTION = ("sdpa", "eager")
GROUPED, SINGLE, REFUSED, WRONG, NOT_BUILT, ABSENT = (
    "grouped", "one response per row", "refused", "wrong", "not built", "absent"
)  # fmt: skip
#: Seconds for one case, and bytes that a worker may map.
LIMIT, MEMORY = 900, 16 << 30
#: Relative differences that rounding explains: of log-probabilities; of losses and gradient norms of two steps, and of the
#: way that the weights went; and between reference log-probabilities of TRL and plain ones.
LOG_PROBS, STEPS, WAY, GAP = {torch.float64: 1e-6, torch.float32: 1e-4}, 1e-4, 1e-3, 1e-3
RESPONSES = (9, 6, 11)


class Case(NamedTuple):
    """What is checked at once: a model type, its attention, and its variant."""

    kind: str
    attention: str
    variant: str


def check(case: Case, *, train: bool) -> dict[str, Any]:
    """Check a case.

    Args:
        case: The case.
        train: Also train.

    Returns:
        ``outcome`` with what led to it; `ABSENT` where the type has no such attention or variant.
    """
    try:
        model = tiny.tiny_model(*case)
    except Exception as error:  # whatever building raises in transformers is the finding
        absent = "does not support an attention implementation" in str(error)
        return {"outcome": ABSENT if absent else NOT_BUILT, "reason": said(error)}
    if model is None:
        return {"outcome": ABSENT, "reason": "no such variant"}
    ids, source = tuple(tiny.plain_ids(model.config)), torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return [ids[place] for place in torch.randint(len(ids), (count,), generator=source).tolist()]

    groups = [
        Group(draw(prompt), [draw(count) for count in RESPONSES])
        for prompt in (14, 60 if case.variant == "window 40" else 30)
    ]
    try:
        try:
            plain = tiny.plain_log_probs(model, groups)
        except Exception:  # some code of transformers is not for float64
            model = tiny.tiny_model(*case, dtype=torch.float32)
            plain = tiny.plain_log_probs(model, groups)
    except Exception as error:  # as above
        return {"outcome": NOT_BUILT, "reason": f"a plain forward pass on text fails: {said(error)}"}
    if not plain.isfinite().all():
        return {"outcome": NOT_BUILT, "reason": "a plain forward pass on text gives no numbers"}
    found = {"parameters": model.num_parameters(), "dtype": word(model.dtype)} | packing(case, model, groups, plain)
    if train and found["outcome"] in {GROUPED, SINGLE}:
        found |= training(case, ids)
    return found


def word(dtype: torch.dtype) -> str:
    """Name a data type."""
    return str(dtype).removeprefix("torch.")


def said(error: BaseException) -> str:
    """Return what an error says, and where it arose."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    file = place.filename.split("site-packages/")[-1].removeprefix(f"{PROJECT}/")
    return f"{type(error).__name__}: {' '.join(lines)[:200]} ({file}:{place.lineno})"


def packing(case: Case, model: Any, groups: list[Group], plain: torch.Tensor) -> dict[str, Any]:
    """Ask the guard, and hold packed rows in the layouts that it chose against plain passes.

    Args:
        case: The case.
        model: Its model, float64 where transformers' code allows.
        groups: Groups to pack.
        plain: Log-probability of each response by plain passes.

    Returns:
        The outcome, the ``guard``'s answers by data type, and the ``differences`` of their layouts.
    """
    answers, why, layouts = {}, {}, {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        asked = model if dtype == model.dtype else tiny.tiny_model(*case, dtype=dtype)
        try:
            verdict = check_packing(asked, max_length=128, token_budget=512)
        except PersodpoError as error:
            answers[word(dtype)], why[word(dtype)] = REFUSED, str(error)
        except Exception as error:  # the guard must not fail otherwise
            return {"outcome": WRONG, "reason": f"the guard fails in {word(dtype)}: {said(error)}"}
        else:
            head = ", own head" if verdict.own_head else ""
            answers[word(dtype)], why[word(dtype)] = f"{GROUPED if verdict.grouped else SINGLE}{head}", verdict.reason
            layouts[answers[word(dtype)]] = verdict
    found: dict[str, Any] = {"guard": answers, "reason": why["float32"], "differences": {}}
    try:
        for answer, verdict in layouts.items():
            install_packed_forward(model, grouped=verdict.grouped, own_head=verdict.own_head)
            rows = [pack(groups, Layout(grouped=verdict.grouped, closed=closed)) for closed in (False, True)]
            with torch.no_grad():
                found["differences"][answer] = max(tiny.apart(model(packed=packed).double(), plain) for packed in rows)
        found["after"] = tiny.apart(tiny.plain_log_probs(model, groups), plain)
    except Exception as error:  # as above
        return found | {"outcome": WRONG, "reason": f"a packed pass fails: {said(error)}"}
    for answer, difference in found["differences"].items():
        if difference > LOG_PROBS[model.dtype]:
            types = [dtype for dtype, given in answers.items() if given == answer]
            reason = f"in {' and '.join(types)} the guard allows '{answer}', which is {difference:.2g} off"
            return found | {"outcome": WRONG, "reason": reason, "bfloat16_alone": types == ["bfloat16"]}
    if found["after"] > LOG_PROBS[model.dtype]:
        return found | {
            "outcome": WRONG,
            "reason": f"plain passes are {found['after']:.2g} off once the guard has been",
        }
    return found | {"outcome": answers["float32"].split(",")[0]}


def training(case: Case, ids: tuple[int, ...]) -> dict[str, Any]:
    """Train two steps beside stock TRL, and beside plain passes where TRL is no measure.

    Args:
        case: The case.
        ids: Token ids that are plain text.

    Returns:
        ``training`` and ``trl`` in words, and differences by data type; an outcome where it is no longer the guard's.
    """
    ours, stock, plain = (partial(tiny.steps, case, ids, by) for by in ("ours", "trl", "plain"))
    trl, aux = "", True
    try:
        gap = stock(dtype=torch.float32)["gap"]
        trl = "" if gap < GAP else f"stock TRL's reference log-probabilities are {gap:.2g} from plain ones"
    except Exception as error:  # TRL's failure is a finding, but not ours
        trl = f"stock TRL fails: {said(error)}"
    try:
        ours(aux=True, dtype=torch.float32)
    except PersodpoError as error:
        # Where TRL has no auxiliary loss of this model either, all but that loss can still be checked.
        aux = not trl.startswith("stock TRL fails") or "router_aux_loss_coef" not in str(error)
        if aux:
            return {"outcome": REFUSED, "reason": str(error), "trl": trl}
        trl = f"{trl}; refused here: {error}"
    except Exception as error:  # as above
        try:
            plain(dtype=torch.float32)
        except Exception as other:  # nor is it ours where plain passes fail in training
            return {"trl": trl, "training": f"plain passes fail in training: {said(other)}"}
        return {"outcome": WRONG, "reason": f"training fails: {said(error)}", "trl": trl}
    other, words = (plain, "plain passes") if trl else (stock, "stock TRL")
    agreed, found = settle(partial(ours, aux=aux and not trl), other)
    found |= {"trl": trl, "training": f"{'' if agreed else 'not '}as {words}"}
    return found | ({} if agreed else {"outcome": WRONG, "reason": f"two steps are not as {words}"})


def settle(one: Callable[..., dict[str, Any]], other: Callable[..., dict[str, Any]]) -> tuple[bool, dict[str, Any]]:
    """Tell whether two ways of training agree, in float32 or, where rounding may be all that differs, in float64."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64):
        try:
            mine, theirs = one(dtype=dtype), other(dtype=dtype)
        except Exception as error:  # not all code of transformers and TRL is for float64
            return False, found | {f"steps_{word(dtype)}": said(error)}
        way = float((mine["way"] - theirs["way"]).norm() / theirs["way"].norm().clamp(min=1e-12))
        norms = float(((mine["norms"] - theirs["norms"]).abs() / theirs["norms"].clamp(min=1e-12)).max())
        loss = tiny.apart(mine["losses"], theirs["losses"])
        found[f"steps_{word(dtype)}"] = {"loss": loss, "grad_norm": norms, "weights": way}
        if max(loss, norms) < STEPS and way < WAY:
            return True, found
    return False, found


def work(jobs: Path, results: Path, *, train: bool) -> None:
    """Check cases, and write a line for each when it is done."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    for library in (transformers.utils.logging, datasets.logging):
        library.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    gc.freeze()  # the trainer collects what is left over, and would look at all that was imported
    parent = os.getppid()
    for job in json.loads(jobs.read_text()):
        if os.getppid() != parent:
            return
        case, start = Case(*job), time.perf_counter()
        found = check(case, train=train) | {"seconds": round(time.perf_counter() - start, 2)}
        with results.open("a") as file:
            file.write(json.dumps(case._asdict() | found) + "\n")


def run(cases: list[Case], *, train: bool) -> list[dict[str, Any]]:
    """Check cases in a process that is started anew after a case that ends it or takes too long."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        jobs, results, log = (Path(place) / name for name in ("jobs", "results", "log"))
        while len(rows) < len(cases):
            jobs.write_text(json.dumps(cases[len(rows) :]))
            results.write_text("")
            command = [sys.executable, __file__, "--worker", str(jobs), str(results), *["--no-train"][train:]]
            done, since = 0, time.monotonic()
            with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
                while (ended := process.poll()) is None and time.monotonic() - since < LIMIT:
                    time.sleep(0.5)
                    if (count := len(results.read_text().splitlines())) > done:
                        done, since = count, time.monotonic()
                        print(f"{len(rows) + done} of {len(cases)} cases", file=sys.stderr, flush=True)
                process.kill()
            rows += [json.loads(line) for line in results.read_text().splitlines()]
            if len(rows) < len(cases):
                why = (
                    f"takes over {LIMIT} s"
                    if ended is None
                    else f"ends the process ({ended}): {log.read_text()[-300:]}"
                )
                rows.append(cases[len(rows)]._asdict() | {"outcome": WRONG, "reason": why})
    return rows


def summarise(rows: list[dict[str, Any]]) -> str:
    """Return counts, a line for each type, and reasons, as Markdown."""
    cells = {(row["kind"], row["attention"], row["variant"]): row for row in rows if row["outcome"] != ABSENT}
    of_kind = {
        kind: [row for row in cells.values() if row["kind"] == kind] for kind in dict.fromkeys(r["kind"] for r in rows)
    }
    rank = (NOT_BUILT, GROUPED, SINGLE, REFUSED, WRONG)
    worst = {
        kind: max((row["outcome"] for row in own), key=rank.index, default=NOT_BUILT) for kind, own in of_kind.items()
    }
    lines = ["| | types, by their worst case | cases |", "| --- | --- | --- |"]
    for outcome in (*rank[1:], NOT_BUILT):
        by_case = sum(row["outcome"] == outcome for row in cells.values())
        lines.append(f"| {outcome} | {sum(value == outcome for value in worst.values())} | {by_case} |")
    alone = [row["kind"] for row in cells.values() if row.get("bfloat16_alone")]
    lines += ["", f"Wrong in bfloat16 alone: {len(alone)} cases of {len(set(alone))} types."] if alone else []
    lines += ["", f"| model type | {' | '.join(tiny.VARIANTS)} | training |", "| --- " * (len(tiny.VARIANTS) + 2) + "|"]
    for kind, own in of_kind.items():
        found = []
        for variant in tiny.VARIANTS:
            given = {row["attention"]: row["outcome"] for row in own if row["variant"] == variant}
            alike = len(set(given.values())) == 1 and len(given) == 2
            found.append("".join(set(given.values())) if alike else ", ".join(f"{a}: {o}" for a, o in given.items()))
        trained = dict.fromkeys(row["training"] for row in own if "training" in row)
        lines.append(f"| {kind} | {' | '.join(found)} | {', '.join(trained)} |")
    for title, field, outcomes in (
        ("Wrong", "reason", {WRONG}), ("Refused", "reason", {REFUSED}), ("Not built", "reason", {NOT_BUILT}),
        ("One response per row", "reason", {SINGLE}), ("Stock TRL", "trl", set(rank)),
    ):  # fmt: skip
        reasons: dict[str, list[str]] = {}
        for (kind, *rest), row in cells.items():
            if row["outcome"] in outcomes and row.get(field):
                reasons.setdefault(row[field], []).append(f"{kind} ({', '.join(rest)})")
        lines += (
            ["", f"{title}:", "", *(f"- {', '.join(who)}: {why}" for why, who in reasons.items())] if reasons else []
        )
    return "\n".join(lines)


def main() -> None:
    """Check, write the results, and fail where anything is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES), metavar="TYPE")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--no-train", action="store_true", help="leave out the comparison with stock TRL")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return work(*asked.worker, train=not asked.no_train)
    start = time.perf_counter()
    cases = [Case(kind, *rest) for kind in asked.types for rest in itertools.product(ATTENTION, tiny.VARIANTS)]
    count = os.cpu_count() or 1
    shares = [[case for case in cases if asked.types.index(case.kind) % count == number] for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        rows = list(itertools.chain(*pool.map(partial(run, train=not asked.no_train), shares)))
    rows.sort(key=lambda row: asked.types.index(row["kind"]))
    table, counts = summarise(rows), Counter(row["outcome"] for row in rows)
    machine = {"device": platform.processor() or platform.machine(), "cores": count, "threads": 1}
    note = (
        f"{machine['device']}, {machine['cores']} cores, a process on each, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; random weights, each case once, {(time.perf_counter() - start) / 60:.0f} minutes. "
        "Log-probabilities in float64 (float32 where a plain pass fails in it), training in float32."
    )
    asked.output.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine | versions() | {"commit": git_commit()}, "counts": counts, "cases": rows}
    write_json(asked.output / "architectures.json", content)
    (asked.output / "architectures.md").write_text(f"{table}\n\n{note}\n")
    print(table, note, sep="\n\n")
    return sys.exit(f"{counts[WRONG]} cases are wrong.") if counts[WRONG] else None


if __name__ == "__main__":
    main()
