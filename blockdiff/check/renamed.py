"""Continue with a source that has another name now: its host was renamed, or its address is written differently.

A run compares its source with that of the last manifest. So only that manifest gets the new name, and keeps
the old one as well. The former manifest is set aside, and older generations keep the name that they were made with.
"""

from dataclasses import replace

from blockdiff.chain.commit import LockedChain
from blockdiff.chain.generations import Chain
from blockdiff.chain.inventory import MANIFEST_SUFFIX
from blockdiff.format.manifest import Manifest, Source
from blockdiff.shared.errors import ChainError, printable
from blockdiff.transport.address import Address


def examine(chain: Chain, address: Address) -> str | None:
    """Return what is to be done so that the chain continues with the source at `address`, None for nothing.

    Changes nothing. Raises `DamagedError` if the last manifest is damaged or missing, and `ChainError` if the
    chain's manifests name no source.
    """
    known, made = _manifests(chain, address)
    if made == known:
        return None
    path = chain.generation(known.generation).path(MANIFEST_SUFFIX)
    return f"{path} says that the source is {_shown(made.source)} now, and was {_shown(known.source)}"


def rename(name: str, address: Address) -> list[str]:
    """Do it, and return what was done; raises what `examine` does, `BusyError` and `StorageError`."""
    with LockedChain(name, recovers=False) as chain:
        known, made = _manifests(chain, address)
        done = examine(chain, address)
        if done is None:
            return chain.notes
        place = chain.generation(known.generation).name(MANIFEST_SUFFIX)
        chain.replace(place, lambda file: file.write(made.to_bytes()))
        return [*chain.notes, done]


def _manifests(chain: Chain, address: Address) -> tuple[Manifest, Manifest]:
    """Return the last manifest, and what is to take its place."""
    last = chain.generation(None)
    if last.manifest_error is not None:
        raise last.manifest_error
    chain.check_manifest(last)
    known = last.manifest
    if known is None or known.source.kind == "command":
        raise ChainError(
            f"generation {last.number} of {printable(chain.name)} does not name a source: there is nothing to rename",
            "the next run accepts any source",
        )
    here = replace(known.source, host=address.machine, path=address.path)
    if known.source.same_place(here):
        return known, known
    return known, replace(known, source=replace(here, was=str(known.source)))


def _shown(source: Source) -> str:
    return printable(str(source))
