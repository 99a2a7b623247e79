"""From the tables of the release to its audit."""

from __future__ import annotations

from persodpo.config import NOT_OF_RESULTS, Profile, load_profile
from persodpo.release import audit, parity, published
from persodpo.release.checks import Material
from persodpo.release.fetch import fetch_release
from persodpo.runfolder import RunFolder, StageReport, Tables
from persodpo.stages.pairs import limits

#: Sections that do not touch what the audit judges.
_NO_CONCERN = ("policy", "training", "evaluation")


def as_released(profile: Profile) -> Profile:
    """Return the profile whose tables the audit judges.

    That is ``profile`` itself if its method is the released one; otherwise the shipped ``release`` profile with this
    one's folders and limits, under a name of its own, so that the tables of a corrected run stay as they are. Policy,
    training and evaluation are no concern of the audit.
    """
    released = load_profile("release")
    # How models would be asked is no concern of the audit either: only what is ranked.
    ranked = {key: getattr(released.generation, key) for key in ("source", "models")}
    generation = profile.generation.model_copy(update=ranked)
    unchanged = {key: getattr(profile, key) for key in ("home", "seed", "miniature", *_NO_CONCERN)}
    twin = released.model_copy(update={**unchanged, "generation": generation})
    mine, its = (one.model_dump(exclude={"name": True, **NOT_OF_RESULTS}) for one in (profile, twin))
    return profile if mine == its else twin.model_copy(update={"name": f"{profile.name}-as-released"})


def judge(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Make the parity table, the findings and the effect of every correction, on the tables as released."""
    profile, files = run.profile, fetch_release(run.release)
    names = ["dialogues", "responses", "scores", "thresholds", "pairs/simple", "pairs/perso", "pairs/gate"]

    def build() -> Tables:
        tables = {name: run.read(name) for name in names}
        low, high = limits(run)
        material = Material(files, tables, low, high, profile)
        return {
            "audit/parity": parity.parity_table(files, tables),
            "audit/findings": audit.findings_table(material),
            "audit/corrections": audit.correction_effects(material),
        }

    report = run.stage(
        "audit",
        build,
        reads=names,
        files=files | published.fact_files() | {"claims": audit.CLAIMS},
        settings=profile.model_dump(
            mode="json", exclude=NOT_OF_RESULTS | dict.fromkeys(("miniature", *_NO_CONCERN), True)
        ),
        outputs=["audit/parity", "audit/findings", "audit/corrections"],
        overwrite=overwrite,
    )
    return [report]
