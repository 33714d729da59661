"""Three months of daily runs on a 256 MiB image, with a new chain each month: every day restores."""

import os
import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from blockdiff import merge
from blockdiff.chain.generations import Chain
from blockdiff.cli import modern
from blockdiff.restore.filetarget import FileTarget

pytestmark = [pytest.mark.torture, pytest.mark.timeout(1800)]

SIZE = 256 << 20
PIECE = 64 << 10
BEGIN = datetime(2028, 1, 1, 3, 0)  # a leap year
DAYS = 91


@dataclass(frozen=True)
class Edit:
    """What a day does to an image: bytes at an offset, and then its size in bytes."""

    offset: int
    data: bytes
    size: int

    def apply(self, path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(self.offset)
            file.write(self.data)
            file.truncate(self.size)


def days_edits(day: int) -> list[Edit]:
    """Return what happens to the image on a day: some pages, now and then a long run, zeros, or another size."""
    chooser = random.Random(day)
    size = SIZE + (day // 30) * 4096 - (1000 if day % 7 == 0 else 0)
    edits = []
    for _ in range(12):
        offset = chooser.randrange(0, 24 << 20, 4096) * 40 % (SIZE - PIECE)
        length = chooser.choice([16, 4096, 16384])
        edits.append(Edit(offset, bytes(length) if chooser.random() < 0.2 else chooser.randbytes(length), size))
    if day % 10 == 0:
        edits.append(Edit(chooser.randrange(SIZE - (2 << 20)), chooser.randbytes(1 << 20), size))
    return edits


def pieces_with_data(path: Path) -> set[int]:
    """Return the numbers of the pieces of a file in which there is anything but a hole."""
    found: set[int] = set()
    with path.open("rb") as file:
        end, size = 0, os.fstat(file.fileno()).st_size
        while end < size:
            try:
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # holes up to the end
                break
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            found.update(range(begin // PIECE, (end - 1) // PIECE + 1))
    return found


def assert_same(path: Path, expected: Path) -> None:
    """Both files hold the same; where both have holes they are not read."""
    assert path.stat().st_size == expected.stat().st_size
    with path.open("rb") as one, expected.open("rb") as other:
        for number in sorted(pieces_with_data(path) | pieces_with_data(expected)):
            for file in (one, other):
                file.seek(number * PIECE)
            assert one.read(PIECE) == other.read(PIECE), f"piece {number}"


def test_three_months_of_daily_runs(large_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, expected = large_tmp_path / "image", large_tmp_path / "expected"
    directory = large_tmp_path / "backup"
    directory.mkdir(mode=0o700)
    today = BEGIN

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Clock":
            return cls(today.year, today.month, today.day, today.hour)

    monkeypatch.setattr("blockdiff.cli.backup.datetime", Clock)
    for path in (source, expected):
        path.touch()
    for day in range(DAYS):
        for edit in days_edits(day):
            edit.apply(source)
        words = ["backup", "--chain", "monthly", str(directory / "db"), str(source)]
        modern.cli.main(words, prog_name="blockdiff", standalone_mode=False)
        today += timedelta(days=1)

    assert len(list(directory.glob("*.ver"))) == 3
    for day in range(DAYS):
        for edit in days_edits(day):
            edit.apply(expected)
        date = BEGIN + timedelta(days=day)
        restored = large_tmp_path / "restored"
        with Chain(f"{directory}/db-{date:%Y%m}") as chain, FileTarget(str(restored), force=True) as target:
            merge.merge(chain.needed(date.day), target)
        assert_same(restored, expected)
