"""The command line: one sentence on stderr for what the user can mend."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from persodpo.files import PROJECT, RELEASE_VARIABLE

COMMAND = str(Path(sys.executable).with_name("persodpo"))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != RELEASE_VARIABLE}
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=clean | environment,
        timeout=120,
        check=False,
    )


def test_profile_shows_what_overrides_resolve_to():
    done = run("profile", "--set", "pairs.low_quantile=0.25", "-s", "scoring.ray_workers=3")
    shown = yaml.safe_load(done.stdout)
    assert (done.returncode, shown["pairs"]["low_quantile"], shown["scoring"]["ray_workers"]) == (0, 0.25, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pairs", "--set", "pairs.high_quantile=1.5"], "pairs.high_quantile: Input should be less than or equal to 1"),
        (["pairs", "--profile", "nonesuch"], "nonesuch"),
        (["fetch", "release"], "/nonexistent/folder"),
        (["score", "-p", "release", "--set", "generation.models=[gpt-9]"], "gpt-9"),
        (["generate", "-p", "release", "--set", "dialogues.source=miniature"], "set dialogues.source=published"),
    ],
)
def test_errors_are_one_sentence_without_a_traceback(arguments, words, tmp_path):
    places = [f"home={tmp_path}"]
    source = os.environ.get(RELEASE_VARIABLE)
    if arguments[0] in {"score", "generate"}:
        if not source:
            pytest.skip(f"{RELEASE_VARIABLE} is not set: the published files are not at hand")
    elif arguments[0] == "fetch":
        source = "/nonexistent/folder"
    given = [part for place in places for part in ("--set", place)]
    done = run(*arguments, *given, **({RELEASE_VARIABLE: source} if source else {}))
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("persodpo: ")
    assert "Traceback" not in done.stderr


def test_pairs_are_not_set_against_themselves():
    done = run("pairs", "--set", "pairs.low_quantile=0.3", "--against", "mini")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--set name=mini-2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trane"], "No such command"),
        (["pairs", "--profil", "release"], "No such option"),
        (["fetch", "weights"], "weights"),
    ],
)
def test_an_unknown_word_is_a_usage_error(arguments, words):
    done = run(*arguments)
    assert (done.returncode, words in done.stderr) == (2, True)


def test_an_interrupt_ends_a_command_whose_parent_ignores_it(tmp_path):
    """As under nohup, or in the background of a shell."""
    code = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "print(subprocess.Popen(sys.argv[1:], stdout=sys.stderr).pid, flush=True)"
    hang = (
        "import time; from persodpo import cli; cli.app = lambda: (print('up', flush=True), time.sleep(60)); cli.main()"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", hang], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    child = int(started.stdout.readline())
    assert started.stderr.readline() == "up\n"
    os.kill(child, signal.SIGINT)
    assert "KeyboardInterrupt" in started.stderr.read()
