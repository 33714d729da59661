"""The public key that `blockdiff authorize` restricts: exactly one, read as sshd reads a line of ``authorized_keys``.

Anything else is refused, and its content is never shown: it may be a secret.
"""

import base64
import binascii
import os
import re
import shlex
import sys

from blockdiff.shared.errors import UsageError, printable

#: Largest file that is accepted, in bytes; the longest public key has about 3000.
_MAX_BYTES = 1 << 16

#: The types of keys that sshd accepts, each with the number of fields in the key's bytes; the first field is the type.
_FIELDS = {
    "ssh-ed25519": 2,
    "ssh-rsa": 3,
    "ecdsa-sha2-nistp256": 3,
    "ecdsa-sha2-nistp384": 3,
    "ecdsa-sha2-nistp521": 3,
    "sk-ssh-ed25519@openssh.com": 3,
    "sk-ecdsa-sha2-nistp256@openssh.com": 4,
}
_CERTIFICATE = re.compile(r"[\w@.-]+-cert-v[0-9]+@openssh\.com[ \t]")
_PRIVATE = re.compile(rb"^[ \t]*(-{4,5} ?BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File-)", re.MULTILINE)

#: How other formats of a public key begin, what they are called, and the command that converts them.
_OTHER_FORMS = (
    ("---- BEGIN SSH2 PUBLIC KEY", "in the form of RFC 4716", "ssh-keygen -i -f"),
    ("-----BEGIN PUBLIC KEY", "in the form of PKCS #8", "ssh-keygen -i -m PKCS8 -f"),
    ("-----BEGIN RSA PUBLIC KEY", "in the form of PEM", "ssh-keygen -i -m PEM -f"),
)


def read(path: str) -> str:
    """Return the one public key in the file `path` (``-``: standard input) as ``TYPE BASE64 COMMENT``.

    Blank lines and comments around it are left out, and so is a carriage return at the end of a line.
    Raises `UsageError` if the file cannot be read or holds anything else; the hint says what to name instead.
    """
    return parse(_content(path), path)


def parse(content: bytes, path: str) -> str:
    """Return the one public key in the `content` of the file `path`; raises `UsageError` as `read` does."""
    shown = _shown(path)
    if _PRIVATE.search(content):
        raise UsageError(f"{shown} is a private key: it must stay on this machine", _hint(path, private=True))
    if len(content) > _MAX_BYTES:
        raise UsageError(f"{shown} is not a public key: it is too long", _hint(path))
    try:
        lines = enumerate(content.decode("utf-8").split("\n"), 1)
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown} is not a public key: it is not text", _hint(path)) from error
    keys = [(n, line.strip(" \t\r")) for n, line in lines if line.strip(" \t\r") and line.lstrip(" \t")[0] != "#"]
    if not keys:
        raise UsageError(f"{shown} holds no public key", _hint(path))
    for start, form, command in _OTHER_FORMS:
        if keys[0][1].startswith(start):
            made = f"{command} {shlex.quote(path)} > {shlex.quote(path + '.pub')}"
            raise UsageError(
                f"{shown} is a public key {form}, which authorized_keys does not accept", f"convert it: {made}"
            )
    for number, line in keys:
        if (why := _fault(line)) is not None:
            raise UsageError(f"line {number} of {shown} {why}", _hint(path))
    if len(keys) > 1:
        raise UsageError(
            f"{shown} holds {len(keys)} public keys, and a line of authorized_keys restricts one",
            "put the one that you mean into its own file",
        )
    return keys[0][1]


def _shown(path: str) -> str:
    return "standard input" if path == "-" else printable(path)


def _content(path: str) -> bytes:
    """Return the content of the file; if that is too long, its first `_MAX_BYTES` + 1 bytes."""
    try:
        with open(sys.stdin.fileno() if path == "-" else path, "rb", closefd=path != "-") as file:
            return file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot read the public key {_shown(path)}: {reason}") from error


def _hint(path: str, private: bool = False) -> str:
    """Return which file to name, or how to make it."""
    public = path + ".pub"
    if path != "-" and os.path.isfile(public):
        return f"name the public one: --key {shlex.quote(printable(public))}"
    if private and path != "-":
        return f"make the public one, and name that: ssh-keygen -y -f {shlex.quote(path)} > {shlex.quote(public)}"
    return "name a file with one public key, as ssh-keygen makes it with the suffix .pub"


def _fault(line: str) -> str | None:
    """Return why `line` is not accepted; None if it is one public key."""
    if not all(c.isprintable() or c == "\t" for c in line):
        return "is not a public key: it holds control characters"
    if _is_key(line):
        return None
    if _CERTIFICATE.match(line):
        return "is a certificate, for which a line of authorized_keys does nothing"
    if line.startswith("ssh-dss "):
        return "is a DSA key, which sshd no longer accepts"
    if _is_key(_after_options(line)):
        return "has options in front of the key: omit them, the line that is printed has its own"
    return "is not a public key"


def _is_key(text: str) -> bool:
    """Return whether `text` begins with a type and the bytes of a key of that type."""
    words = text.split(None, 2)
    if len(words) < 2 or words[0] not in _FIELDS:
        return False
    try:
        blob = base64.b64decode(words[1].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        return False
    fields = []
    while blob:
        size = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + size:
            return False
        fields.append(blob[4 : 4 + size])
        blob = blob[4 + size :]
    return len(fields) == _FIELDS[words[0]] and all(fields) and fields[0] == words[0].encode("ascii")


def _after_options(line: str) -> str:
    """Return what follows the options at the beginning of a line: they end with the first blank outside of quotes."""
    quoted = False
    for token in re.finditer(r'\\"|.', line):
        if token[0] == '"':
            quoted = not quoted
        elif token[0] in " \t" and not quoted:
            return line[token.end() :].lstrip(" \t")
    return ""
