"""The published files, recomputed: every number that the project claims to reproduce, asserted."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from conftest import QUICK_TRAINING

from persodpo.completions import read_completion
from persodpo.config import load_profile, with_overrides
from persodpo.errors import PersodpoError
from persodpo.files import PROJECT, sha256
from persodpo.release import audit, checks, published
from persodpo.release.checks import Material
from persodpo.release.fetch import fetch_release
from persodpo.run import Run
from persodpo.runfolder import RunFolder
from persodpo.stages import figures, make
from persodpo.stages.audit import as_released
from persodpo.stages.pairs import limits


def test_our_reading_is_the_published_one_text_by_text(release_run):
    """Not only counts: the text of every parsed response is the one in the published metric file."""
    files, responses = fetch_release(release_run.release), release_run.read("responses")
    for which in published.TRAIN_SETS:
        theirs = published.read_set(files, which)["parsed"].tolist()
        ours = responses[responses["model"] == which.model]
        kept = ours["response"].where(ours["outcome"] == "ok", None)
        assert [text if isinstance(text, str) else None for text in kept] == theirs, which.label


def test_thresholds_and_pairs_to_the_digit(release_run):
    assert limits(release_run) == (0.5817144197344534, 0.6790558069169542)
    simple, perso = release_run.read("pairs/simple"), release_run.read("pairs/perso")
    assert (len(simple), len(perso), perso["dialogue_id"].nunique()) == (12_452, 9_184, 1_316)
    assert (perso["score_chosen"] > perso["score_rejected"]).all()
    for table in (simple, perso):
        assert (table["chosen"] != table["rejected"]).all()
        assert not table.duplicated(["dialogue_id", "chosen_model", "rejected_model"]).any()
    assert perso["rejected"].map(lambda text: read_completion(text).response is not None).all()


def test_parity_verdicts(release_run):
    """Reproduced, differs, not derivable: of each group of published numbers; the results table cell by cell."""
    parity = release_run.read("audit/parity")
    counts = pd.crosstab(parity["group"], parity["verdict"])[["reproduced", "differs", "not derivable"]]
    assert counts.T.to_dict("list") == {
        "preparation": [3, 0, 2], "responses": [12, 0, 0], "quality": [5, 0, 0], "pairs": [4, 0, 0],
        "training log, simple": [3, 1, 0], "training log, perso": [4, 0, 0], "results table": [18, 12, 24],
        "figure 2a": [4, 0, 0],
    }  # fmt: skip
    cells, table = parity[parity["group"] == "results table"], published.results_table().set_index("Model")
    places = cells["quantity"].str.rsplit(": ", n=1)
    assert [table.loc[row, column] for row, column in places] == cells["published"].tolist()
    assert len(cells) == table.size == 54


def test_findings_say_what_they_rest_on(release_run):
    evidence = release_run.read("audit/findings").set_index("id")["evidence"]
    assert list(evidence.index) == [f"A{n}" for n in range(1, 25)]
    for number, words in {
        "A1": "1,490 rows hold the scores of 193 responses", "A3": "1.000; 0 of 10,347", "A4": "72% of the 4,139",
        "A5": "2,979 of 3,137", "A7": "0.803 in its raw file, 0.397 in its metric file, 0.29 and 0.221",
        "A11": "17 responses", "A12": "1 context and 8 persona sets", "A13": "9,024", "A9": "3 completions hold the literal",
        "A18": "1,300 of 7,363", "A20": "Qwen2-0.5B-Instruct 136", "A22": "7,428 responses by model are 7,424 texts",
    }.items():  # fmt: skip
        assert words in evidence[number], number


def test_a_check_can_fail(release_run):
    """The coherence check refutes its claim on columns that are not scrambled."""
    names = ("dialogues", "responses", "scores")
    tables = {name: release_run.read(name) for name in names}
    material = Material(fetch_release(release_run.release), tables, *limits(release_run), release_run.profile)
    draw = np.random.default_rng(0)
    for label, frame in material.sets.items():
        material.sets[label] = frame.assign(coherence=draw.random(len(frame)))
    assert audit.FINDINGS[0].judge(material)[0] == "refuted"
    assert checks.scored_response(400)[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 1, 2]


def test_settings_named_by_findings_exist_and_act(release_run):
    table = release_run.read("audit/corrections").set_index("correction")
    named = audit.mended_findings()
    assert set(table["settings"]) == {"", *named, " ".join(named)}
    assert table.loc["as released", ["pairs", "shared_pairs", "jaccard"]].tolist() == [9_184, 9_184, 1.0]
    texts_only = {"A4", "A10"}
    for correction in set(table.index) - {"as released"} - texts_only:
        assert table.loc[correction, "jaccard"] < 1, correction
    assert len(audit.FINDINGS) == len({finding.id for finding in audit.FINDINGS})


def test_a_corrected_profile_is_audited_as_released(release_run):
    corrected = with_overrides(release_run.profile, ["corrections=[A18]"])
    twin = as_released(corrected)
    assert (twin.name, twin.reading) == ("release-as-released", "as_released")
    assert as_released(release_run.profile) is release_run.profile


@pytest.mark.slow
def test_corrected_pairs_keep_completions_and_a_set_that_is_no_longer_made_is_removed(release_run, tmp_path):
    corrected = with_overrides(release_run.profile, [f"home={tmp_path}", "corrections=[A4]"])
    run = RunFolder(corrected)
    make(corrected, "pairs")
    made, completions = run.read("pairs/perso"), set(release_run.read("responses")["completion"])
    assert set(made["chosen"]) | set(made["rejected"]) <= completions
    assert len(made) == 9_184
    make(with_overrides(corrected, ["pairs.sets=[simple]"]), "pairs")
    assert run.path("pairs/simple").exists()
    assert not run.path("pairs/perso").exists()


def test_a_run_makes_stages_reads_tables_and_draws_figures(release_run, tmp_path):
    source = tmp_path / "profile.yaml"
    source.write_text(release_run.profile.to_yaml())
    run = Run(source, [f"home={tmp_path}", "pairs.high_quantile=0.75"], seed=7)
    assert (run.settings.seed, run.settings.pairs.high_quantile) == (7, 0.75)
    same = Run(release_run.profile)
    assert [report.skipped for report in same.make("audit")] == [True] * 6
    assert len(same.table("pairs/perso")) == 9_184
    assert same.figure("quality").axes
    with pytest.raises(PersodpoError, match="no figure 'qualities'"):
        same.figure("qualities")
    with pytest.raises(PersodpoError, match="no stage 'pair'"):
        same.make("pair")


def test_committed_figures_show_the_data_of_this_run(release_run):
    for name in figures.figure_names(release_run):
        if name.endswith("_arms"):  # drawn where arms are trained
            continue
        record = json.loads((PROJECT / "figures" / "release" / f"{name}.json").read_text())
        for table, digest in record["inputs"].items():
            if table.startswith(("pairs/", "evaluation/")) or table in {"responses", "scores", "thresholds"}:
                assert sha256(release_run.path(table)) == digest, (name, table)


def test_figures_are_skipped_when_nothing_changed_and_drawn_when_something_did(release_run):
    figures.save_figure(release_run, "quality")
    assert figures.save_figure(release_run, "quality").skipped
    (release_run.figures / "quality.pdf").write_bytes(b"edited")
    assert not figures.save_figure(release_run, "quality").skipped


@pytest.mark.slow
def test_arms_train_on_the_published_pairs_and_are_skipped_when_nothing_changed(release_run, tmp_path):
    places = [f"home={tmp_path}"]
    fewer = ["generation.models=[Qwen2-0.5B-Instruct, gpt-4-turbo]", "training.arms=[simple, corrected]"]
    profile = with_overrides(release_run.profile, [*places, *QUICK_TRAINING, *fewer])
    run = RunFolder(profile)
    reports = make(profile, "train")
    assert [report.stage for report in reports if not report.skipped][-1] == "train corrected"
    assert run.provenance("training/simple/log")["inputs"]["pairs/simple"] == sha256(run.path("pairs/simple"))
    corrected = RunFolder(with_overrides(profile, ["name=release-corrected"]))
    used = run.provenance("training/corrected/log")["inputs"]
    assert used["pairs/perso"] == sha256(corrected.path("pairs/perso")) != sha256(run.path("pairs/perso"))
    starts = [
        run.provenance(f"training/{arm}/log")["inputs"]["policy/model.safetensors"] for arm in ("simple", "corrected")
    ]
    assert starts == [sha256(run.root / "policy" / "model.safetensors")] * 2
    assert all(report.skipped for report in make(profile, "train"))
    (run.root / "training" / "simple" / "model.safetensors").unlink()
    again = make(profile, "train", arms=["simple"])
    assert [report.stage for report in again if not report.skipped] == ["train simple"]
    assert run.read("training/simple/log")["policy"].str.startswith("small policy").all()


def test_an_arm_without_its_pairs_is_one_sentence(tmp_path):
    profile = load_profile("release", [f"home={tmp_path}", "pairs.sets=[simple]"])
    with pytest.raises(PersodpoError, match=r"Arm perso trains on perso pairs; add perso to pairs\.sets"):
        make(profile, "train")


@pytest.mark.slow
def test_scorers_on_the_encoder_pass_their_probes_and_score_the_published_responses(release_run, tmp_path):
    changes = [f"home={tmp_path}", "scoring.source=compute", "generation.models=[Qwen2-7B-Instruct]"]
    profile = with_overrides(release_run.profile, changes)
    run = RunFolder(profile)
    report = make(profile, "score")[-1]
    assert not any(note.startswith("warning") for note in report.notes)
    assert run.read("probes")["passed"].all()
    ours, theirs = (each.read("scores") for each in (run, release_run))
    both = ours.merge(theirs, on=["dialogue_id", "model"], suffixes=("", "_published"))
    assert len(both) == 1_500
    assert (both["quality"].isna() == both["quality_published"].isna()).all()
    assert (both["imputed"] == both["imputed_published"]).all()
    measured = both[~both["imputed"] & both["quality"].notna()]
    assert measured[["persona_distance", "persona_distance_published"]].corr("spearman").iloc[0, 1] > 0.3
    again = make(profile, "score", overwrite=True)[-1]
    assert all(", 0 from the cache" not in note for note in again.notes)
    accuracy = (
        run.read("scorers").query("table == 'heads'").pivot_table(index="scorer", columns="quantity", values="value")
    )
    assert (accuracy["head_accuracy"] > accuracy["head_majority"] + 0.05).all()
    assert len(accuracy) == 3
