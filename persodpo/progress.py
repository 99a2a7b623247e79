"""Progress bars, alike everywhere: on a terminal and in a live notebook, and gone when they are full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def watched() -> bool:
    """Tell whether somebody watches; `persodpo.reproduce` says by TQDM_DISABLE that nobody watches its notebooks."""
    live = "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
    return live and "TQDM_DISABLE" not in os.environ


def bar(items: Iterable[Any] | None = None, what: str = "", *, hidden: bool = False, **options: Any) -> Any:
    """Return tqdm's bar over ``items``, or to be moved by hand; options are tqdm's."""
    return tqdm(items, what, disable=hidden or not watched(), **{"leave": False} | options)
