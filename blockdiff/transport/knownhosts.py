"""known_hosts as ssh reads it: which keys a host may have, and whether the key that it shows is one of them."""

import base64
import binascii
import fnmatch
import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blockdiff.transport.advice import Cause, Place


@dataclass(frozen=True)
class Entry:
    """One key that a line of known_hosts names for a host; `marker` is empty, or ``@revoked``."""

    marker: str
    kind: str
    key: bytes


class KnownKeys:
    """The keys that some files have for a host. Lines that are not valid are skipped, as by ssh."""

    def __init__(self, paths: Iterable[str], where: Place) -> None:
        lines = [line for path in paths for line in _lines(path)]
        self._entries = _entries(lines, where.key_name)
        # ssh accepts a key that is known for the host without its port, too
        self._elsewhere = _entries(lines, where.host) if where.alias is None else []

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of keys that may be accepted: we ask the host to show one of these."""
        return [entry.kind for entry in [*self._entries, *self._elsewhere] if not entry.marker]

    def wrong(self, kind: str, key: bytes) -> Cause | None:
        """Return why this key of the host is not accepted; None if it is a known one."""
        if any(entry.marker and entry.key == key for entry in [*self._entries, *self._elsewhere]):
            return Cause.REVOKED_KEY
        same_kind = [entry.key for entry in self._entries if not entry.marker and entry.kind == kind]
        if not same_kind:
            elsewhere = [entry.key for entry in self._elsewhere if not entry.marker]
            return None if key in elsewhere else Cause.UNKNOWN_KEY
        return None if key in same_kind else Cause.CHANGED_KEY


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        return []  # most of the usual files do not exist


def _entries(lines: Iterable[str], name: str) -> list[Entry]:
    found = []
    for line in lines:
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) < 3 or words[0].startswith("#") or marker not in ("", "@revoked"):
            continue  # paramiko does not support certificates (@cert-authority)
        try:
            key = base64.b64decode(words[2], validate=True)
        except (binascii.Error, ValueError):
            continue
        if _matches(words[0], name.lower()):
            found.append(Entry(marker, words[1], key))
    return found


def _matches(patterns: str, name: str) -> bool:
    if patterns.startswith("|1|"):
        return _is_hash_of(patterns, name)
    said = [pattern for pattern in patterns.lower().split(",") if _fits(pattern.lstrip("!"), name)]
    return bool(said) and not any(pattern.startswith("!") for pattern in said)


def _fits(pattern: str, name: str) -> bool:
    """Return whether a pattern matches: only ``*`` and ``?`` are special, brackets are part of a name with a port."""
    return fnmatch.fnmatchcase(name, re.sub(r"\[", "[[]", pattern))


def _is_hash_of(hashed: str, name: str) -> bool:
    try:
        salt, digest = (base64.b64decode(part, validate=True) for part in hashed[3:].split("|"))
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(hmac.new(salt, name.encode("utf-8", "surrogateescape"), hashlib.sha1).digest(), digest)
