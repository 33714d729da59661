"""`make lab`: boot a guest and say how to get in, until Ctrl-C."""

import shlex
import sys

from tests.lab import image
from tests.lab.conftest import DISKS
from tests.lab.guest import Guest, GuestError


def main() -> None:
    print("booting; this takes about 10 seconds", file=sys.stderr)
    with Guest(image.image(), DISKS) as guest:
        print(f"to get in:         {shlex.join(guest.ssh_command)}")
        print(f"a source:          {guest.url('/dev/VG/LV')} {shlex.join(guest.arguments)}")
        print(f"empty disks:       {' '.join(guest.devices)}")
        print(f"the guest's 3306:  127.0.0.1:{guest.forward(3306)}")
        print(f"Python packages:   PYTHONPATH={image.PYTHON_PACKAGES}")
        print("Ctrl-C ends it; nothing is kept", flush=True)
        guest.wait()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except (image.BuildError, GuestError) as error:
        sys.exit(str(error))
