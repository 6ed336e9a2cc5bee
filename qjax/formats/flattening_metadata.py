"""Metadata of a flattened tensor: strings and integers from anywhere, checked."""

import re
from collections.abc import Mapping
from typing import Any

_LARGEST = 2**31 - 1


class Entries:
    """Metadata that is taken out entry by entry.

    Every method that takes one raises a ValueError if it is not sound, saying which,
    what it is and what it must be.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self._left = dict(metadata)

    def has(self, key: str) -> bool:
        """Whether an entry is there, and not taken."""
        return key in self._left

    def integer(self, key: str, low: int = 0, high: int = _LARGEST) -> int:
        """Takes an integer from ``low`` to ``high``, or the text of one."""
        value = self._left.pop(key, None)
        # The header of a safetensors file has texts alone.
        if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
            value = int(value)
        # JSON's true is no number.
        if type(value) is not int or not low <= value <= high:
            raise ValueError(
                f"metadata[{key!r}]={value!r} must be an integer from {low} to {high}."
            )
        return value

    def extent(self, key: str) -> int | None:
        """Takes a positive integer, None if it is not there."""
        return self.integer(key, 1) if self.has(key) else None

    def flag(self, key: str) -> bool:
        """Takes a flag, which is 1, or not there."""
        return self.has(key) and self.integer(key, 1, 1) == 1

    def choice(self, key: str, values: Mapping[str, Any]) -> Any:
        """Takes a string and looks up what it stands for."""
        value = self._left.pop(key, None)
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"metadata[{key!r}]={value!r} must be in {[*values]}.")
        return values[value]

    def optional(self, key: str, values: Mapping[str, Any]) -> Any:
        """Does the work of `choice`; None if it is not there."""
        return self.choice(key, values) if self.has(key) else None

    def close(self) -> None:
        """Checks that all entries have been taken."""
        if self._left:
            raise ValueError(
                f"metadata has {sorted(map(str, self._left))}, which say nothing."
            )
