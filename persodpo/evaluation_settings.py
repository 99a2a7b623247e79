"""Settings of the evaluation: who answers the held-out dialogues, what is compared, and which ablations are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from persodpo.sections import Count, Section

ArmName = Literal["simple", "perso", "perso_weighted", "corrected"]
#: Beginnings of settings that can be changed without asking a model again.
_WITHOUT_ASKING = ("scoring.", "pairs.", "completions.", "training.")
#: Settings among those that decide where scores come from, or that an ablation names by itself.
_NOT_CHANGED = ("scoring.source", "scoring.compute", "scoring.weights", "training.arms", "pairs.sets")


class Ablation(Section):
    """One thing that is done otherwise than in the arm that all ablations start from.

    Attributes:
        name: Its name in tables and figures.
        changes: Settings, as after ``--set``.
        without: A signal whose weight becomes zero, the others keep their proportions.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ,_.-]*$")]
    changes: tuple[str, ...] = ()
    without: Literal["coherence", "c_score", "ue_score", "persona_distance", "compliance"] | None = None

    @model_validator(mode="after")
    def _asks_nothing_anew(self) -> Ablation:
        if not self.changes and self.without is None:
            raise ValueError(f"'{self.name}' changes nothing; give it changes, or name a signal with without")
        for change in self.changes:
            if not change.startswith(_WITHOUT_ASKING) or change.startswith(_NOT_CHANGED):
                raise ValueError(
                    f"'{change}' is no ablation: it must change a setting of {', '.join(_WITHOUT_ASKING)} but not "
                    f"{', '.join(_NOT_CHANGED)}; give it a run of its own with --set name=..."
                )
        return self


class Evaluation(Section):
    """Which arms are compared on the held-out dialogues, and how carefully.

    Attributes:
        source: ``published`` responses, or ``arms``: the starting policy (called ``base``) and the trained arms answer.
        seeds: Each arm is trained once under each; the first one's training is what figures and cards show.
        timed: Held-out dialogues that every arm answers one at a time, for its response times; None: all of them.
        batch_size: Prompts that an arm answers together on the others.
        resamples: Of the bootstrap.
        pairs: Arm and baseline.
        ablated: The arm that every ablation does one thing otherwise than.
        ablations: Which are trained, each under the first seed.
    """

    source: Literal["published", "arms"]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    timed: Count | None
    batch_size: Count
    resamples: Annotated[int, Field(ge=1000)]
    pairs: tuple[tuple[str, str], ...]
    ablated: ArmName
    ablations: tuple[Ablation, ...]

    @model_validator(mode="after")
    def _pairs_are_pairs(self) -> Evaluation:
        same = next((arm for arm, baseline in self.pairs if arm == baseline), None)
        if same is not None:
            raise ValueError(f"'{same}' cannot be compared with itself")
        if len(set(self.pairs)) < len(self.pairs):
            raise ValueError("a pair stands twice; name each once")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice; name each once")
        names = [ablation.name for ablation in self.ablations]
        if len(set(names)) < len(names):
            raise ValueError("two ablations have one name; give each its own")
        return self
