"""`make demo`: back up a sample disk image twice, look at the chain, restore both days and compare.

Prints each command as a user would type it, and its output. Exits with 0 if all is well.
"""

import filecmp
import os
import random
import shlex
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import commands
from tests.sshd import Sshd

IMAGE_SIZE = 64 << 20


class Failed(Exception):  # noqa: N818
    """A step of the demo failed."""


def say(text: str) -> None:
    print(f"\n# {text}", flush=True)


def shell(directory: Path, *words: str) -> None:
    """Show a command, run it in `directory`, and show what it prints."""
    print(f"$ {shlex.join(words)}", flush=True)
    program = [sys.executable, str(commands.BIN / words[0])] if words[0] == "blockdiff" else [words[0]]
    status = subprocess.run([*program, *words[1:]], cwd=directory, stdin=subprocess.DEVNULL, check=False).returncode
    if status != 0:
        raise Failed(f"{words[0]} ended with status {status}")


def make_image(path: Path, noise: random.Random) -> None:
    """Write a sample disk image: some data, of which some is compressible, and large parts that were never written."""
    with path.open("wb") as file:
        file.write(noise.randbytes(4 << 20))
        file.seek(16 << 20)
        file.write(b"the same line over and over\n" * 300_000)
        file.truncate(IMAGE_SIZE)


def change_image(path: Path, noise: random.Random) -> None:
    """Change a few blocks of the image, as a day of use does."""
    with path.open("r+b") as file:
        for place in (1 << 20, 17 << 20, 40 << 20):
            file.seek(place + 12_345)
            file.write(noise.randbytes(100_000))


def transport(stack: ExitStack, directory: Path, image: Path) -> tuple[str, list[str]]:
    """Return the SOURCE for the image, and the options that it needs. Print whether it is read over SSH."""
    if not Sshd.available():
        say("There is no sshd on this machine: the image is read by a local agent, the same one that SSH would start.")
        return str(image), []
    keys = directory / "keys"
    keys.mkdir()
    server = stack.enter_context(Sshd(keys))
    say(f"The image is read over SSH, from a private sshd on 127.0.0.1, port {server.port}, with keys of its own.")
    options = ["IdentityFile=keys/user_key", "UserKnownHostsFile=keys/known_hosts"]
    return server.url(image), [word for option in options for word in ("--ssh-option", option)]


def demo(directory: Path) -> None:
    """Run all steps in `directory`."""
    noise = random.Random(2009)
    image = directory / "disk.img"
    (directory / "backup").mkdir(mode=0o700)
    make_image(image, noise)
    with ExitStack() as stack:
        source, options = transport(stack, directory, image)
        say("Day 1: a full backup. Silence means that all went well.")
        shell(directory, "blockdiff", "backup", "backup/disk", source, *options)
        shell(directory, "cp", "--sparse=always", "disk.img", "day1.img")
        say("The disk changes in three places.")
        change_image(image, noise)
        say("Day 2: the same command sends and stores only what changed.")
        shell(directory, "blockdiff", "backup", "backup/disk", source, *options)
    say("What there is now: two generations, and how much each of them takes.")
    shell(directory, "blockdiff", "list", "backup/disk")
    shell(directory, "ls", "-l", "backup")
    say("Would each of them restore exactly? Again, silence means yes.")
    shell(directory, "blockdiff", "verify", "backup/disk")
    say("Restore both days and compare them with the images.")
    shell(directory, "blockdiff", "restore", "backup/disk@1", "restored1.img")
    shell(directory, "blockdiff", "restore", "backup/disk", "restored2.img")
    shell(directory, "cmp", "restored1.img", "day1.img")
    shell(directory, "cmp", "restored2.img", "disk.img")
    if filecmp.cmp(directory / "restored1.img", directory / "restored2.img", shallow=False):
        raise Failed("both days are the same, although the image has changed")


def main() -> int:
    """Run the demo in a temporary directory, which is then removed; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="blockdiff-demo-") as name:
        os.chdir("/")
        try:
            demo(Path(name))
        except (Failed, OSError, subprocess.SubprocessError, RuntimeError) as error:
            print(f"\nThe demo failed: {error}", flush=True)
            return 1
    print("\nAll is well: both generations were restored exactly.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
