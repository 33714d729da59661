"""Hypothesis strategies: valid bytes with something done to them."""

import re
from collections.abc import Callable, Sequence

from hypothesis import strategies as st

#: Whole numbers at which fields of 1, 2, 4 and 8 bytes, floats and Python's own limits end.
EXTREMES = sorted(
    {0, 1, 10**18, 10**400, *((1 << bits) + step for bits in (7, 8, 15, 16, 31, 32, 63) for step in (-1, 0))}
)
_WIDTHS = (1, 2, 4, 8)
#: Texts that parsers of text trip over, and numbers that no field has room for.
_WORDS = [
    *(b'-1 1e999 NaN null true [] {} "" "\\ud800" \' " = # ! [ ] < > / : @ % %00 &#0; \\ ..').split(),
    *(b"\0", b"\n", b"\xff", b"\xef\xbb\xbf", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000),
    *(b'<?xml version="1.0" encoding="%s"?>' % name for name in (b"utf-16", b"utf-7", b"hex", b"unknown")),
    *(b"!include /\0\n", b"<!DOCTYPE a>", b"ssh://", b"-o"),
]
#: A number, a string or a word in text; in binary formats it finds next to nothing, which does no harm.
_TOKEN = re.compile(rb'"[^"\\]*"|-?[0-9]+(\.[0-9]+)?|[a-z_]+')

Mutation = Callable[[st.DrawFn, bytes, Sequence[bytes]], bytes]


def _place(draw: st.DrawFn, data: bytes) -> int:
    return draw(st.integers(0, len(data)))


def _flip(draw: st.DrawFn, data: bytes, seeds: Sequence[bytes]) -> bytes:
    if not data:
        return data
    at = draw(st.integers(0, len(data) - 1))
    return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]


def _cut(draw: st.DrawFn, data: bytes, seeds: Sequence[bytes]) -> bytes:
    first, last = sorted((_place(draw, data), _place(draw, data)))
    return data[:first] + (data[last:] if draw(st.booleans()) else b"")


def _insert(draw: st.DrawFn, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at = _place(draw, data)
    return data[:at] + draw(st.binary(min_size=1, max_size=20) | st.sampled_from(_WORDS)) + data[at:]


def _duplicate(draw: st.DrawFn, data: bytes, seeds: Sequence[bytes]) -> bytes:
    first, last = sorted((_place(draw, data), _place(draw, data)))
    return data[:last] + data[first:last] * draw(st.integers(1, 3)) + data[last:]


def _splice(draw: st.DrawFn, data: bytes, seeds: Sequence[bytes]) -> bytes:
    other = draw(st.sampled_from(seeds))
    return data[: _place(draw, data)] + other[_place(draw, other) :]


def _number(draw: st.DrawFn, data: bytes, seeds: Sequence[bytes]) -> bytes:
    width = draw(st.sampled_from(_WIDTHS))
    at = draw(st.integers(0, max(0, len(data) - width)))
    value = draw(st.sampled_from(EXTREMES)) & ((1 << 8 * width) - 1)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _token(draw: st.DrawFn, data: bytes, seeds: Sequence[bytes]) -> bytes:
    found = list(_TOKEN.finditer(data))
    if not found:
        return data
    chosen = draw(st.sampled_from(range(len(found))))
    number = st.sampled_from(EXTREMES).map(lambda value: str(value).encode())
    return data[: found[chosen].start()] + draw(number | st.sampled_from(_WORDS)) + data[found[chosen].end() :]


_MUTATIONS: list[Mutation] = [_flip, _cut, _insert, _duplicate, _splice, _number, _token]


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds` with one to four things done to it."""
    data = draw(st.sampled_from(seeds))
    for mutation in draw(st.lists(st.sampled_from(_MUTATIONS), min_size=1, max_size=4)):
        data = mutation(draw, data, seeds)
    return data
