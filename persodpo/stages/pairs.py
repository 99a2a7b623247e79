"""From scores to pairs."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from persodpo.errors import PersodpoError
from persodpo.pairs import build_pairs
from persodpo.prompts import load_template
from persodpo.runfolder import RunFolder, StageReport, Tables

#: What to do where a pair set is empty, for each that there is.
_MENDS = {
    "simple": "where no model ever fails, leave simple out of pairs.sets",
    "perso": "move pairs.low_quantile and pairs.high_quantile together or add models",
}


def make_pairs(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Make the pair sets and their gate report."""
    profile = run.profile

    def build() -> Tables:
        from persodpo.gate import inspect_pairs

        frames = {name: run.read(name) for name in ("responses", "scores", "dialogues")}
        tables, gate = {}, []
        for name in profile.pairs.sets:
            pairs = build_pairs(name, limits=limits(run), profile=profile, **frames)
            if pairs.empty:
                raise PersodpoError(
                    f"No {name} pairs: no prompt has both a response to choose and one to reject; {_MENDS[name]}."
                )
            tables[f"pairs/{name}"] = pairs
            gate.append(inspect_pairs(pairs, frames["dialogues"], profile.seed).assign(pair_set=name))
        for left_out in _MENDS.keys() - set(profile.pairs.sets):
            run.forget(f"pairs/{left_out}")
        return tables | {"pairs/gate": pd.concat(gate, ignore_index=True)}

    report = run.stage(
        "pairs",
        build,
        reads=["dialogues", "responses", "scores", "thresholds"],
        settings={
            "pairs": profile.pairs.model_dump(mode="json"),
            "prompts": profile.prompts.model_dump(mode="json"),
            "corrections": profile.switches("A4", "A10a", "A12"),
            "template": load_template(profile.prompts.template),
            "seed": profile.seed,
        },
        outputs=[*(f"pairs/{name}" for name in profile.pairs.sets), "pairs/gate"],
        overwrite=overwrite,
    )
    gate = run.read("pairs/gate").set_index(["pair_set", "check"])["value"]
    notes = []
    for name in profile.pairs.sets:
        length, model = (float(gate[name, f"{feature}_alone"]) for feature in ("length", "source_model"))
        notes.append(
            f"{name}: length alone predicts {length:.0%} of the chosen sides, the source model alone {model:.0%}"
        )
    return [replace(report, notes=tuple(notes))]


def limits(run: RunFolder) -> tuple[float, float]:
    """Return the low and high threshold of quality."""
    value = run.read("thresholds").set_index("name")["value"]
    return float(value["low"]), float(value["high"])
