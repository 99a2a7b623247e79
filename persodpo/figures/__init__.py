"""Figures: tables in, matplotlib figures out, one plain function per figure.

A figure is a function under `persodpo.figures.style.figure`, which names its tables and enters it into `FIGURES`. Only the
module `style` touches the disk. Nothing here imports a stage, torch or transformers, so that a figure can be drawn again
from its table anywhere.
"""

from persodpo.figures import answers, curves, forest, scores
from persodpo.figures.style import FIGURES, FigureSpec

__all__ = ["FIGURES", "FigureSpec", "answers", "curves", "forest", "scores"]
