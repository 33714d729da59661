"""Snapshots and changed extents by the real LVM: the shipped modules run in the guest, under its own Python."""

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import blockdiff
from blockdiff.transport.bundle import shipped
from tests.lab.guest import Guest
from tests.lab.volumes import VolumeGroup

PLACE = "/run/blockdiff-test"
MIB = 1 << 20

PRELUDE = """
import json, os, random, signal, sys, threading, time
from blockdiff import lvm
from blockdiff.host import lvcheck, lvs, thin
from blockdiff.host.lvcheck import find
from blockdiff.shared import extents, process
from blockdiff.shared.errors import BlockdiffError, Interrupted, SourceError
path = sys.argv[1]

def write(offset, data, path=path):
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)

def read(offset, length, path=path):
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)

def refusal(work):
    try:
        work()
    except BlockdiffError as error:
        return type(error).__name__ + ": " + error.message
    return "none"

def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def package(guest: Guest) -> Guest:
    """The guest, with the shipped modules in it."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in ("__init__.py", *shipped()):
            tar.add(Path(blockdiff.__file__).parent / path, f"blockdiff/{path}")
    guest.run(f"mkdir -p {PLACE}")
    guest.put(f"{PLACE}/package.tar", archive.getvalue())
    guest.run(f"tar -C {PLACE} -xf {PLACE}/package.tar")
    return guest


def done(guest: Guest, path: str, script: str, *arguments: str) -> object:
    """Run a script with `path` in the guest; return what it gave to `json.dump`."""
    guest.put(f"{PLACE}/script.py", (PRELUDE + script).encode())
    words = " ".join(arguments)
    return json.loads(guest.output(f"python3 {PLACE}/script.py {path} {words}", timeout_s=240))


@contextmanager
def going_on(guest: Guest, path: str, script: str) -> "Iterator[subprocess.Popen[str]]":
    """Run a script in the guest meanwhile; it has printed its first line, ``ready``."""
    guest.put(f"{PLACE}/meanwhile.py", (PRELUDE + script).encode())
    with guest.started(f"exec python3 -u {PLACE}/meanwhile.py {path}") as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line == "ready\n", line + process.stderr.read()
        yield process


@contextmanager
def locked(group: VolumeGroup) -> Iterator[None]:
    """Hold the lock of a volume group as an LVM command does while it works."""
    command = f"exec flock -x /run/lock/lvm/V_{group.name} sh -c 'echo ready; exec sleep 600'"
    with group.guest.started(command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield


def held(group: VolumeGroup) -> str:
    """Return the held metadata root of the pool ``pool``: ``-`` for none."""
    name = f"{group.name.replace('-', '--')}-pool-tpool"
    return group.guest.output(f"dmsetup status {name}").split()[6]


# snapshots


def test_a_thick_snapshot_is_read_only_still_and_gone_in_the_end(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "64M")
    found = done(
        package,
        path,
        """
write(0, b"before")
origin = find(path)
notes = lvcheck.check(origin, "20%")
with lvm.Snapshot(origin, "20%", "blockdiff_chain_x") as snapshot:
    volume = snapshot.look()
    write(0, b"after!")
    content = read(0, 6, snapshot.path).decode()
    try:
        write(0, b"x", snapshot.path)
        writable = True
    except OSError:
        writable = False
    snapshot.check()
json.dump([notes, sorted(volume.tags)[:2], volume.size, snapshot.path, content, writable, snapshot.level,
    snapshot.created_s], sys.stdout)
""",
    )
    assert isinstance(found, list)
    assert found[:3] == [[], ["blockdiff", "blockdiff_chain_x"], 16 * MIB]  # 12.8 MiB in extents of 4
    assert found[3].startswith(f"/dev/{volume_group.name}/bd_")
    assert found[4:6] == ["before", False]
    assert 0 < found[6] < 10 and 0 < found[7] < 30
    assert set(volume_group.volumes()) == {"lv"}


def test_a_thin_snapshot_is_read_only_active_and_gone_in_the_end(package: Guest, volume_group: VolumeGroup) -> None:
    volume_group.pool("pool", "128M")
    path = volume_group.thin("lv", "1G", "pool")
    found = done(
        package,
        path,
        """
write(0, b"before")
origin = find(path)
with lvm.Snapshot(origin, "20%") as snapshot:
    volume = snapshot.look()
    write(0, b"after!")
    snapshot.check()
    json.dump([lvcheck.check(origin, ""), volume.is_thin, volume.is_read_only, volume.state, snapshot.level,
        read(0, 6, snapshot.path).decode()], sys.stdout)
""",
    )
    assert found == [[], True, True, "a", None, "before"]
    assert set(volume_group.volumes()) == {"lv", "pool"}


def test_names_with_hyphens_and_dots_and_any_path_to_them(package: Guest) -> None:
    with VolumeGroup(package, package.devices[1], "my-vg.1-x") as group:
        path = group.volume("l--v.2-", "16M")
        found = done(
            package,
            path,
            """
paths = [path, "/dev/mapper/my--vg.1--x-l----v.2--", os.path.realpath(path), "my-vg.1-x/l--v.2-"]
names = [find(each).full_name for each in paths]
with lvm.Snapshot(find(path), "50%") as snapshot:
    snapshot.look()
    snapshot.check()
json.dump([names, lvm.sweep(lvm.abandoned(find(path)))], sys.stdout)
""",
        )
        assert found == [["my-vg.1-x/l--v.2-"] * 4, []]
        assert set(group.volumes()) == {"l--v.2-"}


def test_a_volume_of_several_segments_is_one_volume(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "8M")
    volume_group.volume("between", "8M")
    package.run(f"lvextend -q -L 16M {path}")
    script = "json.dump([find(path).size, len(lvs.volumes(find(path).group))], sys.stdout)"
    assert done(package, path, script) == [16 * MIB, 2]


def test_an_overflow_is_noticed_after_the_last_byte(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "64M")
    volume_group.volume("rest", "4020M")  # no room to extend it
    found = done(
        package,
        path,
        """
with lvm.Snapshot(find(path), "8M") as snapshot:
    snapshot.look()
    write(0, os.urandom(16 << 20))
    try:
        read(0, 4096, snapshot.path)
    except OSError:
        pass
    try:
        snapshot.check()
    except SourceError as error:
        json.dump([error.message, error.hint, snapshot.level], sys.stdout)
""",
    )
    assert isinstance(found, list)
    assert found[0] == f"the snapshot of {volume_group.name}/lv overflowed: 8 MiB was too small"
    assert found[1] == "use at least --snapshot-size 16M; 66M is always enough"
    assert set(volume_group.volumes()) == {"lv", "rest"}


def test_a_snapshot_that_fills_is_extended_while_there_is_room(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "64M")
    found = done(
        package,
        path,
        """
lvm.WATCH_INTERVAL_S = 0.2
def now():
    return lvs.volumes(snapshot.origin.group, snapshot._selection)[0]

with lvm.Snapshot(find(path), "8M") as snapshot:
    before = snapshot.look().size
    snapshot.watch()
    for i in range(12):
        write(i << 21, os.urandom(2 << 20))
        wait_until(lambda: snapshot.notes or now().data_percent < 70)
    snapshot.check()
    after = now().size
json.dump([before, after, snapshot.level, snapshot.notes], sys.stdout)
""",
    )
    assert isinstance(found, list)
    before, after, level, notes = found
    assert before == 8 * MIB and after >= 24 * MIB
    assert 70 <= level < 100 and notes == []
    assert set(volume_group.volumes()) == {"lv"}


def test_no_room_in_the_group_is_said_before_anything_is_made(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "100M")
    volume_group.volume("rest", "3984M")
    script = 'json.dump([lvcheck.check(find(path), ""), refusal(lambda: lvcheck.check(find(path), "20%"))], sys.stdout)'
    free = int(package.output(f"vgs --noheadings --units m --nosuffix -o vg_free {volume_group.name}").split(".")[0])
    assert 0 < free < 20
    name = volume_group.name
    assert done(package, path, script) == [
        [f"the snapshot of {name}/lv gets {free} MiB, all that the volume group {name} has"],
        f"SourceError: no room in the volume group {name}: a snapshot of {name}/lv needs 20 MiB, {free} MiB are free",
    ]
    without_check = 'json.dump(refusal(lvm.Snapshot(find(path), "20%").__enter__), sys.stdout)'
    message = done(package, path, without_check)
    assert f"cannot make a snapshot of {volume_group.name}/lv: lvcreate exited with status 5: " in str(message)
    assert "insufficient free space" in str(message)
    assert set(volume_group.volumes()) == {"lv", "rest"}


def test_what_can_have_no_snapshot_is_refused_in_words(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "16M")
    volume_group.pool("pool", "32M")
    name = volume_group.name
    package.run(f"lvcreate -q -y -s -n snap -L 8M {name}/lv && lvcreate -q -y -an -Wn -Zn -n idle -L 8M {name}")
    paths = {
        f"/dev/{name}/snap": f"SourceError: {name}/snap is itself a snapshot",
        f"/dev/{name}/pool": f"SourceError: {name}/pool is a thin pool",
        f"/dev/mapper/{name}-pool_tdata": f"SourceError: {name}/pool_tdata is a part of another volume",
        f"/dev/{name}/idle": f"SourceError: {name}/idle is not active",
        "/dev/ubda": "SourceError: /dev/ubda is not a logical volume: lvs exited with status 5",
        f"/dev/{name}/none": f"SourceError: /dev/{name}/none is not a logical volume: lvs exited with status 5",
        path: "none",
    }
    script = 'json.dump([refusal(lambda: lvcheck.check(find(each), "20%")) for each in sys.argv[1:]], sys.stdout)'
    answers = done(package, " ".join(paths), script)
    assert isinstance(answers, list)
    for answer, expected in zip(answers, paths.values(), strict=True):
        assert answer.startswith(expected)


def test_the_lock_of_another_command_is_named_and_nothing_is_made(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "16M")
    with going_on(
        package,
        path,
        """
lvm.CREATE_TIMEOUT_S = lvs.COMMAND_TIMEOUT_S = 5
lvm.QUICK_TIMEOUT_S = 1
origin = find(path)
print("ready")
sys.stdin.readline()
json.dump([refusal(lvm.Snapshot(origin, "50%").__enter__), refusal(lambda: find(path))], sys.stdout)
""",
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        with locked(volume_group):
            process.stdin.write("go\n")
            process.stdin.close()
            answers = json.loads(process.stdout.readline())
    name = volume_group.name
    words = f"did not end within 5 s: another LVM command seems to hold the lock of the volume group of {name}"
    assert answers[0] == f"SourceError: cannot make a snapshot of {name}/lv: lvcreate {words}"  # SIGINT made it give up
    assert answers[1].startswith("SourceError: lvs did not end within 5 s: another LVM command seems to hold the lock")
    assert set(volume_group.volumes()) == {"lv"}
    assert package.run("pgrep lvcreate", check=False).stdout == ""


def test_a_signal_while_lvcreate_waits_leaves_no_snapshot(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "16M")
    with going_on(
        package,
        path,
        """
def handler(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("signal")
    raise Interrupted("told to stop")

signal.signal(signal.SIGTERM, handler)
snapshot = lvm.Snapshot(find(path), "50%")
print("ready")
sys.stdin.readline()
try:
    with snapshot:
        print("made")
except Interrupted:
    print("interrupted")
""",
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        with locked(volume_group):
            process.stdin.write("go\n")
            process.stdin.close()
            package.run("until pgrep -x lvcreate; do sleep 0.1; done; sleep 1; pkill -TERM -f meanwhile.py")
            assert process.stdout.readline() == "signal\n"
        assert process.stdout.readline() == "interrupted\n"
    assert set(volume_group.volumes()) == {"lv"}


def test_a_removal_waits_for_whoever_holds_the_device(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "16M")
    found = done(
        package,
        path,
        """
with lvm.Snapshot(find(path), "50%") as snapshot:
    snapshot.look()
    fd = os.open(snapshot.path, os.O_RDONLY)
    threading.Timer(8, os.close, [fd]).start()  # longer than lvremove itself tries
    begun = time.monotonic()
took = time.monotonic() - begun
lvm.REMOVE_TIMEOUT_S = 1
with lvm.Snapshot(find(path), "50%") as other:
    fd = os.open(other.look().path, os.O_RDONLY)
    message = refusal(other.close)
    os.close(fd)
    lvm.remove(other.look())  # it tries once
json.dump([took, message], sys.stdout)
""",
    )
    assert isinstance(found, list)
    assert 5 < found[0] < 30
    assert found[1].startswith(f"ProcessError: cannot remove the snapshot {volume_group.name}/bd_")
    assert "in use" in found[1]
    assert set(volume_group.volumes()) == {"lv"}


def test_the_sweep_takes_what_a_killed_agent_left_and_nothing_else(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "16M")
    make = """
snapshot = lvm.Snapshot(find(path), "25%")
snapshot.__enter__()
print("ready")
sys.stdin.read()
"""
    with going_on(package, path, make):
        package.run(
            f"lvcreate -q -y -s -n bd_x -L 4M {path}; lvcreate -q -y -s -n bd_y --addtag blockdiff -L 4M {path}"
        )
        foreign = {"lv", "bd_x", "bd_y"}
        (living,) = set(volume_group.volumes()) - foreign
        script = "json.dump(lvm.sweep(lvm.abandoned(find(path))), sys.stdout)"
        assert done(package, path, script) == []
    assert set(volume_group.volumes()) == {*foreign, living}
    removed = f"removed the snapshot {volume_group.name}/{living}, which an earlier run left"
    assert done(package, path, script) == [removed]
    assert set(volume_group.volumes()) == foreign


def test_what_a_reboot_left_is_swept(package: Guest, volume_group: VolumeGroup) -> None:
    path = volume_group.volume("lv", "16M")
    tags = "--addtag blockdiff --addtag blockdiff_pid_1_1_000000000000"  # pid 1 of another boot
    package.run(f"lvcreate -q -y -s -n bd_old {tags} -L 4M {path}")
    script = "json.dump(lvm.sweep(lvm.abandoned(find(path))), sys.stdout)"
    removed = f"removed the snapshot {volume_group.name}/bd_old, which an earlier run left"
    assert done(package, path, script) == [removed]


# changed extents

COMPARE = """
origin = find(path)
random.seed(int(sys.argv[2]))
size, unit = origin.size, 4096

def change():
    written = 0
    for _ in range(random.randrange(1, 30)):
        length = random.choice((1, 3, 16, 100)) * unit
        offset = random.randrange((size - length) // unit) * unit
        if random.random() < 0.3:
            length = min(length * 10, size - offset)
            process.run(["blkdiscard", "-o", str(offset), "-l", str(length), path], 30)
        else:
            write(offset, os.urandom(length) if random.random() < 0.8 else bytes(length))
            written += (length // 65536 + 2) * 65536
    return written

def keep():
    with lvm.Snapshot(find(path), "") as snapshot:
        volume = snapshot.look()
        snapshot.keep()
    return volume

def device(volume):
    return "/dev/{}/{}".format(volume.group, volume.name)
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_changed_extents_are_what_reading_finds(package: Guest, volume_group: VolumeGroup, seed: int) -> None:
    volume_group.pool("pool", "512M")
    path = volume_group.thin("lv", "100M", "pool")
    found = done(
        package,
        path,
        COMPARE
        + """
change()
old = keep()
faults, sizes = [], []
for _ in range(2):
    written = change()
    new = keep()
    kept = thin.kept(find(path), old.uuid)
    ranges = thin.changed_extents(kept, new)
    position = data = 0
    for start, end, state in ranges:
        if start != position:
            faults.append(["gap", start])
        position = end
        before, after = read(start, end - start, device(old)), read(start, end - start, device(new))
        if state == extents.SAME and before != after:
            faults.append(["not the same", start, end])
        if state == extents.ZEROS and after.strip(bytes(1)):
            faults.append(["not zeros", start, end])
        data += (end - start) * (state == extents.DATA)
    if position != size:
        faults.append(["short", position])
    sizes.append([data, written])
    lvm.remove(old)
    old = new
json.dump([faults, sizes], sys.stdout)
""",
        str(seed),
    )
    assert isinstance(found, list)
    faults, sizes = found
    assert faults == []
    for data, written in sizes:
        assert 0 < data <= written or written == 0 == data
    assert held(volume_group) == "-"


def test_mapped_extents_are_what_reading_finds(package: Guest, volume_group: VolumeGroup) -> None:
    volume_group.pool("pool", "256M")
    path = volume_group.thin("lv", "100M", "pool")
    found = done(
        package,
        path,
        COMPARE
        + """
empty = keep()
nothing = thin.mapped_extents(empty)
change()
new = keep()
wrong, position, data = [], 0, 0
for start, end, state in thin.mapped_extents(new):
    assert start == position
    position = end
    if state == extents.ZEROS and read(start, end - start, device(new)).strip(bytes(1)):
        wrong.append(start)
    data += (end - start) * (state == extents.DATA)
json.dump([nothing, wrong, position, data, new.data_percent], sys.stdout)
""",
        "7",
    )
    assert isinstance(found, list)
    assert found[:3] == [[[0, 100 * MIB, "zeros"]], [], 100 * MIB]
    assert found[3] == pytest.approx(found[4] * MIB, abs=0.01 * MIB)  # of 100 MiB, as LVM counts it
    assert held(volume_group) == "-"


def test_an_fstrim_makes_holes(package: Guest, volume_group: VolumeGroup) -> None:
    volume_group.pool("pool", "256M")
    path = volume_group.thin("lv", "128M", "pool")
    mounted = volume_group.mounted(path)
    package.run(f"head -c 20M /dev/urandom >{mounted}/large; sync {mounted}/large")
    script = COMPARE + "json.dump(keep().uuid, sys.stdout)"
    uuid = str(done(package, path, script, "1"))
    package.run(f"rm {mounted}/large; sync; fstrim {mounted}")
    found = done(
        package,
        path,
        COMPARE
        + """
old, new = thin.kept(find(path), sys.argv[3]), keep()
sizes = {}
for start, end, state in thin.changed_extents(old, new):
    sizes[state] = sizes.get(state, 0) + end - start
json.dump(sizes, sys.stdout)
""",
        "1",
        uuid,
    )
    assert isinstance(found, dict)
    assert found["zeros"] >= 18 * MIB
    assert sum(found.values()) == 128 * MIB


def test_a_kept_snapshot_that_was_made_anew_is_not_matched(package: Guest, volume_group: VolumeGroup) -> None:
    volume_group.pool("pool", "64M")
    path = volume_group.thin("lv", "32M", "pool")
    found = done(
        package,
        path,
        COMPARE
        + """
old = keep()
lvm.remove(old)
process.run(["lvcreate", "-y", "-s", "-p", "r", "-k", "n", "-a", "y", "-n", old.name, "--addtag", "blockdiff",
    "--addtag", "blockdiff_kept", origin.full_name], 60, env=lvs.environment())
(impostor,) = lvs.volumes(origin.group, 'lv_name="{}"'.format(old.name))
json.dump([impostor.thin_id == old.thin_id, thin.kept(origin, old.uuid), thin.kept(origin, impostor.uuid) is not None],
    sys.stdout)
""",
        "1",
    )
    assert found == [True, None, True]


def test_an_origin_that_was_made_anew_has_no_kept_snapshot(package: Guest, volume_group: VolumeGroup) -> None:
    volume_group.pool("pool", "64M")
    path = volume_group.thin("lv", "32M", "pool")
    uuid = str(done(package, path, COMPARE + "json.dump(keep().uuid, sys.stdout)", "1"))
    package.run(f"lvremove -q -y {path}")
    volume_group.thin("lv", "32M", "pool")
    script = "json.dump([thin.kept(find(path), sys.argv[2]), lvm.abandoned(find(path))], sys.stdout)"
    assert done(package, path, script, uuid) == [None, []]


def test_a_resized_volume_is_no_hint(package: Guest, volume_group: VolumeGroup) -> None:
    volume_group.pool("pool", "64M")
    path = volume_group.thin("lv", "32M", "pool")
    found = done(
        package,
        path,
        COMPARE
        + """
old = keep()
process.run(["lvextend", "-L", "64M", origin.full_name], 60, env=lvs.environment())
new = keep()
json.dump(refusal(lambda: thin.changed_extents(old, new)), sys.stdout)
""",
        "1",
    )
    assert found == f"HintError: the volume was resized from {32 * MIB} to {64 * MIB} bytes"


def test_an_external_origin_is_no_hint(package: Guest, volume_group: VolumeGroup) -> None:
    volume_group.pool("pool", "64M")
    base = volume_group.volume("base", "32M")
    name = volume_group.name
    package.run(f"lvchange -q -a n {base} && lvchange -q -p r {base}")
    package.run(f"lvcreate -q -y -s -n lv --thinpool {name}/pool {name}/base")
    script = COMPARE + "new = keep(); json.dump(refusal(lambda: thin.mapped_extents(new)), sys.stdout)"
    message = str(done(package, volume_group.path("lv"), script, "1"))
    assert message.startswith("HintError: ") and message.endswith(
        "external origin, which shows where nothing is mapped"
    )


def test_a_metadata_snapshot_is_released_whatever_happens(package: Guest, volume_group: VolumeGroup) -> None:
    volume_group.pool("pool", "64M")
    path = volume_group.thin("lv", "32M", "pool")
    found = done(
        package,
        path,
        COMPARE
        + """
new = keep()
fakes = sys.path[0] + "/fakes"
os.makedirs(fakes, exist_ok=True)
real = os.environ["PATH"]
os.environ["PATH"] = fakes + ":" + real

def held():
    pool = thin._pool_of(new)[0]
    return thin._dmsetup("status", pool).split()[6]

def with_fake(script):
    with open(fakes + "/thin_delta", "w") as file:
        file.write("#!/bin/sh\\n" + script)
    os.chmod(fakes + "/thin_delta", 0o755)
    return [refusal(lambda: thin.mapped_extents(new)), held()]

answers = [with_fake("echo no >&2; exit 1"), with_fake("echo rubbish")]
thin.DELTA_TIMEOUT_S = 1
answers.append(with_fake("exec sleep 100"))
thin.DELTA_TIMEOUT_S = 100

def handler(number, frame):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    raise Interrupted("told to stop")

signal.signal(signal.SIGALRM, handler)
try:
    with_fake("kill -ALRM $PPID; exec sleep 100")
except Interrupted:
    answers.append(held())
os.remove(fakes + "/thin_delta")
pool = os.path.basename(thin._pool_of(new)[0])
process.run(["dmsetup", "message", pool, "0", "reserve_metadata_snap"], 30, env=lvs.environment())
answers.append(refusal(lambda: thin.mapped_extents(new)))
answers.append(held() != "-")
process.run(["dmsetup", "message", pool, "0", "release_metadata_snap"], 30, env=lvs.environment())
answers.append(refusal(lambda: thin.mapped_extents(new)))
answers.append(held())
json.dump(answers, sys.stdout)
""",
        "1",
    )
    pool = f"{volume_group.name}-pool"
    by_hand = f"dmsetup message {pool}-tpool 0 release_metadata_snap"
    assert found == [
        ["HintError: thin_delta failed: no", "-"],
        ["HintError: thin_delta printed what cannot be understood: syntax error: line 1, column 0", "-"],
        [
            f"HintError: thin_delta -m --thin1 2 --thin2 2 /dev/mapper/{pool}_tmeta did not end within 1 s",
            "-",
        ],
        "-",
        f"HintError: the metadata snapshot of {pool}-tpool is in use; if by a run that was killed: {by_hand}",
        True,
        "none",
        "-",
    ]


def test_a_udev_that_stands_still_is_told_and_is_no_lock(package: Guest, volume_group: VolumeGroup) -> None:
    """lvcreate waits for it, and cannot be ended; what it makes once udev goes on is swept."""
    path, name = volume_group.volume("lv", "16M"), volume_group.name
    script = """
lvm.CREATE_TIMEOUT_S = 20
process.GENTLE_TIMEOUT_S = 1
json.dump(refusal(lvm.Snapshot(find(path), "50%").__enter__), sys.stdout)
"""
    package.run("pkill -STOP -x systemd-udevd || pkill -STOP -f systemd-udevd")
    try:
        said = str(done(package, path, script))
    finally:
        package.run("pkill -CONT -x systemd-udevd || pkill -CONT -f systemd-udevd")
    start = f"SourceError: cannot make a snapshot of {name}/lv: lvcreate did not end within 20 s, and process "
    assert said.startswith(start) and said.endswith(" is still running: it waits for udev, which does not answer")
    package.run("while pgrep -x lvcreate; do sleep 0.1; done")
    notes = done(package, path, "json.dump(lvm.sweep(lvm.abandoned(find(path))), sys.stdout)")
    assert isinstance(notes, list) and len(notes) == 1
    assert notes[0].startswith(f"removed the snapshot {name}/bd_")
    assert set(volume_group.volumes()) == {"lv"}


def test_a_thin_pool_above_the_limit_of_lvms_settings_is_refused_before(
    package: Guest, volume_group: VolumeGroup
) -> None:
    name, settings = volume_group.name, "/etc/lvm/lvmlocal.conf"
    volume_group.pool("pool", "64M")
    path = volume_group.thin("lv", "64M", "pool")
    package.run(f"lvcreate -q -y -Wn -n rest -l 100%FREE {name}")  # or dmeventd might extend the pool
    package.run(f"dd if=/dev/urandom of={path} bs=1M count=40 oflag=direct conv=notrunc status=none")
    before = package.get(settings)
    script = """
thin = find(path)
json.dump([refusal(lambda: lvcheck.check(thin, "")), refusal(lvm.Snapshot(thin, "").__enter__)], sys.stdout)
"""
    package.put(settings, before + b"\nactivation/thin_pool_autoextend_threshold=50\n")
    try:
        found = done(package, path, script)
    finally:
        package.put(settings, before)
    assert isinstance(found, list)
    ours, lvms = found
    assert ours == (
        f"SourceError: the data of the thin pool {name}/pool of {name}/lv is 62.5% full: "
        "LVM makes no snapshot in it above 50%"
    )
    assert "lvcreate exited with status 5: " in lvms and "threshold" in lvms
    assert set(volume_group.volumes()) == {"lv", "pool", "rest"}
