"""A run as something to touch: one call a notebook cell, sliders and menus above, pictures and tables below.

Nothing here writes to a run folder. Without a browser each call still shows its first picture and table.
"""

from persodpo.explore.quality import quality
from persodpo.explore.responses import responses

__all__ = ["quality", "responses"]
