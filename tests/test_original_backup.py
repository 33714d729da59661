"""`blockdiff_backup` with any command that speaks the descriptor protocol, and `ssh_blockdiff_dump`."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import commands, conftest, loop
from tests.mariadb import wait_for
from tests.protocol import BLOCK, GOLDEN, IMAGES, dumped, run, snapshot
from tests.sshd import Sshd

ENV = {"BLOCKSIZE": str(BLOCK)}
SUCCESS = b"backup completed successfully\n"


def backup(
    name: str | bytes | Path, *command: str | bytes | Path, env: Mapping[str, str] = ENV, cwd: Path | None = None
) -> "subprocess.CompletedProcess[bytes]":
    return commands.run("blockdiff_backup", name, *command, env=env, cwd=cwd)


def assert_done(result: "subprocess.CompletedProcess[bytes]") -> None:
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", SUCCESS)


def assert_refused(result: "subprocess.CompletedProcess[bytes]", status: int, words: str) -> None:
    assert result.returncode == status
    assert words in result.stderr.decode()
    assert SUCCESS not in result.stderr


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """The NAME of a chain of two golden generations, plain, as the original leaves it."""
    directory = tmp_path / "backup"
    directory.mkdir()
    for suffix in (".1", ".1.md5", ".2", ".2.md5"):
        shutil.copy(f"{GOLDEN}/perl-plain{suffix}", f"{directory}/disk{suffix}")
    (directory / "disk.ver").write_text("2\n")
    return directory / "disk"


def script(tmp_path: Path, text: str) -> Path:
    """Return a program that does what `text`, a shell script, says."""
    path = tmp_path / "script"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o700)
    return path


def printer(tmp_path: Path, delta: bytes, table: bytes) -> Path:
    """Return a program that gives out this delta and this digest table, and ends well."""
    (tmp_path / "delta").write_bytes(delta)
    (tmp_path / "table").write_bytes(table)
    return script(tmp_path, f"cat '{tmp_path}/delta'; cat '{tmp_path}/table' >&6\n")


@pytest.mark.parametrize(("option", "suffix"), [(None, ""), ("-z", ".gz"), ("--gzip", ".gz"), ("--lzop", ".lzop")])
def test_backup_adds_generations_with_the_suffix_that_the_arguments_tell(
    option: str | None, suffix: str, tmp_path: Path
) -> None:
    if option == "--lzop":
        conftest.require_program("lzop")
    name = tmp_path / "disk"
    source = tmp_path / "source"
    for number, image in enumerate(IMAGES, 1):
        source.write_bytes(image)
        assert_done(backup(name, "blockdiff_dump", *([option] if option else []), source))
        assert Path(f"{name}.ver").read_bytes() == b"%d\n" % number
    stored = set(snapshot(tmp_path)) - {"source"}
    files = {f"disk.{n}{end}" for n in (1, 2, 3, 4) for end in (suffix, ".md5", ".json")}
    assert stored == files | {"disk.ver"}
    commands.done("blockdiff", "verify", name)
    for number, image in enumerate(IMAGES, 1):
        commands.done("blockdiff", "restore", "--force", f"{name}@{number}", tmp_path.parent / "restored")
        assert (tmp_path.parent / "restored").read_bytes() == image
    if not suffix:
        for number in (1, 2, 3, 4):
            assert Path(f"{name}.{number}").read_bytes() == (GOLDEN / f"perl-plain.{number}").read_bytes()
            assert Path(f"{name}.{number}.md5").read_bytes() == (GOLDEN / f"perl-plain.{number}.md5").read_bytes()


def test_backup_shows_the_command_where_verbose_is_set(tmp_path: Path) -> None:
    result = backup(tmp_path / "disk", "blockdiff_dump", GOLDEN / "image.1", env={**ENV, "VERBOSE": "1"})
    assert result.returncode == 0
    first, second = result.stderr.splitlines(keepends=True)
    assert first == f"running: blockdiff_dump {GOLDEN}/image.1\n".encode()
    assert second == SUCCESS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blockdiff_dump '{image}'; exit 7", "exited with status 7; the chain is as it was"),
        ("cat '{image}'; echo half >&6; kill -9 $$", "died of signal 9 (SIGKILL)"),
        ("exit 1", "exited with status 1"),
    ],
)
def test_a_command_that_fails_leaves_the_chain_as_it_was(text: str, words: str, chain: Path, tmp_path: Path) -> None:
    before = snapshot(chain.parent)
    assert_refused(backup(chain, script(tmp_path, text.format(image=GOLDEN / "image.3"))), 1, words)
    assert snapshot(chain.parent) == before


def leaving(tmp_path: Path, redirected: str) -> Path:
    """Return a program that dumps an image and leaves a process running, until the file `go` is there."""
    later = f"touch '{tmp_path}/begun'; until [ -e '{tmp_path}/go' ]; do sleep 0.01; done; touch '{tmp_path}/done'"
    begun = f"({later}) 2>/dev/null {redirected} &\nuntil [ -e '{tmp_path}/begun' ]; do sleep 0.01; done\n"
    return script(tmp_path, f"{begun}exec blockdiff_dump '{GOLDEN}/image.1'\n")


def test_what_a_command_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    try:
        assert_done(backup(tmp_path / "disk", leaving(tmp_path, ">/dev/null 6>&-")))
        assert not (tmp_path / "done").exists()
    finally:
        (tmp_path / "go").touch()
    wait_for((tmp_path / "done").exists, "what was left running")


@pytest.mark.parametrize("redirected", ["", ">/dev/null", "6>&-"])
def test_what_a_command_leaves_running_must_not_change_what_was_written(tmp_path: Path, redirected: str) -> None:
    """It had been stored as it was, and could still be written to."""
    (tmp_path / "backup").mkdir()
    try:
        result = backup(tmp_path / "backup" / "disk", leaving(tmp_path, redirected))
    finally:
        (tmp_path / "go").touch()
    wait_for((tmp_path / "done").exists, "what was left running")
    assert_refused(result, 1, "ended, but its output is still open: ")
    assert b") has it open; the chain is as it was" in result.stderr
    assert snapshot(tmp_path / "backup") == {}


def test_who_reads_what_a_command_writes_keeps_nobody(tmp_path: Path) -> None:
    """Such as a copy of the backup directory that is being made."""
    (tmp_path / "reader").write_text(f"touch '{tmp_path}/begun'; exec sleep 600\n")
    reader = (
        f"sh '{tmp_path}/reader' <'{tmp_path}/backup/.disk.1.tmp' >/dev/null 2>&1 6>&- & echo $! >'{tmp_path}/pid'\n"
    )
    begun = f"until [ -e '{tmp_path}/begun' ]; do sleep 0.01; done\n"
    dump = script(tmp_path, f"{reader}{begun}exec blockdiff_dump '{GOLDEN}/image.1'\n")
    (tmp_path / "backup").mkdir()
    try:
        assert_done(backup(tmp_path / "backup" / "disk", dump))
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def test_a_command_that_is_missing_is_named_and_leaves_the_chain_as_it_was(chain: Path) -> None:
    before = snapshot(chain.parent)
    result = backup(chain, "no-such-dump", "x")
    assert_refused(result, 1, "cannot run no-such-dump")
    assert b"is it on the PATH?" in result.stderr
    assert snapshot(chain.parent) == before


def test_a_first_backup_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    assert_refused(backup(tmp_path / "backup" / "disk", "blockdiff_dump", tmp_path / "missing"), 1, "No such file")
    assert snapshot(tmp_path / "backup") == {}


THIRD, THIRD_TABLE = dumped(IMAGES[2], BLOCK, (GOLDEN / "perl-plain.2.md5").read_bytes())
LIES = {
    "nothing at all": (b"", b"", "not a table of 16-byte digests"),
    "no delta": (b"", THIRD_TABLE, "it ends in the middle of its header"),
    "no table": (THIRD, b"", "0 bytes with a block size of 0"),
    "a delta that is cut in a block": (THIRD[:-1], THIRD_TABLE, "does not match the new digest table at offset 1536"),
    "a delta that is cut in a head": (THIRD[:10], THIRD_TABLE, "ends in the middle of a record"),
    "a delta without the changed block": (THIRD[:4], THIRD_TABLE, "lacks blocks from offset 0 on"),
    "a wrong byte": (THIRD[:-1] + b"?", THIRD_TABLE, "does not match the new digest table at offset 1536"),
    "a wrong digest of a kept block": (
        THIRD,
        THIRD_TABLE[:4] + b"?" + THIRD_TABLE[5:],
        "lacks blocks from offset 0 on, which are new or have other digests than before",
    ),
    "a table that is too short": (THIRD, THIRD_TABLE[:-16], "does not match the new digest table at offset 1536"),
    "a table that is too long": (THIRD, THIRD_TABLE + bytes(16), "lacks blocks from offset 2048 on"),
    "a table that ends in a digest": (THIRD, THIRD_TABLE[:-1], "not a table of 16-byte digests"),
    "another block size": (b"\0\4\0\0" + THIRD[4:], THIRD_TABLE, "has blocks of 1024 bytes, its table of 512"),
    "an unaligned offset": (THIRD[:4] + b"\1" + THIRD[5:], THIRD_TABLE, "a record has the offset"),
    "a block size of none": (bytes(4), bytes(4), "with a block size of 0"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_command_wrote_is_checked_before_it_counts(lie: str, chain: Path, tmp_path: Path) -> None:
    before = snapshot(chain.parent)
    delta, table, words = LIES[lie]
    assert_refused(backup(chain, printer(tmp_path, delta, table)), 5, words)
    assert snapshot(chain.parent) == before


def test_a_command_that_does_not_compress_as_its_arguments_say_is_refused(chain: Path, tmp_path: Path) -> None:
    before = snapshot(chain.parent)
    assert_refused(
        backup(chain, printer(tmp_path, THIRD, THIRD_TABLE), "-z"), 5, "what follows a gzip member is not one"
    )
    assert snapshot(chain.parent) == before


def test_any_program_that_speaks_the_protocol_will_do(chain: Path, tmp_path: Path) -> None:
    """In whatever order it writes, and though it sends blocks that did not change."""
    image = bytes(700) + b"end"
    delta, table = dumped(image, BLOCK)
    (tmp_path / "delta").write_bytes(delta)
    (tmp_path / "table").write_bytes(table)
    text = f"cat '{tmp_path}/table' >&6; exec 6>&-; cmp - '{chain}.2.md5' <&5 || exit 9; cat '{tmp_path}/delta'\n"
    assert_done(backup(chain, script(tmp_path, text)))
    commands.done("blockdiff", "verify", f"{chain}@3")
    commands.done("blockdiff", "restore", f"{chain}@3", tmp_path / "restored")
    assert (tmp_path / "restored").read_bytes() == image


def test_a_chain_may_shrink_to_whole_blocks_with_an_empty_delta(chain: Path, tmp_path: Path) -> None:
    delta, table = dumped(IMAGES[3], BLOCK, (GOLDEN / "perl-plain.2.md5").read_bytes())
    assert len(delta) == 4
    assert_done(backup(chain, printer(tmp_path, delta, table)))
    commands.done("blockdiff", "restore", chain, tmp_path / "restored")
    assert (tmp_path / "restored").read_bytes() == IMAGES[3]


def test_a_chain_that_holds_no_md5_tables_is_refused(tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    for path in GOLDEN.glob("own-gzip.*"):
        shutil.copy(path, tmp_path / "backup")
    before = snapshot(tmp_path / "backup")
    result = backup(tmp_path / "backup" / "own-gzip", "blockdiff_dump", GOLDEN / "image.1")
    assert_refused(result, 1, "own-gzip.4.sha256 is not an MD5 table, the only kind in the descriptor protocol")
    assert b"continue this chain with `blockdiff backup`" in result.stderr
    assert snapshot(tmp_path / "backup") == before


@pytest.mark.parametrize(
    "base", [b"a disk", b'it\'s "x"', b"$(touch pwned)", b"two\nlines", b"-dash", b"caf\xe9", b"a.1.gz", b"*?[a]"]
)
def test_names_and_paths_with_odd_characters_are_nothing_special(base: bytes, tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(base)
    directory.mkdir()
    source = "source " + os.fsdecode(base)
    for number, image in enumerate(IMAGES[:2], 1):
        (directory / source).write_bytes(image)
        assert_done(backup("--", base, "blockdiff_dump", "./" + source, cwd=directory))
        assert (directory / f"{directory.name}.ver").read_bytes() == b"%d\n" % number
    commands.done("blockdiff", "verify", "--", base, cwd=directory)
    commands.done("blockdiff", "restore", "--", base, tmp_path / "restored", cwd=directory)
    assert (tmp_path / "restored").read_bytes() == IMAGES[1]
    assert not list(tmp_path.rglob("pwned"))
    assert len(snapshot(directory)) == 1 + 2 * 3 + 1  # source, two generations, version


@pytest.mark.parametrize("first", [True, False])
def test_the_command_gets_the_protocols_descriptors_and_no_others(first: bool, chain: Path, tmp_path: Path) -> None:
    name = tmp_path / "new" if first else chain
    text = (
        f"{sys.executable} -c 'import os; print(sorted(map(int, os.listdir(\"/proc/self/fd\"))))' > '{tmp_path}/fds'\n"
        f"cat '{tmp_path}/delta'; cat '{tmp_path}/table' >&6\n"
    )
    (tmp_path / "delta").write_bytes(dumped(IMAGES[2], BLOCK)[0])
    (tmp_path / "table").write_bytes(dumped(IMAGES[2], BLOCK)[1])
    assert_done(backup(name, script(tmp_path, text)))
    # one more is the listing's own
    listed = [int(word) for word in (tmp_path / "fds").read_text().strip("[]\n").split(",")]
    assert len(listed) == (5 if first else 6)
    assert set(listed) >= ({0, 1, 2, 6} if first else {0, 1, 2, 5, 6})


def test_the_command_gets_its_arguments_as_they_are(tmp_path: Path) -> None:
    arguments = ["-x", "--", "", "a b", "$(c)", "--version", "-h", "*", "\n"]
    text = f"printf '[%s]' \"$@\" > '{tmp_path}/arguments'; blockdiff_dump '{GOLDEN}/image.1'\n"
    assert_done(backup(tmp_path / "disk", script(tmp_path, text), *arguments))
    assert (tmp_path / "arguments").read_text() == "".join(f"[{argument}]" for argument in arguments)


def test_an_option_of_its_own_that_backup_does_not_know_is_wrong_usage(tmp_path: Path) -> None:
    """Not a NAME: one that begins with a dash comes behind ``--``."""
    result = backup("-dash", "blockdiff_dump", GOLDEN / "image.1", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, b"")
    assert list(tmp_path.iterdir()) == []


def test_the_command_may_read_standard_input(tmp_path: Path) -> None:
    result = commands.run("blockdiff_backup", tmp_path / "disk", "blockdiff_dump", stdin=IMAGES[0], env=ENV)
    assert_done(result)
    assert (tmp_path / "disk.1").read_bytes() == (GOLDEN / "perl-plain.1").read_bytes()


def test_a_second_run_of_a_chain_exits_4_and_touches_nothing(chain: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    waiting = script(tmp_path, f"echo started >&2; read line < '{tmp_path}/go'; blockdiff_dump '{GOLDEN}/image.3'\n")
    first = subprocess.Popen(
        [sys.executable, commands.BIN / "blockdiff_backup", chain, waiting],
        env={**os.environ, **ENV, "PATH": commands.PATH},
        stderr=subprocess.PIPE,
    )
    assert first.stderr is not None
    try:
        assert first.stderr.readline() == b"started\n"
        before = snapshot(chain.parent)
        result = backup(chain, "blockdiff_dump", GOLDEN / "image.3")
        assert_refused(result, 4, "another run is busy with")
        assert snapshot(chain.parent) == before
    finally:
        (tmp_path / "go").write_text("go\n")
        said = first.communicate(timeout=60)[1]
    assert (first.returncode, said) == (0, SUCCESS)
    assert chain.with_suffix(".ver").read_bytes() == b"3\n"


@pytest.mark.parametrize("arguments", [[], ["name"]])
def test_backup_needs_a_name_and_a_command(arguments: list[str], tmp_path: Path) -> None:
    result = commands.run("blockdiff_backup", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"Usage: blockdiff_backup" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_backup_says_which_directory_is_missing(tmp_path: Path) -> None:
    result = backup(tmp_path / "missing" / "disk", "blockdiff_dump", GOLDEN / "image.1")
    assert_refused(result, 1, f"cannot open the backup directory {tmp_path}/missing: No such file or directory")
    assert b"mkdir -p" in result.stderr


# --- ssh_blockdiff_dump


@pytest.fixture
def ssh(sshd: Sshd, tmp_path: Path) -> Mapping[str, str]:
    """An environment whose `ssh` finds the test's sshd."""
    directory = tmp_path / "path"
    directory.mkdir()
    options = " ".join(f"-o '{option}'" for option in [*sshd.options, f"Port={sshd.port}"])
    wrapper = directory / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    wrapper.chmod(0o700)
    return {**ENV, "PATH": f"{directory}:{commands.PATH}"}


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_ssh_dump_writes_what_a_dump_on_the_host_would(
    number: int, sshd: Sshd, ssh: Mapping[str, str], tmp_path: Path
) -> None:
    old = GOLDEN / f"perl-plain.{number - 1}.md5" if number > 1 else None
    result = run("ssh_blockdiff_dump", sshd.login, GOLDEN / f"image.{number}", new=tmp_path / "new", old=old, env=ssh)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == (GOLDEN / f"perl-plain.{number}").read_bytes()
    assert (tmp_path / "new").read_bytes() == (GOLDEN / f"perl-plain.{number}.md5").read_bytes()


@pytest.mark.parametrize("program", ["blockdiff_dump", "ssh_blockdiff_dump"])
def test_a_dump_says_where_its_source_is_in_use(
    program: str, sshd: Sshd, ssh: Mapping[str, str], tmp_path: Path
) -> None:
    """The exit status stays 0: any other is a dump that failed."""
    where = [sshd.login] if program == "ssh_blockdiff_dump" else []
    with loop.mounted(tmp_path / "image", tmp_path / "place", 1 << 20) as device:
        os.sync()
        result = run(program, *where, device, new=tmp_path / "new", env=ssh)
    shown = f"{sshd.login}:{device}" if where else str(device)
    said = f"warning: {shown} is mounted on {tmp_path}/place: the dump may not be one point in time"
    assert (result.returncode, result.stderr.decode()) == (0, f"blockdiff: {said}\n")
    assert result.stdout[:4] == BLOCK.to_bytes(4, "little")


@pytest.mark.parametrize("option", ["-z", "--gzip", "--lzop"])
def test_ssh_dump_compresses(option: str, sshd: Sshd, ssh: Mapping[str, str], tmp_path: Path) -> None:
    program = "lzop" if option == "--lzop" else "gzip"
    conftest.require_program(program)
    old = GOLDEN / "perl-plain.1.md5"
    result = run("ssh_blockdiff_dump", option, sshd.login, GOLDEN / "image.2", new=tmp_path / "new", old=old, env=ssh)
    assert (result.returncode, result.stderr) == (0, b"")
    plain = subprocess.run([program, "-dc"], input=result.stdout, stdout=subprocess.PIPE, check=True, timeout=60)
    assert plain.stdout == (GOLDEN / "perl-plain.2").read_bytes()


def test_ssh_dump_under_backup_makes_a_chain_of_a_remote_file(
    sshd: Sshd, ssh: Mapping[str, str], tmp_path: Path
) -> None:
    source, name = tmp_path / "a source; with 'odd' $(characters)", tmp_path / "disk"
    for image in IMAGES:
        source.write_bytes(image)
        assert_done(backup(name, "ssh_blockdiff_dump", "-z", sshd.login, source, env=ssh))
    commands.done("blockdiff", "verify", name)
    for number, image in enumerate(IMAGES, 1):
        commands.done("blockdiff", "restore", "--force", f"{name}@{number}", tmp_path.parent / "restored")
        assert (tmp_path.parent / "restored").read_bytes() == image


def test_ssh_dump_runs_the_agent_under_the_prefix(sshd: Sshd, ssh: Mapping[str, str], tmp_path: Path) -> None:
    prefix = f"sh -c 'echo ran > \"$0\"; exec nice \"$@\"' '{tmp_path}/mark of the prefix'"
    env = {**ssh, "SSH_BLOCKDIFF_PREFIX": prefix}
    result = run("ssh_blockdiff_dump", sshd.login, GOLDEN / "image.1", new=tmp_path / "new", env=env)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == (GOLDEN / "perl-plain.1").read_bytes()
    assert (tmp_path / "mark of the prefix").read_text() == "ran\n"


def test_ssh_dump_fails_where_the_remote_file_is_missing(sshd: Sshd, ssh: Mapping[str, str], tmp_path: Path) -> None:
    result = run("ssh_blockdiff_dump", sshd.login, tmp_path / "missing", new=tmp_path / "new", env=ssh)
    assert (result.returncode, result.stdout) == (1, b"")
    assert f"{sshd.login}: cannot open {tmp_path}/missing: No such file or directory".encode() in result.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {}, b"Usage: ssh_blockdiff_dump"),
        (["host"], {}, b"Usage: ssh_blockdiff_dump"),
        (["host", "/file", "more"], {}, b"Usage: ssh_blockdiff_dump"),
        (["host:/file", "/file"], {}, b"cannot understand the host host:/file"),
        (["--", "-oProxyCommand=x", "/file"], {}, b"a host or user cannot begin with a dash"),
        (["-z", "--lzop", "host", "/file"], {}, b"cannot be compressed by both"),
        (["host", "/file"], {"BLOCKSIZE": "-1"}, b"BLOCKSIZE is '-1', not a number of bytes"),
        (["host", "/file"], {"BLOCKSIZE": "5000000"}, b"the block size 5000000 is not between"),
        (["host", "/file"], {"SSH_BLOCKDIFF_PREFIX": "nice 'ionice"}, b"SSH_BLOCKDIFF_PREFIX is not a command line"),
    ],
)
def test_ssh_dump_refuses_wrong_usage(
    arguments: list[str], environment: dict[str, str], words: bytes, tmp_path: Path
) -> None:
    result = run("ssh_blockdiff_dump", *arguments, new=tmp_path / "new", env=environment)
    assert (result.returncode, result.stdout) == (2, b"")
    assert words in result.stderr


def test_ssh_dump_needs_descriptor_6() -> None:
    result = run("ssh_blockdiff_dump", "host", "/file", new=None)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"descriptor 6 is not open" in result.stderr
