"""When a completion has said all that is read of it: the end of its JSON object, watched as the text grows."""

from __future__ import annotations

import json

from persodpo.completions import KEY


class ObjectEnd:
    """Watches one completion, piece by piece, for the end of a JSON object that holds the response."""

    def __init__(self) -> None:
        """Start before the first piece."""
        self._object: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, piece: str) -> bool:
        """Take the next piece of the completion.

        Args:
            piece: Any length of text; a character that is split over two pieces does no harm.

        Returns:
            True if an object with the key ``response`` has just been closed. Other objects are passed over, as what is
            read may still come.
        """
        found = [self._take(character) for character in piece]
        return any(found)

    def _take(self, character: str) -> bool:
        if self._depth == 0 and character != "{":
            return False
        self._object.append(character)
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
        elif character == '"':
            self._in_string = True
        elif character == "{":
            self._depth += 1
        elif character == "}":
            self._depth -= 1
            return self._depth == 0 and self._closed()
        return False

    def _closed(self) -> bool:
        """Tell whether the object that has just been closed is the answer, and forget it."""
        text = "".join(self._object)
        self._object.clear()
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and KEY in found
