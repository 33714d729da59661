"""What can be wrong with a line and still be Python: the mutants of a module."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}
_CALLED = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """A module in which one place is changed: `function` is where, `old` and `new` what, `source` the whole of it.

    `count` tells apart the same change at several places of a function, from 1.
    """

    function: str
    line: int
    old: str
    new: str
    count: int
    source: str

    @property
    def key(self) -> str:
        """What names it as long as its function stays as it is."""
        again = f" ({self.count})" if self.count > 1 else ""
        return f"{self.function}: `{self.old}` -> `{self.new}`{again}"


def mutants(source: str) -> Iterator[Mutant]:
    """Yield all mutants of a module, in the order of its lines."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    content = source.encode()
    seen: dict[tuple[str, str, str], int] = {}
    for function, node, new in _changes(ast.parse(source)):
        assert node.end_lineno is not None and node.end_col_offset is not None
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        old = " ".join(content[begin:end].decode().split())
        changed = content[:begin] + new.encode() + content[end:]
        key = (function, old, new)
        seen[key] = seen.get(key, 0) + 1
        yield Mutant(function, node.lineno, old, new, seen[key], changed.decode())


Change = tuple[str, "ast.expr | ast.stmt", str]


def _changes(tree: ast.Module) -> Iterator[Change]:
    """Yield the function, the node and its replacement for each change."""
    yield from sorted(_below(tree, "module"), key=lambda change: (change[1].lineno, change[1].col_offset))


def _below(node: ast.AST, function: str) -> Iterator[Change]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inner = child.name if function == "module" else f"{function}.{child.name}"
            yield from _below_definition(child, inner)
            continue
        if isinstance(child, ast.AnnAssign):
            yield from _below(ast.Tuple([] if child.value is None else [child.value]), function)
            continue
        if isinstance(child, ast.expr):
            yield from ((function, child, f"({ast.unparse(new)})") for new in _expressions(child))
        if isinstance(child, ast.stmt):
            yield from ((function, child, new) for new in _statements(child))
        if not _is_of_no_interest(child):
            yield from _below(child, function)


def _below_definition(node: "ast.FunctionDef | ast.ClassDef", function: str) -> Iterator[Change]:
    """Leave out types and decorators: defaults and bodies are what runs."""
    if isinstance(node, ast.FunctionDef):
        for default in [*node.args.defaults, *(each for each in node.args.kw_defaults if each is not None)]:
            yield from ((function, default, f"({ast.unparse(new)})") for new in _expressions(default))
    yield from _below(ast.Module(node.body, []), function)


def _is_of_no_interest(node: ast.AST) -> bool:
    """Words that people read, and types, are for other tests."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    return isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)


def _expressions(node: ast.expr) -> Iterator[ast.expr]:
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare):
        for i, operator in enumerate(new.ops):
            new.ops[i] = _COMPARED[type(operator)]()
            yield copy.deepcopy(new)
            new.ops[i] = operator
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not):
        yield new.operand
    elif isinstance(new, ast.BinOp) and type(new.op) in _COMPUTED and not _is_text(new):
        new.op = _COMPUTED[type(new.op)]()
        yield new
    elif isinstance(new, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
        yield new
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        yield ast.Constant(not new.value)
    elif isinstance(new, ast.Constant) and isinstance(new.value, int):
        yield ast.Constant(new.value + 1)
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Name) and new.func.id in _CALLED:
        new.func.id = _CALLED[new.func.id]
        yield new


def _is_text(node: ast.BinOp) -> bool:
    """Tell whether it puts strings together or formats one: that raises as soon as it is another operation."""
    return any(
        isinstance(each, ast.JoinedStr) or (isinstance(each, ast.Constant) and isinstance(each.value, str | bytes))
        for each in (node.left, node.right)
    )


def _statements(node: ast.stmt) -> Iterator[str]:
    """Yield what may stand in a statement's place."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_call or isinstance(node, ast.Raise):
        yield "pass"
    elif isinstance(node, ast.AugAssign) and type(node.op) in _COMPUTED:
        yield ast.unparse(ast.AugAssign(node.target, _COMPUTED[type(node.op)](), node.value))
        yield "pass"
    elif isinstance(node, ast.Break):
        yield "continue"
    elif isinstance(node, ast.Continue):
        yield "break"
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield "return None"
