"""Small chains, made quickly in this process, and the results of verify and restore for them."""

import random
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

from blockdiff import backup, merge
from blockdiff.chain.generations import Chain
from blockdiff.check import verify
from blockdiff.progress import Progress
from blockdiff.shared.errors import BlockdiffError
from blockdiff.transport.address import Address

#: Block size of small chains, in bytes.
BLOCK = 64


def image_of(*letters: str) -> bytes:
    """Return an image with a block for each word: the word repeated, zeros for ``0``; ``x*3`` is 3 bytes of x."""
    parts = []
    for word in letters:
        text, _, length = word.partition("*")
        size = int(length) if length else BLOCK
        parts.append(bytes(size) if text == "0" else (text.encode() * size)[:size])
    return b"".join(parts)


#: Three days: the second changes two blocks, one to zeros, and grows by a short block, the third shrinks. Generation 3
#: needs the deltas of all three.
DAYS = (
    image_of("a", "0", "b", "c", "d", "e"),
    image_of("a", "f", "0", "c", "d", "e", "g*10"),
    image_of("a", "f", "h", "c", "d*63"),
)


class MemoryTarget:
    """An image in memory. `writes` and `zeros` have (offset, length) of everything that was written to it."""

    def __init__(self) -> None:
        self.image = bytearray()
        self.writes: list[tuple[int, int]] = []
        self.zeros: list[tuple[int, int]] = []
        self.finished = False
        self._lock = threading.Lock()

    def write(self, offset: int, data: memoryview) -> None:
        self.writes.append((offset, len(data)))
        self._put(offset, bytes(data))

    def zero(self, offset: int, length: int) -> None:
        self.zeros.append((offset, length))
        self._put(offset, bytes(length))

    def finish(self, image_size: int) -> None:
        assert len(self.image) <= image_size, "something was written beyond the end of the image"
        self.image.extend(bytes(image_size - len(self.image)))
        self.finished = True

    def _put(self, offset: int, data: bytes) -> None:
        with self._lock:  # several threads write
            self.image.extend(bytes(max(0, offset + len(data) - len(self.image))))
            self.image[offset : offset + len(data)] = data


@dataclass
class SmallChain:
    """A chain in its own directory, and its source."""

    directory: Path
    source: Path
    base: str = "disk"
    images: dict[int, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.directory / self.base)

    def file(self, suffix: str) -> Path:
        """Return the path of ``NAME`` with `suffix`, such as ``.ver`` or ``.2.json``."""
        return self.directory / f"{self.base}{suffix}"

    def add(
        self, image: bytes | None = None, options: backup.Options | None = None, progress: Progress | None = None
    ) -> backup.Result:
        """Write `image` to the source, if it is given, and back up the source."""
        if image is not None:
            self.source.write_bytes(image)
        chosen = options or backup.Options(block_size=BLOCK)
        result = backup.backup(self.name, Address(None, str(self.source)), chosen, progress)
        self.images[result.manifest.generation] = self.source.read_bytes()
        for path in self.directory.glob(f"{self.base}.*"):
            path.chmod(0o600)  # tests damage the files, and are not always run by root
        return result

    def files(self) -> dict[str, bytes]:
        """Return the files in the directory with their contents, without locks."""
        return {path.name: path.read_bytes() for path in sorted(self.directory.iterdir()) if path.suffix != ".lock"}

    def temporary(self) -> list[str]:
        """Return the names of the temporary files in the directory."""
        return [path.name for path in self.directory.iterdir() if path.suffix == ".tmp"]

    def restored(self, number: int | None = None) -> bytes:
        """Return the image of a generation; raises what a restore raises."""
        target = MemoryTarget()
        with Chain(self.name) as chain:
            merge.merge(chain.needed(chain.generation(number).number), target)
        assert target.finished
        return bytes(target.image)

    def verdicts(self) -> dict[int, BlockdiffError | None]:
        """Return the error that `verify` reports for each generation, or None."""
        with Chain(self.name) as chain, verify.Verifier(chain) as verifier:
            return {verdict.number: verdict.error for verdict in verifier.all()}

    def verdict(self, number: int) -> BlockdiffError | None:
        """Return the error that `verify NAME@N` reports, or None."""
        with Chain(self.name) as chain, verify.Verifier(chain) as verifier:
            return verifier.one(number).error

    def bad(self) -> list[int]:
        """Return the numbers of the generations that are not sound."""
        return [number for number, error in self.verdicts().items() if error is not None]

    def last(self) -> int:
        with Chain(self.name) as chain:
            return chain.last()

    def copy_to(self, directory: Path) -> "SmallChain":
        """Return a copy of the chain in a new directory, with the same source."""
        shutil.copytree(self.directory, directory)
        return SmallChain(directory, self.source, self.base, dict(self.images))

    def assert_sound(self) -> None:
        """Check that every generation is sound and restores exactly, and that no temporary file is left."""
        self.assert_restores()
        assert self.temporary() == []

    def assert_restores(self) -> None:
        """Check that every generation is sound and restores exactly."""
        assert self.bad() == []
        for number in range(1, self.last() + 1):
            assert self.restored(number) == self.images[number], number


def new_chain(directory: Path, base: str = "disk") -> SmallChain:
    """Return a chain without generations in a new directory below `directory`."""
    place = directory / "backup"
    place.mkdir()
    return SmallChain(place, directory / "source", base)


def some_days(directory: Path, count: int, options: backup.Options | None = None) -> SmallChain:
    """Return a chain of the first `count` of `DAYS`."""
    chain = new_chain(directory)
    for image in DAYS[:count]:
        chain.add(image, options)
    return chain


def three_days(directory: Path, options: backup.Options | None = None) -> SmallChain:
    """Return a chain of `DAYS`."""
    return some_days(directory, len(DAYS), options)


def harm(path: Path, chooser: random.Random) -> None:
    """Remove a file, cut it, or change one to three of its bytes."""
    content = bytearray(path.read_bytes())
    deed = chooser.randrange(5)
    if deed == 0:
        path.unlink()
        return
    if deed == 1:
        del content[chooser.randrange(len(content)) :]
    else:
        for _ in range(deed - 1):
            content[chooser.randrange(len(content))] ^= chooser.randrange(1, 256)
    path.write_bytes(content)


def without_manifests(chain: SmallChain) -> SmallChain:
    """Remove the manifests. With format 1 and MD5, the rest is a chain as the original writes it."""
    for path in chain.directory.glob("*.json"):
        path.unlink()
    return chain
