"""Where a database keeps its files: what MariaDB says of itself, what lies in its directory, and MySQL's words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdiff import mysqllock
from blockdiff.database import datafiles
from blockdiff.database.accounts import Account
from blockdiff.database.coordinates import Row
from blockdiff.database.datafiles import Files
from blockdiff.host import datadir
from blockdiff.shared.errors import SourceError
from tests import mounts
from tests.conftest import require
from tests.mariadb import MariaDB


@dataclass
class Scattered:
    """A database with files in many places, all of them below `top`."""

    server: MariaDB
    top: Path

    def files(self, user: str = "") -> Files:
        account = Account(user or self.server.user, "", socket=str(self.server.socket))
        with mysqllock.connect(account) as database:
            return database.check().files

    def outside(self) -> "dict[str, str]":
        """Return what the look at its directory finds, relative to the top, without what is mounted."""
        found = datadir.look(str(self.server.data)).places
        top = f"{self.top}/"
        return {path.removeprefix(top): target.removeprefix(top) for path, target in found}


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scattered]:
    require(MariaDB.available(), "the programs mariadbd and mariadb-install-db")
    top = tmp_path_factory.mktemp("scattered").resolve()
    for name in ("logs", "far", "more", "scratch", "aria"):
        (top / name).mkdir()
    options = (
        *(f"--log-bin={top}/logs/binlog", "--server-id=1", f"--tmpdir={top}/scratch"),
        *("--innodb-data-home-dir=", f"--innodb-data-file-path=ibdata1:12M;{top}/more/ibdata2:12M:autoextend"),
    )
    with MariaDB(top, *options) as server:
        server.run("CREATE DATABASE shop", "CREATE DATABASE linked")
        for engine in ("InnoDB", "MyISAM", "Aria"):
            where = f"DATA DIRECTORY='{top}/far'" + (f" INDEX DIRECTORY='{top}/far'" if engine == "MyISAM" else "")
            server.run(f"CREATE TABLE shop.far_{engine.lower()} (n INT) ENGINE={engine} {where}")
        server.run(
            "CREATE TABLE shop.near (n INT) ENGINE=InnoDB",
            "CREATE USER blind@localhost",
            "GRANT PROCESS, RELOAD, BINLOG MONITOR, SLAVE MONITOR ON *.* TO blind@localhost",
        )
        server.stop()
        (server.data / "linked").rename(top / "elsewhere")
        (server.data / "linked").symlink_to(top / "elsewhere")
        (server.data / "server.pem").symlink_to("/etc/hostname")
        server.start()
        server.run("CREATE TABLE linked.of_linked (n INT) ENGINE=InnoDB")
        yield Scattered(server, top)


def test_a_real_server_says_where_its_files_are(scattered: Scattered) -> None:
    """To a login that may see none of its tables, too."""
    scattered.server.run("SELECT * FROM shop.far_innodb", "SELECT * FROM shop.near")
    data, top = str(scattered.server.data), str(scattered.top)
    for user in ("", "blind"):
        found = scattered.files(user)
        assert found.needed[0] == data
        assert set(found.needed) == {data, f"{top}/more", f"{top}/far/shop"}
        assert found.others == ((f"{top}/logs", "the binary logs"),)
        assert f"{top}/scratch" in found.temporary


def test_what_leads_out_of_the_directory_is_found_on_the_host(scattered: Scattered) -> None:
    """Of tables that nobody has opened since the start as well."""
    scattered.server.stop()
    scattered.server.start()
    assert scattered.outside() == {
        "data/linked": "elsewhere",
        "data/shop/far_innodb.isl": "far/shop/far_innodb.ibd",
        "data/shop/far_myisam.MYD": "far/far_myisam.MYD",
        "data/shop/far_myisam.MYI": "far/far_myisam.MYI",
        "data/shop/far_aria.MAD": "far/far_aria.MAD",
    }


def test_tables_that_do_not_undo_are_noticed_and_those_of_the_server_are_not(tmp_path: Path) -> None:
    for name in ("mysql/user.MAI", "sys/sys_config.MAI", "shop/t.ibd", "shop/t.MAD"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert not datadir.look(str(tmp_path)).unlogged
    for name in ("t.MYI", "t.MAI", "t.CSV", "t.ARZ"):
        (tmp_path / "shop" / name).touch()
        assert datadir.look(str(tmp_path)).unlogged, name
        (tmp_path / "shop" / name).unlink()


def test_what_is_mounted_below_the_directory_is_found(tmp_path: Path) -> None:
    with mounts.tmpfs(tmp_path / "sh op") as path:
        assert datadir.look(str(tmp_path)).places == [(str(path), str(path))]
        (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(tmp_path)
        assert datadir.look(f"{tmp_path}-link").places == [(str(path), str(path))]


def test_files_of_the_server_itself_may_be_links_where_they_are_not_data(tmp_path: Path) -> None:
    for name in ("ca.pem", "mysql.sock", "db00.err", "ib_logfile0", "#ib_16384_0.dblwr", "ibdata1", "undo001", "t.ibd"):
        (tmp_path / name).symlink_to("/etc/hostname")
    found = [Path(path).name for path, _target in datadir.look(str(tmp_path)).places]
    assert sorted(found) == ["#ib_16384_0.dblwr", "ib_logfile0", "ibdata1", "t.ibd", "undo001"]


def test_a_directory_that_cannot_be_looked_into_is_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop").mkdir()

    def scan(path: str) -> "Iterator[object]":
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("blockdiff.host.datadir.os.scandir", scan)
    with pytest.raises(SourceError, match=f"cannot look into the database's directory {tmp_path}: Permission denied"):
        datadir.look(str(tmp_path))


def test_what_is_not_on_a_source_of_the_run_the_server_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "secret").symlink_to("/etc/shadow")
    assert datadir.outside(str(tmp_path), [], lambda *place: place) == {}


# --- MySQL, which is on no test machine, and settings that a server does not start with here


def answers(variables: "dict[str, str]", tables: "dict[str, list[str]]") -> Files:
    """Return what is made of these variables, and of these directories in the columns of INFORMATION_SCHEMA."""

    def rows(statement: str) -> "list[Row]":
        if "VARIABLES" in statement:
            return [{"Variable_name": name, "Value": value} for name, value in variables.items()]
        if "information_schema.COLUMNS" in statement:
            return [{"name": name} for name in tables]
        (name,) = (name for name in tables if f"information_schema.{name.partition('.')[0]} WHERE" in statement)
        return [{"directory": directory} for directory in tables[name]]

    return datafiles.read(rows)


def test_directories_outside_the_data_directory_are_found() -> None:
    found = answers(
        {
            "datadir": "/data/mysql/",
            "innodb_data_home_dir": "",
            "innodb_data_file_path": "ibdata1:12M;/raid/ibdata2:12M:autoextend",
            "innodb_log_group_home_dir": "../redo/",
            "innodb_undo_directory": "./",
            "innodb_doublewrite_dir": "/double",
            "aria_log_dir_path": "/aria",
            "log_bin_basename": "/logs/binlog",
            "relay_log_basename": "/data/mysql/relay-bin",
            "file_key_management_filename": "/etc/keys.enc",
            "tmpdir": "/tmp:/var/tmp",
            "slave_load_tmpdir": "/tmp",
        },
        {},
    )
    assert found.needed == ("/data/mysql", "/data/redo", "/double", "/aria", "/raid")
    assert found.others == (
        ("/logs", "the binary logs"),
        ("/data/mysql", "the relay logs"),
        ("/etc/keys.enc", "the keys of encrypted tables"),
    )
    assert found.temporary == ("/tmp", "/var/tmp")


def test_the_files_of_the_system_tablespace_are_in_its_home() -> None:
    path = "ibdata1:12M;sub/ibdata2:12M:autoextend"
    found = answers({"datadir": "/data", "innodb_data_home_dir": "/home", "innodb_data_file_path": path}, {})
    assert found.needed == ("/data", "/home", "/home/sub")


def test_the_tables_of_every_version_are_asked() -> None:
    tables = {
        "INNODB_SYS_DATAFILES.PATH": ["/a/"],
        "INNODB_DATAFILES.PATH": ["/b/", "../c/"],
        "FILES.FILE_NAME": ["", "/b/"],
    }
    assert answers({"datadir": "/data/mysql"}, tables).needed == ("/data/mysql", "/a", "/b", "/data/c")
