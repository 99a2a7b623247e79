"""A run's tables, provenance and records in; the cards of its pair sets and of its trained arms out.

A card is the ``README.md`` of a folder in the form of the Hugging Face Hub: settings that loaders read in front, then what
a reader must know before using what lies beside it. All that it says comes from the run folder, so the same tables give
the same card.
"""

from persodpo.cards.arms import model_card, write_model_card
from persodpo.cards.pairs import dataset_card, write_dataset_card

__all__ = ["dataset_card", "model_card", "write_dataset_card", "write_model_card"]
