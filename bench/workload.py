"""The image that is backed up: a server's volume as it might be, and what becomes of it from day to day."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

_MIB = 1 << 20
_PAGE = 16 << 10
#: The image is laid out in stretches of this many bytes, each of one kind.
_STRETCH = 4 * _MIB
#: What kind each of thirty neighbouring stretches is: a third operating-system files, a fifth incompressible, a sixth
#: database pages, the rest zeros.
_KINDS = ("system",) * 10 + ("random",) * 6 + ("pages",) * 5 + ("zeros",) * 9
#: Pages of the image that change in a day for each GiB of it, and bytes that change in one run.
_CHANGED_PAGES_PER_GIB = 450
_CHANGED_RUN = 16 * _MIB


class Workload:
    """An image of `size` bytes at `path`, made from a seed; `change` makes it that of the next day.

    The operating-system files are this machine's own, those below /usr in the order of their names; everything else
    follows from the seed.
    """

    def __init__(self, path: Path, size: int, seed: int = 2010) -> None:
        self.path = path
        self.size = size
        self._seed = seed
        self.day = 0

    def make(self) -> None:
        """Write the image of day 0."""
        rng = random.Random(self._seed)
        system = _system_files()
        kinds = [_KINDS[i % len(_KINDS)] for i in range(-(-self.size // _STRETCH))]
        rng.shuffle(kinds)
        self.day = 0
        with self.path.open("wb") as file:
            for i, kind in enumerate(kinds):
                file.write(_stretch(kind, rng, system)[: self.size - i * _STRETCH])

    def change(self) -> None:
        """Write some 900 scattered pages (of 2 GiB) and one run of 16 MiB anew."""
        self.day += 1
        rng = random.Random(f"{self._seed}, day {self.day}")
        count = self.size * _CHANGED_PAGES_PER_GIB >> 30
        with self.path.open("r+b") as file:
            for page in sorted(rng.sample(range(self.size // _PAGE), count)):
                file.seek(page * _PAGE)
                file.write(_page(rng))
            file.seek(rng.randrange((self.size - _CHANGED_RUN) // _PAGE) * _PAGE)
            file.write(rng.randbytes(_CHANGED_RUN))


def _stretch(kind: str, rng: random.Random, system: Iterator[bytes]) -> bytes:
    if kind == "system":
        return next(system)
    if kind == "random":
        return rng.randbytes(_STRETCH)
    if kind == "pages":
        return b"".join(_page(rng) for _ in range(_STRETCH // _PAGE))
    return bytes(_STRETCH)


def _page(rng: random.Random) -> bytes:
    """Return a page as InnoDB's: rows of an order book, and at the end between an eighth and a half of slack."""
    room = _PAGE - rng.randrange(_PAGE // 8, _PAGE // 2)
    number = rng.randrange(1 << 31)
    rows, length = [rng.randbytes(38)], 38
    while length < room:
        number += 1
        row = (
            number.to_bytes(8, "big") + b"customer-%06d\x80" % rng.randrange(10**6) + rng.randbytes(12) + b"open\0\0\0"
        )
        rows.append(row)
        length += len(row)
    return b"".join(rows)[:room].ljust(_PAGE - 8, b"\0") + rng.randbytes(8)


def _system_files() -> Iterator[bytes]:
    """Yield stretches of this machine's files, each file from a multiple of 4 KiB on, as a file system has them."""
    buffer = bytearray()
    while True:
        for directory, names, files in os.walk("/usr"):
            names.sort()
            for name in sorted(files):
                path = os.path.join(directory, name)
                if os.path.islink(path) or not os.path.isfile(path):
                    continue
                data = Path(path).read_bytes()
                buffer += data
                buffer += bytes(-len(data) % 4096)
                while len(buffer) >= _STRETCH:
                    yield bytes(buffer[:_STRETCH])
                    del buffer[:_STRETCH]
