"""README and docs: commands parse, examples run, links and files exist, numbers are those that were measured."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from typer.testing import CliRunner

from persodpo import method
from persodpo.cli import app
from persodpo.config import load_profile
from persodpo.files import PROJECT
from persodpo.pairs import pair_keys
from persodpo.reproduce import check_parameters, notebook_files
from persodpo.runfolder import RunFolder
from persodpo.tables import SCHEMAS
from persodpo.training.loss import LossSettings, Pairs, pair_losses, pair_weights

sys.path.append(str(PROJECT / "benchmarks"))
import write_docs

README = PROJECT / "README.md"
PAGES = [README, *sorted((PROJECT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


def commands(page: str) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    links = re.findall(r"\]\((?!http)([^)]+)\)", page.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_are_those_that_were_measured(page):
    """After a benchmark, `make docs` writes them anew."""
    assert write_docs.fill(page.read_text()) == page.read_text()


def test_the_readme_is_short_and_every_page_is_linked_from_it():
    assert TEXTS["README.md"].count("\n") <= 200
    assert {page.name for page in PAGES[1:]} <= set(re.findall(r"\(docs/([\w-]+\.md)", TEXTS["README.md"]))


def test_the_layout_is_the_tree():
    """Every folder, notebook and file of the top level; of the package's modules those that are worth a line."""
    tree = TEXTS["README.md"].split("## Layout")[1].split("```")[1]
    package = re.findall(r"^  ([\w./]+)", tree, re.MULTILINE)
    assert [name for name in package if not (PROJECT / "persodpo" / name).exists()] == []
    folders = {f"{path.parent.name}/" for path in (PROJECT / "persodpo").glob("*/__init__.py")}
    assert folders <= set(package)
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=PROJECT).stdout
    tops = {path.split("/")[0] for path in tracked.splitlines()} - {".gitignore", ".ci"}
    words = set(re.findall(r"[\w.-]+", tree))
    assert tops <= words
    listed = re.findall(r"\(notebooks/([\w.]+)\)", TEXTS["README.md"].split("## Notebooks")[1])
    assert listed == [path.name for path in notebook_files()]


def test_every_table_is_described():
    for name in SCHEMAS:
        assert f"`{name}.parquet`" in TEXTS["run-folder.md"], name


@pytest.mark.parametrize(("page", "command"), [(page, one) for page in TEXTS for one in commands(page)])
def test_commands_parse(page, command):
    """What each does is shown by the tests of its stage, and by the examples below."""
    words = list(itertools.takewhile(lambda word: word not in {"&", ">"}, shlex.split(command)))
    words = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=\S*", word), words))
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], capture_output=True, text=True, cwd=PROJECT, check=False)
        assert done.returncode == 0, done.stderr
    elif words[0] == "cp":
        assert (PROJECT / words[1]).is_file()
    elif words[0] == "papermill":
        values = {name: value for flag, name, value in zip(words, words[1:], words[2:], strict=False) if flag == "-p"}
        check_parameters(PROJECT / words[1], values)
    elif words[0] == "accelerate":
        script = launch_command_parser().parse_args(words[2:]).training_script
        assert words[1] == "launch"
        assert f"`{script}`" in TEXTS[page]
    else:
        assert words[0] == "persodpo"
        typer.main.get_command(app).commands[words[1]].make_context(words[1], words[2:])
        if "--set" in words:
            load_profile("release", [value for flag, value in itertools.pairwise(words) if flag == "--set"])


def the_method() -> dict:
    """Run the README's code."""
    (code,) = blocks("README.md", "python")
    names: dict = {}
    exec(code, names)  # noqa: S102 - the project's own page
    return names


def test_the_methods_code_is_the_packages():
    drawn, by_hand = np.random.default_rng(44), the_method()
    scores = pd.DataFrame(drawn.normal(size=(400, 4)), columns=list(method.METRICS))
    scores = scores.assign(dialogue_id=np.arange(400) // 5, model=np.arange(400) % 5, words=drawn.integers(1, 90, 400))
    weights = load_profile("release").scoring.weights.model_dump()
    scale = method.measure_scale(pl.from_pandas(scores))
    rated = method.rate(pl.from_pandas(scores.assign(one_object=False)), scale, weights)
    scores["quality"] = by_hand["quality"](scores, weights, scale.target_words)
    np.testing.assert_allclose(scores["quality"], rated["quality"], rtol=0, atol=1e-12)
    expected = method.perso_pairs(rated, *method.thresholds(rated, 0.4, 0.6)).to_pandas()
    pairs = by_hand["perso_pairs"](scores)
    keys = ["dialogue_id", "model_chosen", "model_rejected"]
    assert len(pairs) > 100
    assert sorted(map(tuple, pairs[keys].to_numpy())) == sorted(map(tuple, expected[keys].to_numpy()))
    ratios = torch.randn(2, len(pairs), generator=torch.Generator().manual_seed(44))
    margins = [torch.tensor(pairs[f"quality_{side}"].to_numpy()) for side in ("chosen", "rejected")]
    weight = pair_weights(*margins, "sigmoid")
    losses = pair_losses(Pairs(*ratios, *torch.ones(2, len(pairs))), LossSettings())
    assert torch.allclose(by_hand["weighted_loss"](*ratios, *margins), (weight / weight.mean() * losses).mean())


def test_the_methods_code_makes_the_published_pairs(release_run):
    """Quality, thresholds and all 9,184 pairs; failures of a text are in the pool with the worst values."""
    by_hand, scores = the_method(), release_run.read("scores")
    pool = scores[scores["quality"].notna()].copy()
    weights = release_run.profile.scoring.weights.model_dump()
    pool["quality"] = by_hand["quality"](pool, weights, int(pool["words"].mean()))
    np.testing.assert_allclose(pool["quality"], scores["quality"].dropna(), rtol=0, atol=1e-12)
    pairs = by_hand["perso_pairs"](pool)
    keys = set(zip(pairs["dialogue_id"], pairs["model_chosen"], pairs["model_rejected"], strict=True))
    assert keys == pair_keys(release_run.read("pairs/perso"))
    text = TEXTS["README.md"]
    assert all(f"{weight:.2f}" in text for weight in weights.values())


def test_what_is_said_of_the_release_is_what_was_found(release_run):
    parity, findings = release_run.read("audit/parity"), release_run.read("audit/findings").set_index("id")
    counts = parity["verdict"].value_counts()
    text = " ".join(TEXTS["README.md"].split())
    assert f"Of {len(parity)} published numbers, {counts['reproduced']} are reproduced" in text
    assert f"{counts['differs']} differ" in text
    assert f"{counts['not derivable']} cannot be derived" in text
    assert f"{len(findings)} findings" in text
    table = pd.crosstab(parity["group"], parity["verdict"])
    for group, row in table[["reproduced", "differs", "not derivable"]].iterrows():
        assert f"| {group} | {' | '.join(map(str, row))} |" in TEXTS["audit.md"]
    paragraph = TEXTS["audit.md"].split("every published number follows to the last digit:")[1].split(". Prompts")[0]
    published = set(parity.loc[parity["verdict"] == "reproduced", "published"])
    assert [one for one in re.findall(r"\d[\d,.]*\d", paragraph) if one.replace(",", "") not in published] == []
    for name, said in re.findall(r"^- \*\*(A\d+)\*\* (.*)$", TEXTS["README.md"], re.MULTILINE):
        known = " ".join(findings.loc[name, ["claim", "evidence", "consequence"]])
        numbers = r"(?<![\w.])(?:\d[\d,.]*\d|\d)"
        assert set(re.findall(numbers, said)) <= set(re.findall(numbers, known)), (name, known)


def test_an_answer_can_be_forecast(tmp_path, monkeypatch):
    """docs/models.md, without its keys: nothing is sent."""
    (profile,) = blocks("models.md", "yaml")
    assert set(yaml.safe_load(profile)) == {"dialogues", "generation"}
    path = tmp_path / "ask.yaml"
    path.write_text(f"{profile}home: {tmp_path}\n")
    (dry,) = (one for one in commands("models.md") if "--dry-run" in one)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    words = [str(path) if word == "ask.yaml" else word for word in shlex.split(dry)[1:]]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert re.search(r"gpt-4o-mini: 340 of 340 requests to ask, .* \(at most \$", done.stdout)


def test_a_scorer_of_ones_own_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_script("scoring.md", tmp_path)
    assert re.match(r"\[1\.\] questions: 1 responses, 1 distinct texts, .* True$", capsys.readouterr().out.strip())


def test_a_run_is_read_from_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_script("run-folder.md", tmp_path, ("overrides=[", f'overrides=["home={tmp_path}", '))
    assert capsys.readouterr().out.splitlines()[-1] == "190 190 miniature 40"


@pytest.mark.reproduced
def test_the_judge_is_read(capsys):
    (script,) = blocks("miniature.md", "python")
    exec(script, {})  # noqa: S102 - the project's own page
    assert "grounded" in capsys.readouterr().out


def run_script(page: str, folder: Path, *changes: tuple[str, str]) -> None:
    (script,) = blocks(page, "python")
    for said, here in changes:
        assert said in script
        script = script.replace(said, here)
    (folder / "script.py").write_text(script)
    runpy.run_path(str(folder / "script.py"))


def test_a_correction_against_the_release(release_run, tmp_path):
    """docs/audit.md, on the published files at hand."""
    (command,) = commands("audit.md")
    source = tmp_path / "release.yaml"
    source.write_text(release_run.profile.to_yaml())
    words = [str(source) if word == "release" else word for word in shlex.split(command)[1:]]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    line = done.stdout.splitlines()[-1]
    kept, added, dropped, flipped = (
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) \w+(?:,|$)", line)
    )
    strict = len(RunFolder(load_profile(source, ["name=strict"])).read("pairs/perso"))
    assert (kept + dropped + flipped, kept + added + flipped) == (9_184, strict)


def trainer_script(folder: Path, *options: str) -> str:
    """Return the script of docs/training.md with a tiny policy, which is made here, and some options more."""
    from tiny import tiny_pairs

    from persodpo.training.policy import SmallPolicy, make_small_policy

    pairs = tiny_pairs()
    small = SmallPolicy(steps=1, vocabulary=400, seed=44)
    make_small_policy(list(zip(pairs["prompt"], pairs["chosen"], strict=True)), small, folder / "tiny")
    pairs.to_parquet(folder / "perso.parquet")
    (script,) = blocks("training.md", "python")
    for said, here in (
        ("runs/mine/pairs/perso.parquet", "perso.parquet"),
        ("Qwen/Qwen2-0.5B-Instruct", "./tiny"),
        ('"dpo", ', ", ".join(['"dpo"', "use_cpu=True", "bf16=False", "max_steps=2", "report_to=[]", *options, ""])),
    ):
        assert said in script
        script = script.replace(said, here)
    return script


def test_the_trainer_trains_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(trainer_script(tmp_path), names)  # noqa: S102 - the project's own page
    assert names["args"].weighting == "sigmoid"
    assert (tmp_path / "dpo" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_trainer_trains_in_two_processes(tmp_path):
    (tmp_path / "train_pairs.py").write_text(trainer_script(tmp_path, 'ddp_backend="gloo"'))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
    environment["TQDM_DISABLE"] = "1"  # what went wrong is to be read
    done = subprocess.run(
        [*launch, "train_pairs.py"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dpo" / "model.safetensors").is_file()
