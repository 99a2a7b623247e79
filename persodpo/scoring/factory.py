"""A profile in, its four scorers out; nothing that loads a model is imported before a scorer is asked."""

from __future__ import annotations

from pathlib import Path

from persodpo.config import ENCODER, Profile
from persodpo.method import METRICS
from persodpo.scoring.coherence import CoherenceScorer
from persodpo.scoring.encoder import Encoder
from persodpo.scoring.heads import CoherenceHead, Head
from persodpo.scoring.models import Checkpoint
from persodpo.scoring.nli import Classifier, CScorer, NliModel, UEScorer, Way
from persodpo.scoring.persona import PersonaDistance, WordMeans
from persodpo.scoring.score import Scorer


def needs_heads(profile: Profile) -> bool:
    """Tell whether a profile scores with heads on the encoder."""
    models = profile.scoring.compute.models
    return ENCODER in (models.coherence, models.c_score, models.ue_score)


def make_scorers(profile: Profile, heads: Path | None) -> list[Scorer]:
    """Return the four scorers in the order of the metrics; models are loaded on first use.

    Args:
        profile: Models, their settings and corrections.
        heads: Folder that `persodpo.scoring.heads.make_heads` returned, where `needs_heads`.
    """
    encoder = Encoder(profile.scoring.encoder, profile.scoring.compute.batch_tokens)
    return [make_scorer(metric, profile, heads, encoder) for metric in METRICS]


def make_scorer(name: str, profile: Profile, heads: Path | None, encoder: Encoder | None = None) -> Scorer:
    """Return one scorer; arguments as in `make_scorers`, and one encoder for those that share it."""
    settings = profile.scoring.compute
    model = getattr(settings.models, name)
    encoder = encoder or Encoder(profile.scoring.encoder, settings.batch_tokens)
    if name == "persona_distance":
        way: Way = "corrected" if profile.corrects("A10c") else "as_released"
        if model != ENCODER and Path(model).is_file():
            return PersonaDistance(WordMeans(Path(model), way), way)
        return PersonaDistance(encoder if model == ENCODER else Encoder(model, settings.batch_tokens), way)
    head = Head.load(name, encoder, heads) if model == ENCODER and heads else None
    if name == "coherence":
        return CoherenceHead(head) if head else CoherenceScorer(Checkpoint(model), batch_tokens=settings.batch_tokens)
    labels = settings.labels.get("c_score" if name == "c_score" else "ue_score")
    classifier: Classifier = head or NliModel(
        Checkpoint(model), labels=labels, max_length=settings.nli_tokens, batch_tokens=settings.batch_tokens
    )
    return (CScorer if name == "c_score" else UEScorer)(
        classifier, "corrected" if profile.corrects("A10b") else "as_released"
    )
