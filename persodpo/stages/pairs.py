"""From scores to pairs."""

from __future__ import annotations

import pandas as pd

import persodpo.completions
import persodpo.dialogues
import persodpo.gate
import persodpo.method
import persodpo.pairs
import persodpo.prompts
from persodpo.config import Profile
from persodpo.errors import PersodpoError
from persodpo.runfolder import RunFolder, StageReport
from persodpo.stages.base import Need, Targets
from persodpo.tables import write_table

#: What to do where a pair set is empty, for each that there is.
_MENDS = {
    "simple": "where no model ever fails, leave simple out of pairs.sets",
    "perso": "move pairs.low_quantile and pairs.high_quantile together or add models",
}


def needs(_profile: Profile) -> list[Need]:
    """Return what pairs follow from."""
    return [Need("score")]


def make_pairs(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Make the pair sets and their gate report."""
    profile = run.profile
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
        for left_out in _MENDS.keys() - set(profile.pairs.sets):
            run.forget(f"pairs/{left_out}")

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
    return [report]


def limits(run: RunFolder) -> tuple[float, float]:
    """Return the low and high threshold of quality."""
    value = run.read("thresholds").set_index("name")["value"]
    return float(value["low"]), float(value["high"])
