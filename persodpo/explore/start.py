"""Which profile is looked at, what of it is on this machine, and one button a stage to make the rest."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython.display import HTML

from persodpo.config import profile_names
from persodpo.explore.command import Command
from persodpo.explore.panel import WIDTH, Panel, labelled, page
from persodpo.explore.runs import runs_beside
from persodpo.run import Run

#: The command of each stage, in order, and what is there afterwards.
STAGES = {
    "doctor": "what this machine lacks, and what asking would take",
    "dialogues": "personas and contexts",
    "generate": "every model's answers",
    "score": "five signals, quality, both thresholds",
    "pairs": "pair sets, and the gate that inspects them",
    "train": "the arms' models, their logs, their health",
    "evaluate": "arms on held-out dialogues, with intervals",
    "figures": "every figure as PDF and PNG",
    "audit": "published numbers beside ours",
    "reproduce": "all of it, as notebooks",
}
_SHOWN_LINES = 14
_SECONDS = 0.5
_LOG = "white-space: pre-wrap; overflow-wrap: anywhere; text-align: left;"


class StartPanel(Panel):
    """A menu of profiles, a button a stage, the runs of this machine, and what the last command wrote.

    Attributes:
        command: The command that was started last, None before the first.
    """

    def __init__(self, profile: str, overrides: Sequence[str]) -> None:
        """Start with the profile of the notebook; see `start`."""
        self._own, self._overrides = profile, tuple(overrides)
        self._first = Run(profile, overrides)
        self.command: Command | None = None
        self._seen: tuple[int, int | None] = (0, None)
        self._profile = labelled(widgets.Dropdown, "Profile", options=self._profiles(), value=profile)
        self._buttons = {stage: _button(stage, f"persodpo {stage}: {made}") for stage, made in STAGES.items()}
        self._stop = _button("Stop", "Interrupt the command that runs; what was done stays done.", disabled=True)
        for stage, button in self._buttons.items():
            button.on_click(lambda _, stage=stage: self._begin(stage))
        self._stop.on_click(lambda _: self.command.stop() if self.command else None)
        rows = widgets.HBox([*self._buttons.values(), self._stop], layout=widgets.Layout(flex_flow="row wrap"))
        controls = {"profile": self._profile, **self._buttons, "stop": self._stop}
        super().__init__(controls, self._render, [self._profile, rows])

    @property
    def run(self) -> Run:
        """The run folder of the profile that is chosen."""
        chosen = str(self._profile.value)
        return Run(chosen, self._overrides if chosen == self._own else ())

    @property
    def watch(self) -> float:
        """Seconds between two looks at the running command."""
        return _SECONDS

    def look(self) -> None:
        """Show what the command has written."""
        if self.command is None:
            return
        seen = (len(self.command.lines), self.command.status)
        if seen != self._seen or seen[1] is None:
            self._seen = seen
            self.refresh()

    def _profiles(self) -> list[tuple[str, str]]:
        """Return the shipped profiles, those of other runs of this machine, and the notebook's own."""
        made = sorted(self._first.root.parent.glob("*/profile.yaml"))
        others = [(path.parent.name, str(path)) for path in made if path.parent.name not in profile_names()]
        shipped = [(name, name) for name in profile_names()]
        named = [*shipped, *others]
        own = [] if any(value == self._own for _, value in named) else [(Path(self._own).stem, self._own)]
        return [*own, *named]

    def _begin(self, stage: str) -> None:
        if self.command is not None and self.command.status is None:
            return
        chosen = str(self._profile.value)
        changed = self._overrides if chosen == self._own else ()
        self.command = Command([stage, "--profile", chosen, *(part for text in changed for part in ("--set", text))])
        self.refresh()

    def _render(self) -> Sequence[Any]:
        running = self.command is not None and self.command.status is None
        for button in self._buttons.values():
            button.disabled = running
        self._stop.disabled = not running
        return runs_beside(self.run), self._told()

    def _told(self) -> HTML:
        """Return what the last command is, whether it runs, and its last lines."""
        again = "" if self._profile.value == self._own else _again(self._profile.label)
        if self.command is None:
            return page(again)
        status = self.command.status
        state = {None: "runs", 0: "is done"}.get(status, "was interrupted" if self.command.stopped else "has failed")
        text = html.escape("\n".join([*self.command.lines][-_SHOWN_LINES:]))
        name = html.escape(shlex.join(["persodpo", *self.command.arguments]))
        return page(
            f'{again}<p><code>{name}</code> {state}.</p><pre role="log" style="max-width: {WIDTH}px; {_LOG}">{text}</pre>'
        )


def _again(name: str) -> str:
    return (
        f"<p>Profile <b>{html.escape(name)}</b> is chosen: run the cells below again to see it (menu <em>Run</em>, "
        "<em>Run Selected Cell and All Below</em>).</p>"
    )


def _button(label: str, tooltip: str, *, disabled: bool = False) -> widgets.Button:
    layout = widgets.Layout(width="auto", min_width="84px")
    return widgets.Button(description=label, tooltip=tooltip, disabled=disabled, layout=layout)


def start(profile: str, overrides: Sequence[str] = ()) -> StartPanel:
    """Choose a profile, see which runs are on this machine, and run its stages one button at a time.

    Args:
        profile: The profile to begin with: a name or a file.
        overrides: Its changed settings, ``section.key=value``.

    Returns:
        The panel; its ``run`` is the run folder of the chosen profile, for the panels of the cells below. Nothing is
        run before a button is pressed.

    Raises:
        PersodpoError: As `persodpo.config.load_profile`.
    """
    source = Path(profile)
    return StartPanel(str(source.resolve()) if source.is_file() else profile, overrides)
