"""Each arm of the miniature at several learning rates, judged on dialogues that are in none of its tables.

Run by `python benchmarks/mini_rates.py` after `persodpo pairs -p mini`. Its table chose the earlier learning rate of
profile `mini`, 6e-4: by the judge, one seed. `docs/miniature.md` says why it is half of that now.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pandas as pd
from measuring import RESULTS, pipes

from persodpo.completions import repeats_sentence
from persodpo.config import ArmName, TransformersModel, load_profile, with_overrides
from persodpo.dialogues import focus_json
from persodpo.generation.ask import generate_all
from persodpo.generation.store import Store
from persodpo.generation.summary import stored_answers
from persodpo.miniature.judge import judge
from persodpo.miniature.world import focus_world
from persodpo.pairs import measured, rebuild
from persodpo.runfolder import RunFolder
from persodpo.stages.generate import job_for
from persodpo.stages.policy import start_policy
from persodpo.stages.train import corrected
from persodpo.training.arms import ARMS
from persodpo.training.run import train_arm

#: Dialogues to judge, and the number of the first: no run and no model of the miniature has one of them.
DIALOGUES, FIRST = 150, 500_000
RATES = (3e-4, 6e-4, 9e-4)
TRIED: tuple[ArmName, ...] = ("simple", "perso_weighted", "corrected")
COLUMNS = ("grounded", "repeats", "failures", "reward accuracy")


def main() -> None:
    """Train, ask and judge, and write the table."""
    run = RunFolder(load_profile("mini"))
    start, rows = start_policy(run), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = folder / "world.json"
        world.write_text(json.dumps(focus_world(DIALOGUES, run.profile.seed, FIRST)))
        dialogues = focus_json(world, "valid")
        rows.append(["base", "", *judged(run, start, dialogues, folder), "–"])
        for arm in TRIED:
            pairs = pairs_of(run, arm)
            for rate in RATES:
                profile = with_overrides(run.profile, [f"training.learning_rate={rate!r}"])
                made = train_arm(pairs, arm, start, folder / arm, profile=profile, key=f"{arm} {rate}")
                accuracy = made.log.loc[made.log["kind"] == "eval", "reward_accuracy"].iloc[-1]
                rows.append([arm, f"{rate:g}", *judged(run, folder / arm, dialogues, folder), f"{accuracy:.3f}"])
    (RESULTS / "mini-rates.md").write_text(pipes(["arm", "learning rate", *COLUMNS], rows) + "\n")


def pairs_of(run: RunFolder, arm: ArmName) -> pd.DataFrame:
    """Return the pairs of an arm."""
    profile = corrected(run.profile) if ARMS[arm].corrected else run.profile
    responses, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
    return rebuild(responses, measured(responses, scores), dialogues, profile, ARMS[arm].pairs).pairs


def judged(run: RunFolder, weights: str | Path, dialogues: pd.DataFrame, folder: Path) -> list[str]:
    """Return the shares of answers that are grounded, that repeat a sentence and that cannot be read."""
    entry = TransformersModel(model="tried", weights=str(weights), batch_size=DIALOGUES)
    with Store(folder / "answers.sqlite") as store:
        jobs = [job_for(dialogues, entry, run.profile, weights) for _ in "ab"]
        generate_all(jobs[:1], store, reading=run.profile.reading)
        answers = stored_answers(store, [(jobs[1], dialogues["split"].tolist())], run.profile.reading)
    repeats = answers["response"].fillna("").map(repeats_sentence)
    shares = (judge(dialogues, answers)["grounded"], repeats, answers["outcome"] != "ok")
    return [f"{share.mean():.3f}" for share in shares]


if __name__ == "__main__":
    main()
