"""The command ``persodpo``: each stage, the notebooks in order, and the published files."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from persodpo.config import DEFAULT_PROFILE, load_profile, profile_names
from persodpo.errors import PersodpoError
from persodpo.run import Run

app = typer.Typer(
    help="Companion to PersoDPO: persona-grounded preference pairs without annotation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ProfileName = Annotated[
    str, typer.Option("--profile", "-p", help=f"A profile's name ({', '.join(profile_names())}) or its file.")
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        "-s",
        metavar="SECTION.KEY=VALUE",
        default_factory=list,
        show_default=False,
        help="Change one setting; repeatable.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Run even if nothing changed.")]


def main() -> None:
    """Run the command; what the user can mend is one sentence on stderr and exit status 1."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell sets it for what runs in its background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Threads that wait for each other sleep: where they spin, a busy machine takes many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a name
    try:
        app()
    except PersodpoError as error:
        print(f"persodpo: {error}", file=sys.stderr)
        sys.exit(1)


def _print_all(lines: Iterable[object]) -> None:
    for line in lines:
        print(line, flush=True)


def _stage(name: str, help_text: str) -> None:
    """Add the command of one stage."""

    def command(set_: Settings, profile: ProfileName = DEFAULT_PROFILE, overwrite: Overwrite = False) -> None:
        _print_all(Run(profile, set_).make(name, overwrite))

    app.command(name, help=f"{help_text} Earlier stages run first where something changed.")(command)


_stage("dialogues", "Make the dialogues table.")


@app.command()
def generate(  # noqa: PLR0917 - the command's options
    set_: Settings,
    profile: ProfileName = DEFAULT_PROFILE,
    models: Annotated[
        list[str] | None, typer.Option("--models", "-m", help="Ask this model of generation.backends; repeatable.")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="Only this split (train, valid); repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first dialogues of each split.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what asking would take; nothing is sent.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what has failed before.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Make the responses tables, or ask models; what is stored is never asked again.

    Without any of --models, --split, --limit, --dry-run and --retry-failed the responses tables of the profile are made.
    """
    from persodpo.stages.generate import asked_scope, forecast_report  # noqa: PLC0415

    run = Run(profile, set_)
    if not (models or split or limit or dry_run or retry_failed):
        _print_all(run.make("generate", overwrite))
        return
    everything = [entry.model for entry in run.settings.generation.backends] if dry_run else []
    scope = asked_scope(run.settings, models or everything, split or (), limit)
    if dry_run:
        run.make("dialogues")
        _print_all(forecast_report(run, scope, retry_failed))
        return
    reports = run.make("ask", scope=scope, retry_failed=retry_failed)
    _print_all(reports)
    if any(getattr(report, "stopped", None) for report in reports):
        sys.exit(1)


_stage("score", "Make the scores tables, the thresholds and the extras.")


@app.command()
def pairs(
    set_: Settings,
    profile: ProfileName = DEFAULT_PROFILE,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Count what changed from the pairs of another profile, which are made first where something changed.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make the pair sets and their gate report. Earlier stages run first where something changed."""
    run, other = Run(profile, set_), Run(against) if against else None
    if other and other.root == run.root:
        raise PersodpoError(
            f"Both sides would be run {run.settings.name}; give the changed one a name: --set name={run.settings.name}-2."
        )
    if other:
        _print_all(other.make("pairs"))
    _print_all(run.make("pairs", overwrite))
    if other:
        from persodpo.pairs import pair_changes  # noqa: PLC0415

        for name in (f"pairs/{both}" for both in run.settings.pairs.sets if both in other.settings.pairs.sets):
            counts = pair_changes(other.table(name), run.table(name)).items()
            print(f"{name} against {other.settings.name}: " + ", ".join(f"{count:,} {what}" for what, count in counts))


@app.command()
def train(
    set_: Settings,
    profile: ProfileName = DEFAULT_PROFILE,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", "-a", help="Only this arm; repeatable. Default: the profile's.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train arms: model, trainer_state.json, log and health verdicts. Earlier stages run first where something changed."""
    _print_all(Run(profile, set_).make("train", overwrite, arms=arm or ()))


_stage("evaluate", "Make the results table.")
_stage("ablate", "Train, ask and score the profile's ablations.")
_stage("audit", "Make the parity table, the audit's findings and the effect of every correction.")
_stage("figures", "Draw the figures.")


@app.command("reproduce")
def reproduce_command(
    set_: Settings,
    profile: ProfileName = DEFAULT_PROFILE,
    overwrite: Overwrite = False,
    notebook: Annotated[
        list[Path] | None, typer.Option("--notebook", "-n", exists=True, help="Only this notebook; repeatable.")
    ] = None,
) -> None:
    """Run the notebooks in order; executed copies go to the run folder."""
    from persodpo.reproduce import reproduce  # noqa: PLC0415

    _print_all(reproduce(profile, set_, overwrite=overwrite, notebooks=notebook))


@app.command()
def report(set_: Settings, profile: ProfileName = DEFAULT_PROFILE) -> None:
    """Write the executed notebooks of a run as HTML pages, report/index.html first; nothing is computed."""
    from persodpo.report import write_report  # noqa: PLC0415

    print(write_report(Run(profile, set_)))


@app.command()
def doctor(set_: Settings, profile: ProfileName = DEFAULT_PROFILE) -> None:
    """Say what this machine lacks for a profile, and what asking would take; exit status 1 if anything is missing."""
    from persodpo.doctor import diagnose  # noqa: PLC0415

    missing = 0
    for finding in diagnose(load_profile(profile, set_)):
        print(f"{finding.state:<8} {finding.sentence}", flush=True)
        missing += finding.state == "missing"
    if missing:
        sys.exit(1)


@app.command("profile")
def show_profile(set_: Settings, profile: ProfileName = DEFAULT_PROFILE) -> None:
    """Print the resolved profile."""
    print(load_profile(profile, set_).to_yaml(), end="")


@app.command()
def fetch(
    what: Annotated[Literal["release", "encoder"], typer.Argument(help="What to fetch.")],
    set_: Settings,
    profile: ProfileName = DEFAULT_PROFILE,
) -> None:
    """Fetch the published files, or the frozen sentence encoder of offline scorers, and check every byte."""
    from persodpo.release.fetch import fetch_release  # noqa: PLC0415
    from persodpo.scoring.models import fetch_encoder  # noqa: PLC0415

    if what == "encoder":
        print(f"encoder: all files are in {fetch_encoder()}, verified")
    else:
        folder = Run(profile, set_).release
        print(f"release: all {len(fetch_release(folder))} files are in {folder}, verified")


if __name__ == "__main__":
    main()
