"""What `--json` prints: one vocabulary for all commands, as docs/json.md has it."""

import json
import re
from pathlib import Path

import pytest

from tests import chains, commands
from tests.chains import SmallChain

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "json.md"


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


def documented(command: str) -> set[str]:
    """Return the words in code spans of a command's row."""
    (row,) = re.findall(rf"^\| `{command}` \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return set(re.findall(r"`(\w+)`", row))


def test_status_speaks_as_list_does(chain: SmallChain) -> None:
    (found,) = json.loads(commands.done("blockdiff", "status", "--json", chain.name))
    listed = json.loads(commands.done("blockdiff", "list", "--json", chain.name))
    assert (found["name"], found["state"], found["generation"]) == (chain.name, "ok", 3)
    assert (found["when"], found["image_size"]) == (listed[2]["when"], listed[2]["image_size"])
    assert found["stored"] == sum(entry["stored"] for entry in listed) and isinstance(found["age_s"], int)
    result = commands.run("blockdiff", "status", "--json", f"{chain.name}2", chain.name)
    assert result.returncode == 2 and [each["state"] for each in json.loads(result.stdout)] == ["critical", "ok"]


def test_repair_says_what_was_done_and_what_is_lost(chain: SmallChain) -> None:
    chain.file(".3.gz").write_bytes(b"damaged")
    words = ("blockdiff", "repair", "--json", chain.name)
    planned = json.loads(commands.run(*words, "--dry-run").stdout)
    result = commands.run(*words)
    found = json.loads(result.stdout)
    assert (result.returncode, found["name"], found["dry_run"], planned["dry_run"]) == (5, chain.name, False, True)
    assert found["deeds"] == planned["deeds"] and any("disk.3.gz set aside" in deed for deed in found["deeds"])
    assert [lost["generation"] for lost in found["lost"]] == [3] and "disk.3.gz" in found["lost"][0]["problem"]
    assert json.loads(commands.done(*words))["deeds"] == []


def test_what_is_printed_is_documented(chain: SmallChain, tmp_path: Path) -> None:
    shown = {
        "list": json.loads(commands.done("blockdiff", "list", "--json", chain.name))[0],
        "list DIRECTORY": json.loads(commands.done("blockdiff", "list", "--json", chain.directory))[0],
        "status": json.loads(commands.done("blockdiff", "status", "--json", chain.name))[0],
        "verify": json.loads(commands.done("blockdiff", "verify", "--json", chain.name))[0],
        "verify --source": json.loads(
            commands.done("blockdiff", "verify", "--json", chain.name, "--source", chain.source)
        ),
        "restore": json.loads(commands.done("blockdiff", "restore", "--json", chain.name, tmp_path / "out")),
        "repair": json.loads(commands.done("blockdiff", "repair", "--json", chain.name)),
        "backup --dry-run": json.loads(
            commands.done("blockdiff", "backup", "--dry-run", "--json", chain.name, chain.source)
        ),
    }
    for name, fields in shown.items():
        assert set(fields) <= documented(name), name
