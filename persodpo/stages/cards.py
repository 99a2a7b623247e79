"""Cards of pairs and arms: written anew whenever their stage is asked for, so that no stage depends on their code."""

from persodpo.cards import write_dataset_card as run_dataset_card
from persodpo.cards import write_model_card as run_model_card

__all__ = ["run_dataset_card", "run_model_card"]
