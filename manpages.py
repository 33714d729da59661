"""Writes a man page for each command, from what its --help says: ``python3 manpages.py DIRECTORY``.

setup.py puts them into the wheel. click-man was tried: it does not see commands that are imported when they are asked
for, takes the text of a help for markup, and breaks the examples.
"""

import inspect
import os
import re
import sys
from collections.abc import Iterator

import click

from blockdiff import __version__
from blockdiff.cli import locking, modern, original

_ESCAPED = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"}

_OTHERS = {
    "blockdiff_backup": original._backup,
    "blockdiff_dump": original._dump,
    "blockdiff_merge": original._merge,
    "cronlog": original._cronlog,
    "mysqllock": locking._mysqllock,
    "ssh_blockdiff_dump": original._ssh_dump,
    "ssh_lvm_dump": original._lvm_dump,
}


def commands() -> Iterator[click.Context]:
    """Yield the context of each command that has a page; its `command_path` is how it is called."""
    parent = click.Context(modern.cli, info_name="blockdiff", **modern.cli.context_settings)
    yield parent
    for name in modern.cli.list_commands(parent):
        command = modern.cli.get_command(parent, name)
        assert command is not None
        yield click.Context(command, info_name=name, parent=parent, **command.context_settings)
    for name, command in _OTHERS.items():
        yield click.Context(command, info_name=name, **command.context_settings)


def page(context: click.Context) -> str:
    """Return the source of a page, without a date: the same version always gives the same page."""
    command = context.command
    name = context.command_path.replace(" ", "-")
    paragraphs = _paragraphs(command.help or "")
    lines = [f'.TH "{name.upper()}" 1 "" "blockdiff {__version__}" "blockdiff"']
    lines += [".SH NAME", f"{_text(name)} \\- {_text(paragraphs[0].rstrip('.').rstrip(':'))}"]
    usage = " ".join(command.collect_usage_pieces(context))
    lines += [".SH SYNOPSIS", f"\\fB{_text(context.command_path)}\\fR {_text(usage)}", ".SH DESCRIPTION"]
    for paragraph in paragraphs:
        if paragraph.startswith("\b\n"):  # click's sign for text that keeps its lines
            lines += [".PP", ".nf", *(_text(line) for line in paragraph.splitlines()[1:]), ".fi"]
        else:
            lines += [".PP", _text(" ".join(paragraph.split()))]
    lines.append(".SH OPTIONS")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record is not None:
            lines += [".TP", f"\\fB{_text(record[0])}\\fR", _text(record[1])]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None
            lines += [".TP", f"\\fB{_text(f'{name}-{each}')}\\fR(1)", _text(_paragraphs(found.help or "")[0])]
    elif context.parent is not None:
        lines += [".SH SEE ALSO", f"\\fB{_text(context.parent.command_path)}\\fR(1)"]
    return "\n".join(lines) + "\n"


def write(directory: str) -> list[str]:
    """Write all pages into `directory`, and return their paths."""
    paths = []
    for context in commands():
        path = os.path.join(directory, context.command_path.replace(" ", "-") + ".1")
        with open(path, "w", encoding="ascii") as file:
            file.write(page(context))
        paths.append(path)
    return paths


def _paragraphs(text: str) -> list[str]:
    return [each for each in re.split(r"\n\s*\n", inspect.cleandoc(text)) if each]


def _text(text: str) -> str:
    """Return `text` so that roff takes it as it is."""
    escaped = "".join(_ESCAPED.get(each, each if each.isascii() else f"\\[u{ord(each):04X}]") for each in text)
    return "\\&" + escaped if escaped.startswith(".") else escaped


if __name__ == "__main__":
    write(sys.argv[1])
