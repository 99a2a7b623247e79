"""Cards of pairs and arms: written anew whenever their stage is asked for, so that no stage depends on their code."""

from __future__ import annotations

from collections.abc import Sequence

from persodpo.cards import write_dataset_card, write_model_card
from persodpo.runfolder import RunFolder
from persodpo.stages.train import source_of, trained
from persodpo.training.arms import label_of


def after_pairs(run: RunFolder) -> list[str]:
    """Write the card of the pair sets."""
    return [f"what the pairs would teach, and what to mind: {write_dataset_card(run)}"]


def after_training(run: RunFolder, *, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[str]:
    """Write the cards of arms."""
    for arm, seed in trained(run.profile, arms, seeds):
        write_model_card(run, label_of(arm, seed, run.profile.evaluation.seeds), source_of(run, arm))
    return []
