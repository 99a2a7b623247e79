"""What every figure checks before it draws, and the digest of what it drew."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from persodpo.errors import NothingToShowError, PersodpoError


def require(table: pd.DataFrame, columns: Sequence[str], figure: str) -> None:
    """Check that a table can be drawn.

    Args:
        table: The table handed to a draw function.
        columns: Columns it must have.
        figure: The figure's name, for the message.

    Raises:
        PersodpoError: A column is missing.
        NothingToShowError: The table has no rows.
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise PersodpoError(
            f"Figure {figure} needs column {', '.join(missing)}, the table has {', '.join(map(str, table.columns))}."
        )
    if table.empty:
        raise NothingToShowError(
            f"Figure {figure} got a table without rows: nothing in the run is of the kind that it shows."
        )


def plotted_sha256(figure: Figure) -> str:
    """Return the sha256 of the data a figure shows.

    Taken from the drawn artists in data coordinates, to nine significant digits: it changes with the plotted numbers and
    texts, not with sizes, colours, fonts or the version of matplotlib's renderer.
    """
    digest = hashlib.sha256()
    for number, axes in enumerate(figure.axes):
        artists: list[Artist] = [*axes.lines, *axes.patches, *axes.collections, *axes.images, *axes.texts]
        for artist in artists:
            digest.update(f"{number} {type(artist).__name__}".encode())
            for values in _data(artist):
                digest.update(values)
    return digest.hexdigest()


def _data(artist: Artist) -> Iterator[bytes]:
    """Yield what an artist shows, as bytes that do not depend on the machine."""
    if isinstance(artist, Text):
        yield artist.get_text().encode()
    elif isinstance(artist, Line2D):
        yield _digits(artist.get_xydata())
    elif isinstance(artist, Patch):
        yield _digits(artist.get_patch_transform().transform(artist.get_path().vertices))
    elif isinstance(artist, AxesImage):
        yield _digits(artist.get_array())
    elif isinstance(artist, Collection):
        yield _digits(artist.get_offsets())
        yield _digits(artist.get_array())
        for path in artist.get_paths():
            yield _digits(path.vertices)


def _digits(values: object) -> bytes:
    """Write numbers to nine significant digits."""
    if values is None:
        return b"-"
    flat: Any = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan).ravel()
    return " ".join(f"{value:.9g}" for value in flat).encode()
