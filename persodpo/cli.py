"""The command ``persodpo``: each stage, the notebooks in order, and the published files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from persodpo.config import DEFAULT_PROFILE, load_profile, profile_names
from persodpo.errors import PersodpoError
from persodpo.settings import Profile

app = typer.Typer(
    help="Companion to PersoDPO: persona-grounded preference pairs without annotation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ProfileOption = Annotated[
    str, typer.Option("--profile", "-p", help=f"A profile's name ({', '.join(profile_names())}) or its file.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Change one setting; repeatable.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Run even if nothing changed.")]


def main() -> None:
    """Run the command; what the user can mend is one sentence on stderr and exit status 1."""
    try:
        app()
    except PersodpoError as error:
        print(f"persodpo: {error}", file=sys.stderr)
        sys.exit(1)


def _stage(name: str, help_text: str) -> None:
    """Add the command of one stage; `persodpo.stages` is imported only when it runs."""

    def command(
        profile: ProfileOption = DEFAULT_PROFILE, set_: SetOption = None, overwrite: OverwriteOption = False
    ) -> None:
        from persodpo import stages  # noqa: PLC0415

        run: Callable[[Profile, bool], list[object]] = getattr(stages, f"run_{name}")
        for report in run(load_profile(profile, set_ or ()), overwrite):
            print(report)

    app.command(name, help=f"{help_text} Earlier stages run first where something changed.")(command)


_stage("dialogues", "Make the dialogues table.")
_stage("generate", "Make the responses tables.")
_stage("score", "Make the scores tables and the thresholds.")
_stage("pairs", "Make the pair sets and their gate report.")
_stage("evaluate", "Make the results table.")
_stage("audit", "Make the parity table, the audit's findings and the effect of every correction.")
_stage("figures", "Draw the figures.")


@app.command()
def train(
    profile: ProfileOption = DEFAULT_PROFILE,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", "-a", help="Only this arm; repeatable. Default: the profile's.")
    ] = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Train arms: model, trainer_state.json, log and health verdicts. Earlier stages run first where something changed."""
    from persodpo import stages  # noqa: PLC0415

    for report in stages.run_train(load_profile(profile, set_ or ()), overwrite, arm or ()):
        print(report)


@app.command("finetune-scorer")
def finetune_scorer_command(
    data: Annotated[list[Path], typer.Argument(help="Files of labelled examples, all of one format.")],
    *,
    kind: Annotated[
        str, typer.Option("--format", "-f", help="snli, sick, dialogue_nli, jsonl, or coherence (answers Yes or No).")
    ],
    base: Annotated[str, typer.Option("--base", "-b", help="Model to start from: a folder or a name on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the result.")],
    held_out: Annotated[
        list[Path] | None, typer.Option(help="Held-out files; repeatable. Default: a tenth of the data.")
    ] = None,
    fields: Annotated[
        tuple[str, str, str] | None, typer.Option(help="Names of the two texts and the label, for jsonl and coherence.")
    ] = None,
    epochs: Annotated[float, typer.Option(min=1e-6)] = 1.0,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-5,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_length: Annotated[int, typer.Option(min=8, help="Longest input, tokens.")] = 210,
    seed: Annotated[int, typer.Option(min=0)] = 44,
) -> None:
    """Fine-tune the model of a scorer: C score, UE score or coherence. Defaults are those of the paper where known."""
    from persodpo.training.finetune_scorer import finetune_scorer  # noqa: PLC0415
    from persodpo.training.scorer_card import FineTuning  # noqa: PLC0415

    settings = FineTuning(epochs, learning_rate, batch_size, max_length, seed)
    print(finetune_scorer(data, kind, base, output, settings=settings, held_out=held_out or (), fields=fields))


@app.command()
def fetch(
    what: Annotated[str, typer.Argument(help="What to fetch: release.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="A folder, an archive or an HTTPS address; default: PERSODPO_RELEASE, else the pinned commit."
        ),
    ] = None,
    profile: ProfileOption = DEFAULT_PROFILE,
    set_: SetOption = None,
) -> None:
    """Fetch the published files and check every byte."""
    from persodpo.artifacts import RunFolder  # noqa: PLC0415
    from persodpo.release.fetch import fetch_release  # noqa: PLC0415

    if what != "release":
        raise PersodpoError(f"Nothing called '{what}' can be fetched; fetch release.")
    print(fetch_release(RunFolder(load_profile(profile, set_ or ())).release, source))


@app.command("profile")
def show_profile(profile: ProfileOption = DEFAULT_PROFILE, set_: SetOption = None) -> None:
    """Print the resolved profile."""
    print(load_profile(profile, set_ or ()).to_yaml(), end="")


@app.command("reproduce")
def reproduce_command(
    profile: ProfileOption = DEFAULT_PROFILE,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    notebook: Annotated[
        list[Path] | None, typer.Option("--notebook", "-n", exists=True, help="Only this notebook; repeatable.")
    ] = None,
) -> None:
    """Run the notebooks in order; executed copies go to the run folder."""
    from persodpo.reproduce import reproduce  # noqa: PLC0415

    for executed in reproduce(profile, set_ or (), overwrite=overwrite, notebooks=notebook):
        print(executed, flush=True)


if __name__ == "__main__":
    main()
