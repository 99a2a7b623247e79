"""Run folders: what is skipped, what is refused, and what an interrupted stage leaves behind."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pandas.testing import assert_frame_equal

from persodpo import imports, stages
from persodpo.config import with_overrides
from persodpo.errors import PersodpoError
from persodpo.files import DATA, PROJECT, sha256
from persodpo.generation.requests import Answer
from persodpo.generation.store import Entry, Store
from persodpo.prompts import load_template
from persodpo.runfolder import RunFolder, provenance_path
from persodpo.stages.base import Stage
from persodpo.tables import SCHEMAS, check_table, write_table

THRESHOLDS = pd.DataFrame({"name": ["low", "high"], "value": [0.4, 0.6]})


def make(run: RunFolder, table: pd.DataFrame = THRESHOLDS, **changes):
    """Run a small stage that writes one table."""
    source = run.root.parent / "input.txt"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(changes.pop("content", "same"))
    arguments = {"files": {"text": source}, "settings": {"a": (1, 2)}, "outputs": ["thresholds"]}
    return run.stage("score", changes.pop("build", lambda: {"thresholds": table}), **(arguments | changes))


def of_other_code() -> dict[str, pd.DataFrame]:
    """Build in another module, as it were."""
    return {"thresholds": THRESHOLDS}


of_other_code.__module__ = "persodpo.prompts"


def test_a_stage_runs_once_says_so_and_writes_what_made_its_table(profile):
    run = RunFolder(profile)
    first, second = make(run), make(run)
    assert (first.skipped, second.skipped) == (False, True)
    assert "written" in str(first)
    assert "unchanged, skipped" in str(second)
    unnamed = THRESHOLDS.assign(name=["low", None])
    make(run, unnamed, overwrite=True)
    assert run.read("thresholds")["name"].tolist() == ["low", None], "missing text reads as None"
    make(run, overwrite=True)
    assert_frame_equal(run.read("thresholds"), THRESHOLDS, check_dtype=False)
    provenance = run.provenance("thresholds")
    assert provenance["inputs"] == {"text": sha256(run.root.parent / "input.txt")}
    assert provenance["sha256"] == sha256(run.path("thresholds"))
    assert (provenance["rows"], provenance["profile_sha256"]) == (2, profile.digest())
    assert {"python", "polars", "pyarrow"} <= set(provenance["versions"])
    assert {"commit", "seconds", "settings", "code"} <= set(provenance)
    assert (run.root / "profile.yaml").read_text() == profile.to_yaml()


@pytest.mark.parametrize(
    "change",
    [{"content": "other"}, {"settings": {"a": (1, 3)}}, {"build": of_other_code}, {"overwrite": True}],
)
def test_a_stage_runs_again_when_anything_it_depends_on_changed(profile, change):
    run = RunFolder(profile)
    make(run)
    assert not make(run, **change).skipped


def test_a_table_and_its_record_under_another_name_are_refused(profile):
    run = RunFolder(profile)
    make(run)
    gate = pd.DataFrame({"pair_set": ["perso"], "check": ["pairs"], "value": [1.0], "meaning": ["rows"]})
    run.path("pairs/gate").parent.mkdir()
    write_table(run.path("pairs/gate"), "pairs/gate", gate)
    record = run.provenance("thresholds") | {"sha256": sha256(run.path("pairs/gate"))}
    provenance_path(run.path("pairs/gate")).write_text(json.dumps(record))
    with pytest.raises(PersodpoError, match="does not match its provenance file"):
        run.read("pairs/gate")


def test_a_table_that_was_edited_or_whose_stage_was_killed_is_refused_and_made_again(profile):
    run = RunFolder(profile)
    make(run)
    write_table(run.path("thresholds"), "thresholds", THRESHOLDS.assign(value=[0.1, 0.9]))
    with pytest.raises(PersodpoError, match=r"does not match its provenance.*persodpo score --profile release"):
        run.read("thresholds")
    assert not make(run).skipped
    assert_frame_equal(run.read("thresholds"), THRESHOLDS, check_dtype=False)
    provenance_path(run.path("thresholds")).write_text("{")
    assert not make(run).skipped


def test_missing_tables_and_inputs_name_the_remedy(profile, tmp_path):
    run = RunFolder(profile)
    with pytest.raises(PersodpoError, match=r"pairs/perso is missing .*`persodpo pairs --profile release`"):
        run.read("pairs/perso")
    with pytest.raises(PersodpoError, match=r"score needs .*nowhere, which does not exist"):
        make(run, files={"x": tmp_path / "nowhere"})


def read_only():
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (lambda: 1 / 0, "division by zero"),
        (lambda: Path("/dev/full").write_bytes(b"x" * 100_000), r"disk holding .* is full; free some space"),
        (read_only, "cannot be written"),
    ],
)
def test_a_stage_that_fails_leaves_the_last_table(profile, fails, says):
    """The writer meets a device that is really full."""
    run = RunFolder(profile)
    make(run)
    with pytest.raises((PersodpoError, ZeroDivisionError), match=says):
        make(run, build=fails, overwrite=True)
    assert_frame_equal(run.read("thresholds"), THRESHOLDS, check_dtype=False)
    assert sorted(path.name for path in run.root.iterdir()) == [
        "profile.yaml",
        "thresholds.parquet",
        "thresholds.parquet.json",
    ]


def child(folder: Path, body: str) -> subprocess.Popen:
    """Start a process with the run folder of `profile` as ``run``."""
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    here += "import time; from pathlib import Path; from conftest import profile_in; from test_runfolder import *\n"
    here += f"run = RunFolder(profile_in(Path({str(folder)!r})))\n"
    return subprocess.Popen([sys.executable, "-c", here + textwrap.dedent(body)], stdout=subprocess.PIPE, text=True)


def test_a_killed_stage_leaves_the_last_table_and_a_rerun_mends(profile, tmp_path):
    """SIGKILL while the stage writes: the old table stays whole, the next run makes the new one."""
    run = RunFolder(profile)
    make(run)
    process = child(tmp_path, """
        from persodpo import runfolder
        def write_table(path, *_):
            path.write_bytes(b"PAR1")
            print("writing", flush=True)
            time.sleep(60)
        runfolder.write_table = write_table
        make(run, overwrite=True)
    """)  # fmt: skip
    assert process.stdout.readline().strip() == "writing"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(run.root.glob(".partial-*"))
    assert_frame_equal(run.read("thresholds"), THRESHOLDS, check_dtype=False)
    changed = THRESHOLDS.assign(value=[0.2, 0.8])
    assert not make(run, changed, settings={"a": 9}).skipped
    assert_frame_equal(run.read("thresholds"), changed, check_dtype=False)
    assert not list(tmp_path.rglob(".partial-*"))


def test_tables_are_refused_by_name(tmp_path):
    path = tmp_path / "t.parquet"
    for table, says in (
        (THRESHOLDS[["name"]], "Table thresholds, which has name: .*value"),
        (THRESHOLDS.assign(value=["a", "b"]), "Table thresholds"),
    ):
        with pytest.raises(PersodpoError, match=says):
            write_table(path, "thresholds", table)
    row = dict.fromkeys(SCHEMAS["responses"].names) | {"dialogue_id": "d", "split": "train", "model": None}
    with pytest.raises(PersodpoError, match="responses: model must not be null"):
        write_table(path, "responses", pd.DataFrame([row]))
    for columns, kind in (({"name": ["low"], "value": ["0.4"]}, "string"), ({"name": ["low"]}, "missing")):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(PersodpoError, match=f"column value is {kind}, it must be double"):
            check_table(path, "thresholds")
    path.write_bytes(b"PAR1 no")
    with pytest.raises(PersodpoError, match="not a readable Parquet file"):
        check_table(path, "thresholds")


@pytest.mark.slow
def test_a_second_process_in_a_run_folder_says_so_and_stops(profile, tmp_path):
    run, body = RunFolder(profile), """
        try:
            with run.locked():
                print("worked")
        except PersodpoError as error:
            print(error)
    """  # fmt: skip
    with run.locked(), run.locked():
        said, _ = child(tmp_path, body).communicate()
        assert "Another process works in" in said
        assert "--set name=another" in said
    assert child(tmp_path, body).communicate()[0] == "worked\n"
    shutil.rmtree(run.root.parent)
    run.root.parent.write_text("a file where the folder should be")
    with pytest.raises(PersodpoError, match=r"cannot be created .* choose another folder"), run.locked():
        pass


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """Names of the stages that are looked into, as they are."""
    names = []

    def watched(name, run):
        @functools.wraps(run)
        def watch(*args, **options):
            names.append(name)
            return run(*args, **options)

        return watch

    for name, stage in stages.STAGES.items():
        monkeypatch.setitem(stages.STAGES, name, replace(stage, run=watched(name, stage.run)))
    return names


def with_own_data(profile, folder):
    """Return a profile that reads a copy of the example's files in a folder."""
    for name in ("dialogues.csv", "completions.csv"):
        shutil.copy(DATA / "example" / name, folder / name)
    (folder / "mine.txt").write_text(load_template("plain"))
    return with_overrides(profile, [
        f"dialogues.source={folder / 'dialogues.csv'}", f"generation.source={folder / 'completions.csv'}",
        f"prompts.template={folder / 'mine.txt'}",
    ])  # fmt: skip


def test_a_stage_of_which_nothing_has_changed_is_not_even_looked_into(profile, tmp_path, runs):
    completions, template = tmp_path / "completions.csv", tmp_path / "mine.txt"
    own = with_own_data(profile, tmp_path)
    run, made = RunFolder(own), stages.make(own, "generate")
    assert runs == ["dialogues", "generate"]
    again = stages.make(own, "generate")
    assert runs == ["dialogues", "generate"]
    assert [(one.stage, one.rows, one.skipped) for one in again] == [(one.stage, one.rows, True) for one in made]

    def edit_table() -> None:
        write_table(run.path("responses"), "responses", run.read("responses").assign(response="other"))

    def edit_record() -> None:
        provenance_path(run.path("dialogues")).unlink()

    changes = [
        (edit_table, ["generate"]), (edit_record, ["dialogues"]),
        (lambda: completions.write_text(completions.read_text() + "\n"), ["dialogues", "generate"]),
        (lambda: template.write_text(template.read_text() + "\n."), ["dialogues", "generate"]),
    ]  # fmt: skip
    for change, expected in changes:
        change()
        runs.clear()
        stages.make(own, "generate")
        assert runs == expected
        stages.make(own, "generate")
        assert runs == expected
    runs.clear()
    stages.make(own, "generate", overwrite=True)
    stages.make(with_overrides(own, ["corrections=[A18]"]), "dialogues")
    assert runs == ["generate", "dialogues"]


def test_links_edits_and_damaged_records_skip_nothing(profile, tmp_path, runs, monkeypatch):
    own = with_own_data(profile, tmp_path)
    csv, elsewhere = tmp_path / "dialogues.csv", tmp_path / "on" / "another" / "disk"
    elsewhere.mkdir(parents=True)
    (tmp_path / "runs").symlink_to(elsewhere)

    def looked_into(profile=own) -> list[str]:
        runs.clear()
        stages.make(profile, "dialogues")
        return [*runs]

    assert [looked_into(), looked_into()] == [["dialogues"], []]
    csv.write_text(csv.read_text() + "\n")
    assert [looked_into(), looked_into()] == [["dialogues"], []]
    shutil.copytree(elsewhere, tmp_path / "copy" / "runs")
    assert looked_into(with_overrides(own, [f"home={tmp_path / 'copy'}"])) == ["dialogues"]
    looked_into()

    read = stages.dialogues.read_dialogues

    def edited_meanwhile(*arguments, **options):
        table = read(*arguments, **options)
        csv.write_text(csv.read_text() + "\n")
        return table

    csv.write_text(csv.read_text() + "\n")
    monkeypatch.setattr(stages.dialogues, "read_dialogues", edited_meanwhile)
    assert looked_into() == ["dialogues"]
    monkeypatch.setattr(stages.dialogues, "read_dialogues", read)
    assert [looked_into(), looked_into()] == [["dialogues"], []]

    run = RunFolder(own)
    (run.root / "profile.yaml").unlink()
    assert looked_into() == []
    assert (run.root / "profile.yaml").is_file()
    record = run.root / "stages" / "dialogues.json"
    for damage in ({"files": None}, {"answers": 5}, {"reports": [1]}):
        record.write_text(json.dumps(json.loads(record.read_text()) | damage))
        assert [looked_into(), looked_into()] == [["dialogues"], []]


def test_answers_that_came_meanwhile_are_looked_at(profile, monkeypatch):
    looked = []

    def reads_answers(run, overwrite):
        looked.append(run)
        run.asked.add("m")
        return [make(run)]

    monkeypatch.setitem(stages.STAGES, "generate", Stage(reads_answers))

    def looked_into() -> bool:
        looked.clear()
        stages.make(profile, "generate")
        return bool(looked)

    assert [looked_into(), looked_into()] == [True, False]
    with Store(RunFolder(profile).answers) as store:
        assert looked_into()
        store.write([Entry("k", "other", "t", 1, Answer("answered", "x"))])
        assert not looked_into()
        store.write([Entry("l", "m", "t", 1, Answer("answered", "x"))])
        assert looked_into()
        store._connection.execute("UPDATE answers SET completion = 'y' WHERE key = 'l'")
        assert looked_into()


STAGES = ("dialogues", "generate", "score", "pairs", "train", "heldout", "evaluate", "ablate", "audit")
#: A module, and the stages that run again when it changes: what lists kept by hand once forgot.
RUN_AGAIN = {
    "training.arms": {"train", "heldout", "evaluate", "ablate"},
    "completions": set(STAGES),
    "method": set(STAGES) - {"dialogues"},
    "gate": {"pairs", "audit"},
    "evaluation.statistics": {"evaluate", "ablate"},
    "scoring.signals": {"score", "heldout", "evaluate", "ablate"},
    "generation.local": {"generate", "heldout", "evaluate", "ablate"},
    "cards": set(),
    "cli": set(),
}


def test_a_changed_module_runs_the_stages_again_that_import_it(monkeypatch):
    """Every module of the package is touched in turn; the digest of a stage changes where its imports lead there."""
    stages = [f"persodpo.stages.{name}" for name in STAGES]
    digest, source = imports.code_of.__wrapped__, imports._source
    before = {stage: digest(stage) for stage in stages}
    touched, again = [], {}
    monkeypatch.setattr(imports, "_source", lambda name: f"{source(name)}#" if name in touched else source(name))
    package = PROJECT / "persodpo"
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
        touched[:] = [name]
        again[name] = {stage for stage in stages if digest(stage) != before[stage]}
        assert again[name] == {stage for stage in stages if name in imports.imported_modules(stage)}
    for name, expected in RUN_AGAIN.items():
        assert {stage.rpartition(".")[2] for stage in again[f"persodpo.{name}"]} == expected, name
    idle = {name.removeprefix("persodpo.") for name, rerun in again.items() if not rerun and "__init__" not in name}
    assert {name for name in idle if not name.startswith("figures.")} == {
        "cards", "cli", "doctor", "explore", "explore_views", "report", "reproduce", "run", "show",
        "stages.cards", "stages.figures",
    }  # fmt: skip
