"""Mutants out of the syntax tree of chosen files: comparisons, arithmetic, constants, conditions, calls, each a little off.

Which of a file's are drawn depends on the seed and the file alone. Docstrings, messages and annotations are left alone.
"""

import ast
import random
from collections.abc import Iterator, Sequence

from tests.mutants.mutant import Mutant
from tests.mutants.rooms import ROOT

_COMPARED = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
_COMPUTED = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.BitAnd: "|", ast.BitOr: "&", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip
_CALLED = {"min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "zeros": "ones", "sum": "max"}


def generated(files: Sequence[str], seed: int, count: int) -> list[Mutant]:
    """`count` mutants over some Python files: one of each, or of some by chance where that is too many, then another of each."""
    drawn = []
    for file in random.Random(seed).sample(sorted(files), len(files)):
        found = list(_of(file))
        random.Random(f"{seed} {file}").shuffle(found)
        drawn.append(found)
    rounds = (one[i] for i in range(max(map(len, drawn), default=0)) for one in drawn if i < len(one))
    return [mutant for mutant, _ in zip(rounds, range(count), strict=False)]


def _of(file: str) -> Iterator[Mutant]:
    text = (ROOT / file).read_text(encoding="utf-8")
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw = text.encode()

    def offset(line: int, column: int) -> int:
        return len(raw[: starts[line - 1] + column].decode())

    def source(node: ast.AST) -> str:
        return text[offset(node.lineno, node.col_offset) : offset(node.end_lineno, node.end_col_offset)]

    for node, after in _changes(ast.parse(text), source):
        before, at = source(node), offset(node.lineno, node.col_offset)
        if before != after:
            yield Mutant(
                f"line {node.lineno}: {_short(before)} → {_short(after)}", file, before, after, "generated", None, at
            )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "…"


def _changes(tree: ast.AST, source: callable) -> Iterator[tuple[ast.AST, str]]:
    """(node, what stands in its place)."""
    for node in _code(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield node, f"(({source(node.left)}) {_COMPARED[type(node.ops[0])]} ({source(node.comparators[0])}))"
        elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED and not isinstance(node.left, ast.Constant):
            yield node, f"(({source(node.left)}) {_COMPUTED[type(node.op)]} ({source(node.right)}))"
        elif isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.And) else " and "
            yield node, "(" + word.join(f"({source(value)})" for value in node.values) + ")"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, f"(({source(node.operand)}))"
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int):
            yield node, str(not node.value if isinstance(node.value, bool) else node.value + 1)
        elif isinstance(node, ast.AugAssign) and type(node.op) in _COMPUTED:
            yield node, f"{source(node.target)} = {source(node.value)}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in _CALLED and source(node).count(f"{name}(") >= 1:
                yield node, source(node).replace(f"{name}(", f"{_CALLED[name]}(", 1)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, "pass"
        elif isinstance(node, ast.IfExp):
            yield node, f"(({source(node.orelse)}) if ({source(node.test)}) else ({source(node.body)}))"


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that decide what is computed: no annotations, defaults of options, imports, messages."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or isinstance(
            node, ast.Raise | ast.JoinedStr | ast.ImportFrom
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield child
                yield from _code(child)
