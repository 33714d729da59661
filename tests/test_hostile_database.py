"""Whoever answers in place of a database: it learns no password, costs no memory, and keeps nobody waiting."""

import socket
import ssl
import subprocess
from collections.abc import Callable
from itertools import count, cycle, repeat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from blockdiff import mysqllock
from blockdiff.database import bounds, sqlsession
from blockdiff.database.accounts import Account, Tls
from blockdiff.mysqllock import Limits
from blockdiff.shared.errors import DatabaseError
from tests import commands
from tests.conftest import require, require_program
from tests.fake_mysql import OK, SALT, FakeServer, Wire, columns, table, usual
from tests.mariadb import MariaDB

SECRET = "hushed-secret-of-thirty-letters"
#: What a password becomes at most where it is only proven: one SHA-256.
PROOF = 32
LIMITS = Limits()
#: For answers that take their time on a machine with other work.
PATIENT = Limits(lock_wait_s=600)
Script = Callable[[Wire], None]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No option file of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))


def lock(server: FakeServer, *words: str) -> "subprocess.CompletedProcess[bytes]":
    """Run the command `mysqllock` with what answers there."""
    arguments = ["--host=127.0.0.1", f"--port={server.port}", "--user=u", *words, "true"]
    return commands.run("mysqllock", *arguments, env={"MYSQL_PWD": SECRET})


def login(server: FakeServer, limits: Limits = LIMITS, **account: object) -> mysqllock.Database:
    return mysqllock.connect(Account("u", SECRET, "127.0.0.1", server.port, **account), limits)  # type: ignore[arg-type]  # of one test each


def refused(server: FakeServer, limits: Limits = LIMITS) -> DatabaseError:
    with pytest.raises(DatabaseError) as caught:
        login(server, limits).check()
    assert SECRET not in str(caught.value) + str(caught.value.hint)
    return caught.value


# --- passwords


def offers_key(wire: Wire) -> None:
    wire.send(b"\x01" + KEY.public_key().public_bytes(serialization.Encoding.PEM, _FORMAT))
    wire.receive()


def wants_all(wire: Wire) -> None:
    wire.send(b"\x01\x04")
    wire.receive()
    offers_key(wire)


KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
_FORMAT = serialization.PublicFormat.SubjectPublicKeyInfo


def switches(plugin: str, *then: Script) -> Script:
    def script(wire: Wire) -> None:
        wire.greet()
        wire.switch(plugin)
        for step in then:
            step(wire)

    return script


def begins(plugin: str, *then: Script) -> Script:
    def script(wire: Wire) -> None:
        wire.greet(plugin)
        for step in then:
            step(wire)

    return script


def asks(wire: Wire) -> None:
    """Let `dialog` ask for the password."""
    wire.greet()
    wire.send(b"\xfedialog\0\x04Password: ")
    wire.receive()


ASKING = {
    "mysql_clear_password": switches("mysql_clear_password"),
    "dialog": asks,
    "sha256_password": switches("sha256_password", offers_key),
    "sha256_password at first": begins("sha256_password", offers_key),
    "caching_sha2_password": switches("caching_sha2_password", wants_all),
    "caching_sha2_password at first": begins("caching_sha2_password", wants_all),
    "mysql_old_password": switches("mysql_old_password"),
}


@pytest.mark.parametrize("how", ASKING)
def test_a_server_that_asks_for_the_password_gets_none(how: str) -> None:
    with FakeServer(ASKING[how]) as server:
        result = lock(server)
    said = result.stderr.decode()
    assert result.returncode == 1
    assert f"the server asks for the password itself ({how.partition(' ')[0]})" in said
    assert "?ssl-ca=FILE" in said and "mysql+ssh://" in said
    first, *others = server.received
    assert SECRET.encode() not in b"".join(server.received)
    assert all(len(packet) <= PROOF for packet in others), "something was encrypted for whoever offers a key"
    assert first.count(b"u\0") and SECRET not in said


def test_a_backup_tells_no_password_either(tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir(mode=0o700)
    (tmp_path / "image").write_bytes(bytes(4096))
    with FakeServer(ASKING["mysql_clear_password"]) as server:
        words = ["--lvm", "--mysql", f"mysql://u@127.0.0.1:{server.port}/"]
        name = tmp_path / "backup" / "image"
        result = commands.run("blockdiff", "backup", name, tmp_path / "image", *words, env={"MYSQL_PWD": SECRET})
    assert result.returncode == 1
    assert b"asks for the password itself (mysql_clear_password)" in result.stderr
    assert SECRET.encode() not in b"".join(server.received)


def test_the_usual_ways_only_prove_the_password() -> None:
    def proven(wire: Wire) -> None:
        wire.greet("caching_sha2_password")
        wire.send(b"\x01\x03")
        wire.send(OK)
        wire.serve(usual)

    def native(wire: Wire) -> None:
        wire.greet("caching_sha2_password")
        assert len(wire.switch("mysql_native_password")) == 20
        wire.send(OK)
        wire.serve(usual)

    for script in (proven, native):
        with FakeServer(script) as server, login(server) as database:
            assert database.version.numbers == (8, 4, 3)
        assert SECRET.encode() not in b"".join(server.received)


def test_with_the_servers_key_caching_sha2_password_is_for_it_alone(tmp_path: Path) -> None:
    """A key that is offered is not even asked for."""
    file = tmp_path / "public_key.pem"
    file.write_bytes(KEY.public_key().public_bytes(serialization.Encoding.PEM, _FORMAT))
    sent: list[bytes] = []

    def script(wire: Wire) -> None:
        wire.greet("caching_sha2_password")
        wire.send(b"\x01\x04")
        sent.append(wire.receive())
        wire.send(OK)
        wire.serve(usual)

    with FakeServer(script) as server, login(server, public_key=str(file)):
        pass
    oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA1()), algorithm=hashes.SHA1(), label=None)  # as MySQL does
    mixed = KEY.decrypt(sent[0], oaep)
    assert bytes(a ^ b for a, b in zip(mixed, cycle(SALT))) == SECRET.encode() + b"\0"


# --- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an authority (ca.pem), a certificate of it for 127.0.0.1, and another authority (other.pem)."""
    openssl, directory = require_program("openssl"), tmp_path_factory.mktemp("tls")
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]

    def run(*words: str) -> None:
        subprocess.run([openssl, *words], cwd=directory, check=True, capture_output=True, timeout=60)

    for name in ("ca", "other"):
        run(*made, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    for name, subject in (("here", "IP:127.0.0.1"), ("elsewhere", "DNS:db99")):
        authority = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"]
        words = ["-subj", f"/CN={name}", "-addext", f"subjectAltName={subject}"]
        run(*made, *authority, *words, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    return directory


@pytest.fixture
def encrypted(certificates: Path) -> "Callable[[str], FakeServer]":
    """Makes a server with one of the certificates, which asks for the password in clear."""

    def make(name: str) -> FakeServer:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")

        def script(wire: Wire) -> None:
            wire.greet_encrypted(context)
            wire.switch("mysql_clear_password")
            wire.send(OK)
            wire.serve(usual)

        return FakeServer(script)

    return make


def test_a_server_that_has_proven_who_it_is_may_have_the_password(
    certificates: Path, encrypted: "Callable[[str], FakeServer]"
) -> None:
    with encrypted("here") as server, login(server, tls=Tls(str(certificates / "ca.pem"))):
        pass
    assert SECRET.encode() + b"\0" in server.received
    with encrypted("elsewhere") as server, login(server, tls=Tls(str(certificates / "ca.pem"), checks_name=False)):
        pass


@pytest.mark.parametrize(
    ("server_has", "authority", "reason"),
    [("here", "other", "self-signed|unable to get"), ("elsewhere", "ca", "IP address mismatch"), ("here", None, "")],
)
def test_a_server_that_has_not_gets_nothing(
    certificates: Path, encrypted: "Callable[[str], FakeServer]", server_has: str, authority: str | None, reason: str
) -> None:
    tls = Tls(None if authority is None else str(certificates / f"{authority}.pem"))
    with encrypted(server_has) as server, pytest.raises(DatabaseError, match=f"TLS failed: .*({reason})") as caught:
        login(server, tls=tls)
    assert "ssl-ca" in str(caught.value.hint)
    assert SECRET.encode() not in b"".join(server.received)


def test_a_server_without_tls_gets_nothing_where_tls_is_wanted(certificates: Path) -> None:
    with FakeServer(ASKING["mysql_clear_password"]) as server, pytest.raises(DatabaseError, match="SSL") as caught:
        login(server, tls=Tls(str(certificates / "ca.pem")))
    assert "mysql+ssh://" in str(caught.value.hint)
    assert b"u\0" not in b"".join(server.received)


def test_a_real_server_is_reached_by_tls_as_the_option_file_says(certificates: Path, tmp_path: Path) -> None:
    require(MariaDB.available(), "the programs mariadbd and mariadb-install-db")
    (tmp_path / "my.cnf").write_text(f"[client]\nuser=u\npassword={SECRET}\nssl-ca={certificates}/ca.pem\n")
    (tmp_path / "my.cnf").chmod(0o600)
    files = [f"--ssl-ca={certificates}/ca.pem", f"--ssl-cert={certificates}/here.pem"]
    with MariaDB(tmp_path, *files, f"--ssl-key={certificates}/here.key") as server:
        server.run(f"CREATE USER u@'%' IDENTIFIED BY '{SECRET}' REQUIRE SSL", "GRANT PROCESS, RELOAD ON *.* TO u@'%'")
        place = ["--host=127.0.0.1", f"--port={server.port}", "--before=SELECT 1", "--after=SELECT 2"]
        encrypted = commands.run("mysqllock", *place, f"--defaults-file={tmp_path}/my.cnf", "true")
        plain = commands.run("mysqllock", *place, "--user=u", "true", env={"MYSQL_PWD": SECRET})
    assert encrypted.returncode == 0, encrypted.stderr
    assert plain.returncode == 1 and b"Access denied for user 'u'" in plain.stderr


# --- bounds


def answering(statement: str, answer: "Callable[[Wire], None]") -> Script:
    """Log everybody in, and answer the first statement with this word in it by the function."""

    def script(wire: Wire) -> None:
        wire.greet()
        wire.send(OK)
        while True:
            text = wire.receive()[1:].decode()
            if statement in text:
                answer(wire)
            for packet in usual(text):
                wire.send(packet)

    return script


def endless_rows(wire: Wire) -> None:
    for packet in columns("version"):
        wire.send(packet)
    numbers = [(len(columns("version")) + 1 + n) % 256 for n in range(256)]
    rows = b"".join(bytes([201, 0, 0, number, 200]) + b"x" * 200 for number in numbers)
    for _ in repeat(None):
        wire.raw(rows)


def endless_packet(wire: Wire) -> None:
    for number in count(1):
        wire.send(b"\0" * 0xFFFFFF, number % 256)


def endless_columns(wire: Wire) -> None:
    wire.send(b"\xfe" + b"\xff" * 8)
    column = columns("version")[1]
    described = b"".join(bytes([len(column), 0, 0, (2 + n) % 256]) + column for n in range(256))
    for _ in repeat(None):
        wire.raw(10 * described)


@pytest.mark.parametrize("answer", [endless_rows, endless_packet, endless_columns])
def test_an_endless_answer_ends_the_run(answer: "Callable[[Wire], None]") -> None:
    with FakeServer(answering("VERSION()", answer)) as server:
        error = refused(server, PATIENT)
    assert error.message == f"the database on 127.0.0.1:{server.port}: one answer had more than 4 MiB"


def test_too_many_rows_end_the_run() -> None:
    packets = table(["version"], *[["8.4.3"]] * 100_001)
    rows = b"".join(bytes([len(each), 0, 0, (1 + n) % 256]) + each for n, each in enumerate(packets))

    def answer(wire: Wire) -> None:
        wire.raw(rows)

    with FakeServer(answering("VERSION()", answer)) as server:
        assert refused(server, PATIENT).message.endswith(": one answer had 100001 rows")


def test_an_answer_that_never_comes_to_its_end_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the whole does not."""
    monkeypatch.setattr(mysqllock, "_GRACE_S", 0.1)

    def answer(wire: Wire) -> None:
        for packet in columns("version"):
            wire.send(packet)
        wire.raw(b"\xff\xff\xff\x04")
        for _ in repeat(None):
            wire.raw(b"x")

    with FakeServer(answering("VERSION()", answer)) as server:
        monkeypatch.setattr(bounds, "ANSWER_LIMIT", 1 << 40)
        assert "no complete answer came within 0.2 s" in refused(server, Limits(lock_wait_s=0.1)).message


@pytest.mark.parametrize("sent", [b"\x05\0\0\0SSH-2", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x01\0\0\0\x0a"])
def test_what_is_not_a_database_is_said_to_be_none(sent: bytes) -> None:
    def script(wire: Wire) -> None:
        wire.raw(sent)
        wire.receive()

    with FakeServer(script) as server:
        result = lock(server)
    said = result.stderr.decode()
    assert result.returncode == 1 and "Traceback" not in said
    assert said.startswith(f"blockdiff: cannot log in to the database on 127.0.0.1:{server.port} as u: ")


def test_a_request_for_a_file_of_ours_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(SECRET)

    def answer(wire: Wire) -> None:
        wire.send(b"\xfb" + str(file).encode())
        wire.receive()

    with FakeServer(answering("VERSION()", answer)) as server:
        result = lock(server)
    said = result.stderr.decode()
    assert result.returncode == 1 and "Traceback" not in said
    assert f"the database on 127.0.0.1:{server.port} does not follow MySQL's protocol" in said
    assert SECRET.encode() not in b"".join(server.received)


# --- a network that others may read


@pytest.mark.parametrize("is_loopback", [True, False])
def test_a_login_over_a_network_is_open_and_one_to_this_machine_is_not(
    monkeypatch: pytest.MonkeyPatch, is_loopback: bool
) -> None:
    def script(wire: Wire) -> None:
        wire.greet()
        wire.send(OK)
        wire.serve(usual)

    monkeypatch.setattr(sqlsession, "_is_loopback", lambda sock: is_loopback)
    with FakeServer(script) as server, login(server) as database:
        assert ("without encryption" in database.note) != is_loopback


@pytest.mark.parametrize(("address", "is_loopback"), [("127.0.0.1", True), ("::1", True), ("192.0.2.1", False)])
def test_this_machine_is_known_by_its_address(address: str, is_loopback: bool) -> None:
    class Connected(socket.socket):
        def getpeername(self) -> "tuple[str, int]":
            return address, 3306

    with Connected() as sock:
        assert sqlsession._is_loopback(sock) == is_loopback
