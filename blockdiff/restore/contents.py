"""What a device contains, as far as about a second of reading shows: signatures, and samples of the whole device."""

import os
import re
import shutil

from blockdiff.shared import process
from blockdiff.shared.blocks import shown_size
from blockdiff.shared.errors import ProcessError, printable

#: How many bytes are read at each end: most file systems and partition tables have their first blocks there.
_ENDS = 1 << 20
#: The number of samples, and the bytes of each.
_SAMPLES = 256
_SAMPLE = 64 << 10
_BLKID_TIMEOUT_S = 30.0

#: Common names for types that `blkid` reports under unusual names.
_KINDS = {
    "LVM2_member": "a physical volume of LVM",
    "crypto_LUKS": "a LUKS volume",
    "linux_raid_member": "a part of a RAID",
    "swap": "swap space",
}


def found_on(path: str, fd: int, size: int) -> str | None:
    """Return a phrase for what the device `path`, of `size` bytes and open as `fd`, contains.

    An example is ``an ext4 file system labelled web1``. Returns None if nothing was found: the ends and the samples are
    zero, and `blkid`, if it is installed, recognises nothing. Raises `OSError` if the device cannot be read.
    """
    return _signature(path) or _data(fd, size)


def _signature(path: str) -> str | None:
    program = shutil.which("blkid", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if program is None:
        return None
    try:
        said = process.run([program, "-p", "-o", "export", path], _BLKID_TIMEOUT_S, check=False)
    except ProcessError:
        return None
    if said.returncode == 8:  # the status of blkid for an ambiguous result
        return "signatures of several kinds"
    lines = said.stdout.decode("utf-8", "replace").splitlines()
    found = {name: re.sub(r"\\(.)", r"\1", value) for name, _, value in (line.partition("=") for line in lines)}
    kind = found.get("TYPE")
    if kind is None:
        return f"a partition table ({printable(found['PTTYPE'], 40)})" if "PTTYPE" in found else None
    if found.get("USAGE") != "filesystem":
        return _KINDS.get(kind, f"data of the type {printable(kind, 40)}")
    article = "an" if kind[0] in "aeinox" else "a"
    label = f" labelled {printable(found['LABEL'], 100)}" if found.get("LABEL") else ""
    return f"{article} {printable(kind, 40)} file system{label}"


def _data(fd: int, size: int) -> str | None:
    last = max(0, size - _ENDS)
    samples = ((size * i // _SAMPLES & ~4095, _SAMPLE) for i in range(_SAMPLES))
    for offset, length in ((0, _ENDS), (last, _ENDS), *samples):
        data = os.pread(fd, length, offset)
        rest = data.lstrip(b"\0")
        if rest:
            return f"data, at offset {shown_size(offset + len(data) - len(rest))}"
    return None
