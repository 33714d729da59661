"""Read JSON objects that others wrote: a field that does not have the expected type is refused, by its name.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import math
from typing import Callable, List, Optional, TypeVar

T = TypeVar("T")

#: The largest whole number that is accepted: numbers from others must fit in 64 bits.
MAX_INTEGER = (1 << 63) - 1


class Fields:
    """The fields of `holder`, a JSON object; a `holder` that is anything else has no fields.

    Each method returns a field of one type. If the field is missing or has another type, the method raises the
    exception that `refuse` returns for the field's name.
    """

    def __init__(self, holder: object, refuse: Callable[[str], Exception]) -> None:
        self._holder = holder if isinstance(holder, dict) else {}
        self.refuse = refuse

    def has(self, name: str) -> bool:
        """Return whether the field exists and is not ``null``."""
        return self._holder.get(name) is not None

    def optional(self, read: Callable[[str], T], name: str) -> "Optional[T]":
        """Return what the method `read` of this object returns for a field; None if it is ``null`` or missing."""
        return read(name) if self.has(name) else None

    def text(self, name: str) -> str:
        """Return a string."""
        return self._of(str, name)

    def flag(self, name: str) -> bool:
        """Return true or false."""
        return self._of(bool, name)

    def count(self, name: str) -> int:
        """Return a whole number from 0 to `MAX_INTEGER`."""
        value = self._of(int, name)
        if isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
            raise self.refuse(name)
        return value

    def number(self, name: str) -> float:
        """Return a finite number that is not negative; it need not be whole."""
        value = self._holder.get(name)
        return value if isinstance(value, float) and 0 <= value < math.inf else float(self.count(name))

    def texts(self, name: str) -> List[str]:
        """Return a list of strings."""
        values = self._of(list, name)
        if not all(isinstance(value, str) for value in values):
            raise self.refuse(name)
        return list(values)

    def part(self, name: str) -> "Fields":
        """Return the object that a field holds."""
        return Fields(self._of(dict, name), self.refuse)

    def parts(self, name: str) -> "List[Fields]":
        """Return the objects in the list that a field holds."""
        return [Fields(value, self.refuse) for value in self._of(list, name)]

    def names(self) -> "List[str]":
        """Return the names of all fields."""
        return list(self._holder)

    def check(self, name: str, fits: bool) -> None:
        """Refuse the field unless it `fits` the other fields."""
        if not fits:
            raise self.refuse(name)

    def _of(self, kind: "type[T]", name: str) -> T:
        value = self._holder.get(name)
        if not isinstance(value, kind):
            raise self.refuse(name)
        return value
