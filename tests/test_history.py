"""Whatever happens to an image over the days, every generation comes back exactly, in every documented way."""

import _thread
import gzip
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdiff import backup, merge
from blockdiff.chain import listing
from blockdiff.chain.generations import Chain
from blockdiff.check import verify
from blockdiff.format import codec
from blockdiff.original import apply
from blockdiff.restore import target
from blockdiff.shared.blocks import DIGEST_SIZES
from blockdiff.shared.errors import DamagedError
from blockdiff.transport.address import Address
from tests import commands, conftest, recipe
from tests.images import BLOCK_SIZES, histories, write_sparse
from tests.mariadb import wait_for
from tests.protocol import example

SLOW_IS_FINE = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@dataclass(frozen=True)
class Setting:
    """What a chain is made with; one of its generations is a full one."""

    block_size: int
    delta_format: int
    digest: str
    compression: str
    full_day: int

    def options(self, day: int) -> backup.Options:
        return backup.Options(
            block_size=self.block_size,
            digest=self.digest,
            delta_format=self.delta_format,
            compression=self.compression,
            full=day == self.full_day,
        )


SETTINGS = st.builds(
    Setting,
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from([1, 2]),
    st.sampled_from(sorted(DIGEST_SIZES)),
    st.sampled_from(["gzip", "zstd", "none"]),
    st.integers(1, 12),
)
CASES = SETTINGS.flatmap(lambda setting: st.tuples(st.just(setting), histories(setting.block_size)))


@contextmanager
def chain_of(setting: Setting, images: list[bytes]) -> Iterator[Path]:
    """Yield a directory with the chain ``backup/name`` that has one generation for each image."""
    with tempfile.TemporaryDirectory(dir=conftest.LARGE) as directory:
        path = Path(directory)
        (path / "backup").mkdir()
        for day, image in enumerate(images, 1):
            write_sparse(f"{path}/source", image)
            made = backup.backup(f"{path}/backup/name", Address(None, f"{path}/source"), setting.options(day))
            assert made.manifest.image_size == len(image)
        yield path


def restored(path: Path, number: int) -> bytes:
    out = path / "restored"
    with Chain(f"{path}/backup/name") as chain, target.open_target(str(out), True, None) as file:
        merge.merge(chain.needed(number), file)
    return out.read_bytes()


def uncompressed(setting: Setting, path: Path, number: int) -> bytes:
    """Return the content of a delta by the ordinary programs' libraries."""
    base = f"{path}/backup/name.{number}"
    if setting.compression == "gzip":
        return gzip.decompress(Path(base + ".gz").read_bytes())
    if setting.compression == "zstd":
        with open(base + ".zst", "rb") as file:
            return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    return Path(base).read_bytes()


@SLOW_IS_FINE
@given(CASES)
def test_every_generation_of_any_history_restores_exactly_in_every_way(case: tuple[Setting, list[bytes]]) -> None:
    setting, images = case
    with chain_of(setting, images) as path:
        with Chain(f"{path}/backup/name") as chain:
            sizes = [entry.image_size for entry in listing.entries(chain)]
            with verify.Verifier(chain) as verifier:
                verdicts = list(verifier.all())
        assert [(v.number, v.error) for v in verdicts] == [(n + 1, None) for n in range(len(images))]
        applied, by_recipe = path / "applied", path / "recipe"
        by_recipe.touch()
        for number, image in enumerate(images, 1):
            assert restored(path, number) == image
            delta = uncompressed(setting, path, number)
            listed = sizes[number - 1]
            assert listed is not None
            if setting.delta_format == 1 and applied.exists() and applied.stat().st_size > listed:
                os.truncate(applied, listed)  # what a delta of version 1 cannot tell
            apply.apply([delta], str(applied))
            assert applied.read_bytes() == image
            table = path / "backup" / f"name.{number}.{setting.digest}"
            done = recipe.apply(delta, by_recipe, table)
            assert (done.returncode, done.stderr) == (0, b"")
            assert by_recipe.read_bytes() == image


DAMAGES = st.tuples(
    st.integers(0, 1 << 16),
    st.sampled_from(["delta", "delta", "delta", "table", "manifest"]),
    st.sampled_from(["flip", "cut", "remove"]),
    st.floats(0, 1, exclude_max=True) | st.just(0.999),
)


@SLOW_IS_FINE
@given(
    SETTINGS.filter(lambda s: s.block_size <= 65536).flatmap(lambda s: st.tuples(st.just(s), histories(s.block_size))),
    DAMAGES,
)
def test_verify_and_restore_agree_on_any_damage(
    case: tuple[Setting, list[bytes]], damage: tuple[int, str, str, float]
) -> None:
    """What verify calls sound restores exactly; what it does not, though its own files are sound, does not restore.

    And no restore ever ends well with another image.
    """
    setting, images = case
    which, kind, how, where = damage
    damaged = which % len(images) + 1
    with chain_of(setting, images) as path:
        suffix = {"delta": _delta_suffix(setting), "table": "." + setting.digest, "manifest": ".json"}[kind]
        _damage(path / "backup" / f"name.{damaged}{suffix}", how, where)
        with Chain(f"{path}/backup/name") as chain:
            assert chain.last() == len(images)
            with verify.Verifier(chain) as verifier:
                sound = {verdict.number: verdict.error is None for verdict in verifier.all()}
        assert kind == "manifest" or not sound[damaged]
        for number, image in enumerate(images, 1):
            if sound[number]:
                assert restored(path, number) == image
            elif number != damaged:
                with pytest.raises(DamagedError):
                    restored(path, number)
            else:
                try:
                    assert restored(path, number) == image
                except DamagedError:
                    pass


def test_a_delta_that_lost_its_end_takes_all_older_blocks_with_it() -> None:
    """Its blocks can all be read, but a restore that looks further for others stops there, and verify knows it."""
    setting = Setting(4, 2, "md5", "none", 0)
    with chain_of(setting, [b"aaaabbbbcccc", b"aaaaBBBBcccc", b"aaaaBBBBCCCC", b"1111BBBBCCCC"]) as path:
        _damage(path / "backup" / "name.2", "cut", 0.9)
        with Chain(f"{path}/backup/name") as chain, verify.Verifier(chain) as verifier:
            assert [verdict.error is None for verdict in verifier.all()] == [True, False, False, True]
        with pytest.raises(DamagedError, match=r"name\.2 is damaged: it ends in the middle of its end mark"):
            restored(path, 3)
        assert restored(path, 4) == b"1111BBBBCCCC"


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_no_thread_outlives_what_read_a_damaged_delta(compression: str) -> None:
    """Not even while somebody keeps the error, which keeps all that was used.

    Threads left to the garbage collector hung about one run in thousands: it may collect them inside of `threading`.
    """
    setting = Setting(4, 2, "md5", compression, 0)
    threads = _thread._count()
    with chain_of(setting, [b"aaaabbbbcccc", b"aaaaBBBBcccc", b"aaaaBBBBCCCC"]) as path:
        name = path / "backup" / ("name.2" + _delta_suffix(setting))
        name.write_bytes(codec.compressor(compression)(example("delta-2")) * 3)
        (path / "backup" / "name.2.json").unlink()
        (path / "backup" / "name.3.json").unlink()
        errors: list[object] = []
        with Chain(f"{path}/backup/name") as chain:
            with verify.Verifier(chain) as verifier:
                errors += [verdict.error for verdict in verifier.all()]
            for read in (lambda: restored(path, 2), lambda: restored(path, 3), lambda: apply_file(name, path / "x")):
                with pytest.raises(DamagedError) as caught:
                    read()
                errors.append(caught.value)
        assert [error is None for error in errors] == [True, False, False, False, False, False]
        wait_for(lambda: _thread._count() <= threads, "the last instructions of every thread")


def apply_file(delta: Path, target: Path) -> None:
    with delta.open("rb") as file:
        apply.apply(codec.decompressed(file, "the delta"), str(target))


def _delta_suffix(setting: Setting) -> str:
    return {"gzip": ".gz", "zstd": ".zst", "none": ""}[setting.compression]


def _damage(path: Path, how: str, where: float) -> None:
    content = bytearray(path.read_bytes())
    place = int(where * len(content))
    if how == "remove":
        path.unlink()
        return
    if how == "flip":
        content[place] ^= 1 << (place % 8)
    else:
        del content[place:]
    path.write_bytes(content)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("delta_format", [1, 2])
def test_the_real_programs_restore_by_gunzip_and_blockdiff_merge(
    delta_format: int, compression: str, tmp_path: Path
) -> None:
    """The same with the real commands, once for each format and compression."""
    images = [b"one" * 1000 + bytes(2000), b"two" * 1000 + bytes(5001) + b"end", b"two" * 999]
    program, suffix = {"gzip": ("gunzip", ".gz"), "zstd": ("unzstd", ".zst"), "none": ("cat", "")}[compression]
    conftest.require_program(program)
    (tmp_path / "backup").mkdir()
    name, merged = tmp_path / "backup" / "name", tmp_path / "merged"
    for number, image in enumerate(images, 1):
        (tmp_path / "source").write_bytes(image)
        commands.done(
            "blockdiff",
            "backup",
            f"--format={delta_format}",
            f"--compression={compression}",
            "--block-size=1000",
            name,
            tmp_path / "source",
        )
        if delta_format == 1 and merged.exists() and merged.stat().st_size > len(image):
            os.truncate(merged, len(image))
        with open(f"{name}.{number}{suffix}", "rb") as file:
            delta = subprocess.run([program], stdin=file, stdout=subprocess.PIPE, check=True, timeout=60).stdout
        result = commands.run("blockdiff_merge", merged, stdin=delta)
        assert (result.returncode, result.stderr) == (0, b"")
        assert merged.read_bytes() == image
        commands.done("blockdiff", "restore", f"{name}@{number}", tmp_path / f"restored.{number}")
        assert (tmp_path / f"restored.{number}").read_bytes() == image
    commands.done("blockdiff", "verify", name)
