"""Which chain a NAME means to the commands that only read."""

import os
import time
from dataclasses import dataclass

from blockdiff.chain.periods import Place
from blockdiff.shared.errors import printable


@dataclass(frozen=True)
class Meant:
    """The chain that is meant, and the note about the choice; `passes_over` a newer one of the same NAME."""

    chain: str
    note: str | None = None
    passes_over: bool = False


def meant_by(name: str) -> Meant:
    """Return the chain `name`, or the newest ``NAME-DATE`` of ``backup --chain`` if there is none of that name.

    Raises `StorageError` if the directory cannot be read.
    """
    place = Place(os.path.dirname(name))
    names = place.names(name)
    newest = place.newest(names, time.time())
    if newest is None or names == [name]:
        return Meant(name)
    if names[0] == name:
        if newest == name:
            return Meant(name)
        return Meant(name, f"{printable(newest)} is newer than {printable(name)}: use that name if you mean it", True)
    return Meant(newest, f"{printable(newest)} is the newest chain of {printable(name)}")
