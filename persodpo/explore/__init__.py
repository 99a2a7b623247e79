"""A run as something to touch: one call a notebook cell, sliders and menus above, pictures and tables below.

Nothing here writes to a run folder. Without a browser each call still shows its first picture and table.
"""

from persodpo.explore.arms import arms
from persodpo.explore.quality import quality
from persodpo.explore.responses import responses
from persodpo.explore.start import start
from persodpo.explore.training import training

__all__ = ["arms", "quality", "responses", "start", "training"]
