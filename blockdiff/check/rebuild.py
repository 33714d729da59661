"""Rebuild a digest table that is lost: the deltas hold every block, and the manifest knows the table's checksum."""

from blockdiff.chain.commit import LockedChain
from blockdiff.chain.generations import Generation
from blockdiff.check.verify import Verifier
from blockdiff.format.deltafile import Sink
from blockdiff.shared.errors import DamagedError


class _Nowhere:
    """A sink that keeps nothing."""

    def write(self, data: bytes) -> None:
        """Forget it."""


def can_rebuild(verifier: Verifier, generation: Generation) -> bool:
    """Return whether a generation lacks its digest table, and its deltas are sound and make exactly that one.

    `verifier` has given its verdict on this generation last.
    """
    known = generation.manifest
    return known is not None and _lacks_its_table(generation) and verifier.write_table(known, _Nowhere())


def rebuild(number: int, chain: LockedChain) -> None:
    """Write the digest table of a generation again; raises `DamagedError` if the deltas no longer give it."""
    known = chain.generations[number].manifest
    assert known is not None, "only a manifest says which table was lost"
    name = chain.generations[number].name(known.table.suffix)

    def write(sink: Sink) -> None:
        with Verifier(chain) as verifier:
            verifier.one(number)
            if verifier.write_table(known, sink):
                return
        raise DamagedError(f"the deltas no longer give {chain.directory.path_of(name)}", "run repair again")

    chain.replace(name, write)


def _lacks_its_table(generation: Generation) -> bool:
    try:
        with generation.open_table():
            return False
    except DamagedError:
        return True
