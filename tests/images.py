"""Random histories of images, for tests of properties."""

import random
from dataclasses import dataclass

from hypothesis import strategies as st

#: From one byte to the largest block size; most are small, so that a history of many blocks is made quickly.
BLOCK_SIZES = (1, 2, 3, 7, 16, 100, 512, 4096, 5000, 16384, 65536, 1 << 20, 4 << 20)
_MANY_BLOCKS_BYTES = 40_000
_FEW_BLOCKS = 5
_PAGE = 4096


@dataclass(frozen=True)
class Edit:
    """A change to an image: `where` is a part, 0 to 1, of the image; `much` is one of the longest possible image."""

    kind: str
    where: float
    much: float
    aligned: bool


_PARTS = st.floats(0, 1, width=16)
_EDITS = st.builds(Edit, st.sampled_from(["noise", "noise", "zeros", "grow", "shrink"]), _PARTS, _PARTS, st.booleans())


@st.composite
def histories(draw: st.DrawFn, block_size: int) -> list[bytes]:
    """Draw one to five images, none of them empty. Each is the previous one with up to four edits."""
    longest = max(_FEW_BLOCKS * block_size, min(_MANY_BLOCKS_BYTES, 20_000 * block_size))
    longest = draw(st.integers(1, longest) if longest <= _MANY_BLOCKS_BYTES else st.integers(longest // 2, longest))
    noise = random.Random(draw(st.integers(0, 1 << 32)))
    image = bytearray()
    found = []
    for day in range(draw(st.integers(1, 5))):
        edits = draw(st.lists(_EDITS, max_size=4))
        for edit in edits if day else [Edit("grow", 0, 1 - draw(_PARTS) / 2, False), *edits]:
            _apply(edit, image, longest, block_size, noise)
        found.append(bytes(image) or b"\0")
        image = bytearray(found[-1])
    return found


def _apply(edit: Edit, image: bytearray, longest: int, block_size: int, noise: random.Random) -> None:
    start, length = int(edit.where * len(image)), int(edit.much * longest)
    if edit.aligned:
        start, length = start - start % block_size, length - length % block_size
    if edit.kind == "grow":
        image += noise.randbytes(max(0, min(length, longest - len(image))))
    elif edit.kind == "shrink":
        del image[max(1, start) :]
    else:
        stop = min(len(image), start + max(1, length // 4))
        image[start:stop] = bytes(stop - start) if edit.kind == "zeros" else noise.randbytes(stop - start)


def write_sparse(path: str, image: bytes) -> None:
    """Write an image as a new file, in which pages of zeros are holes."""
    with open(path, "wb") as file:
        for offset in range(0, len(image), _PAGE):
            page = image[offset : offset + _PAGE]
            if page.strip(b"\0"):
                file.seek(offset)
                file.write(page)
        file.truncate(len(image))
