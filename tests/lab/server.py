"""The guest as a backup server: blockdiff's own files in it, for tests in which it backs up itself."""

import io
import shlex
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.guest import Guest
from tests.lab.image import PYTHON_PACKAGES

_ROOT = Path(__file__).resolve().parent.parent.parent
_PLACE = "/opt/blockdiff"

#: What PATH has to be in the guest to find the commands.
PATH = f"{_PLACE}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@contextmanager
def installed(guest: Guest) -> Iterator[None]:
    """Have the checkout's commands in the guest, with a virtual environment as `make demo` leaves one."""
    guest.run(
        f"rm -rf {_PLACE} && mkdir -p {_PLACE}/.venv/bin {_PLACE}/.venv/lib/python3.11 && cd {_PLACE}/.venv"
        " && echo 'home = /usr/bin' > pyvenv.cfg && ln -s /usr/bin/python3 bin/python3"
        f" && ln -s {PYTHON_PACKAGES} lib/python3.11/site-packages"
    )
    guest.put(f"{_PLACE}/checkout.tar", _checkout())
    try:
        guest.run(f"tar -C {_PLACE} -xf {_PLACE}/checkout.tar")
        yield
    finally:
        guest.run(f"rm -rf {_PLACE}")


def command(*words: str) -> str:
    """Return a command of blockdiff's as a line for the guest's shell."""
    return f"PATH={PATH} {shlex.join(words)}"


def _checkout() -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("bin", "blockdiff"):
            tar.add(_ROOT / name, name, filter=_without_caches)
    return archive.getvalue()


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if entry.name.endswith("__pycache__") else entry
