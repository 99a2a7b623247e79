"""From responses to pairs."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

import persodpo.completions
import persodpo.dialogues
import persodpo.gate
import persodpo.method
import persodpo.pairs
import persodpo.prompts
from persodpo.artifacts import RunFolder
from persodpo.config import Profile
from persodpo.errors import PersodpoError
from persodpo.release import published
from persodpo.stages import score
from persodpo.stages.base import Reports, Targets, alone, published_files
from persodpo.stages.cards import run_dataset_card
from persodpo.stages.generate import ranked_sets, run_generate, set_files
from persodpo.tables import write_table

#: What to do where a pair set is empty.
_MENDS = {
    "simple": "where no model ever fails, leave simple out of pairs.sets",
    "perso": "move pairs.low_quantile and pairs.high_quantile together or add models",
}


@alone
def run_score(profile: Profile, overwrite: bool = False) -> Reports:
    """Make the scores tables and the thresholds."""
    reports = run_generate(profile)
    reports.append(score.run_extras(profile))
    if profile.scoring.source == "compute":
        return [*reports, score.run_computed(profile, overwrite)]
    run = RunFolder(profile)
    files = published_files(run)
    chosen = ranked_sets(profile)

    wanted = dict(zip(score.tables_of(profile), (chosen, published.VALID_SETS), strict=False))
    answers = {table: table.replace("scores", "responses") for table in wanted}

    def build(targets: Targets) -> None:
        tables = {table: run.read(name) for table, name in answers.items()}
        metrics = {table: published.published_metrics(files, sets, tables[table]) for table, sets in wanted.items()}
        score.write_scores(profile, targets, tables, metrics)
        for left in ("probes", "scorers"):
            run.forget(left)

    report = run.stage(
        "score",
        inputs={name: run.path(name) for name in answers.values()}
        | set_files(files, [which for sets in wanted.values() for which in sets]),
        settings=score.score_settings(profile),
        outputs=["scores", "thresholds", *list(wanted)[1:]],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )
    return [*reports, report]


@alone
def run_pairs(profile: Profile, overwrite: bool = False) -> Reports:
    """Make the pair sets, their gate report and their card."""
    reports = run_score(profile)
    run = RunFolder(profile)
    names = [f"pairs/{pair_set}" for pair_set in profile.pairs.sets]

    def build(targets: Targets) -> None:
        responses, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
        cuts = limits(run)
        gate = []
        for pair_set, name in zip(profile.pairs.sets, names, strict=True):
            pairs = persodpo.pairs.build_pairs(
                pair_set,
                responses=responses,
                scores=scores,
                dialogues=dialogues,
                limits=cuts,
                profile=profile,
            )
            if pairs.empty:
                raise PersodpoError(
                    f"No {pair_set} pairs: no prompt has both a response to choose and one to reject; {_MENDS[pair_set]}."
                )
            write_table(targets[name], name, pairs)
            gate.append(persodpo.gate.inspect_pairs(pairs, dialogues, profile.seed).assign(pair_set=pair_set))
        write_table(targets["pairs/gate"], "pairs/gate", pd.concat(gate, ignore_index=True))
        for left in {"pairs/simple", "pairs/perso"} - set(names):
            run.forget(left)

    report = run.stage(
        "pairs",
        inputs={name: run.path(name) for name in ("dialogues", "responses", "scores", "thresholds")},
        settings={
            "pairs": profile.pairs.model_dump(mode="json"),
            "prompts": profile.prompts.model_dump(mode="json"),
            "corrections": profile.switches("A4", "A10a", "A12"),
            "template": persodpo.prompts.load_template(profile.prompts.template),
            "seed": profile.seed,
        },
        outputs=[*names, "pairs/gate"],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )
    card = run_dataset_card(run)
    return [*reports, replace(report, notes=(f"what they would teach, and what to mind: {card}",))]


def limits(run: RunFolder) -> tuple[float, float]:
    """Return the low and high threshold of quality."""
    value = run.read("thresholds").set_index("name")["value"]
    return float(value["low"]), float(value["high"])
