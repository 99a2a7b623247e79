"""Cards of pairs and arms: written anew whenever their stage is looked into; no table depends on their code."""

from __future__ import annotations

from collections.abc import Sequence

from persodpo.runfolder import RunFolder
from persodpo.stages import evaluate
from persodpo.stages.train import source_of, trained
from persodpo.training.arms import label_of


def after_pairs(run: RunFolder) -> list[str]:
    """Write the card of the pair sets."""
    from persodpo.cards import write_dataset_card

    card = write_dataset_card(run)
    run.files.add(card)
    return [f"what the pairs would teach, and what to mind: {card}"]


def after_training(run: RunFolder, *, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[str]:
    """Write the cards of arms, without results: those that lie there may be of an earlier training."""
    from persodpo.cards import write_model_card

    for arm, seed in trained(run.profile, arms, seeds):
        write_model_card(run, label_of(arm, seed, run.profile.evaluation.seeds), source_of(run, arm))
    return []


def after_evaluation(run: RunFolder) -> list[str]:
    """Write the tables of the evaluation for reports, and the results into the cards of the arms that were evaluated."""
    from persodpo.cards import write_model_card

    notes = evaluate.after(run)
    if run.profile.evaluation.source == "arms":
        estimates, seeds = run.read("evaluation/estimates"), run.profile.evaluation.seeds
        for arm, seed in trained(run.profile, seeds=seeds):
            run.files.add(write_model_card(run, label_of(arm, seed, seeds), source_of(run, arm), estimates))
    return notes
