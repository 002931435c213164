"""Finding markers in Python source, and compiling source with its markers turned into calls.

A marker is a comment on a line of its own inside a function. Its line is replaced by a call, so the
line numbers of everything else stay, and tracebacks show the source as it is written.
"""

from __future__ import annotations

import ast
import gc
import io
import re
import tokenize
from types import CodeType

#: What the compiled module calls; `hook` puts both into its globals.
ASYNC_CALL, SYNC_CALL = "__failpoint_async__", "__failpoint_sync__"
_PLACE = "__failpoint_here__"
_MARKER = re.compile(r"#\s*failpoint\b\s*:?\s*(.*?)\s*$", re.IGNORECASE)
NAME = re.compile(r"[a-z][a-z0-9_]*\.(before|after)_[a-z0-9_]+")


class BadMarker(SyntaxError):
    """A marker that cannot become a call, with where it is and what to write instead."""


def check_name(name: str, *, where: str) -> str:
    if NAME.fullmatch(name) is None:
        raise BadMarker(
            f"{where}: a failpoint is named <role or function>.<before|after>_<step>, not {name!r}"
        )
    return name


def markers_in(source: str, *, filename: str) -> dict[int, str]:
    """The name of the marker on each line that is one."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = _MARKER.match(token.string) if token.type == tokenize.COMMENT else None
        if match is None:
            continue
        line = token.start[0]
        where = f"{filename}:{line}"
        name = check_name(match[1], where=where)
        if token.line[: token.start[1]].strip():
            raise BadMarker(f"{where}: the marker {name} must stand on a line of its own")
        if token.string != f"# failpoint: {name}":
            raise BadMarker(f"{where}: write the marker as `# failpoint: {name}`")
        found[line] = name
    return found


def compile_with_calls(source: str, filename: str) -> CodeType:
    """The module's code with each marker turned into a call."""
    lines = source.splitlines(keepends=True)
    markers = markers_in(source, filename=filename)
    for line, name in markers.items():
        text = lines[line - 1]
        indentation = text[: len(text) - len(text.lstrip())]
        lines[line - 1] = f"{indentation}{_PLACE}({name!r})\n"
    collecting = gc.isenabled()
    gc.disable()  # a finalizer that builds another tree breaks CPython 3.11 (python/cpython#106905)
    try:
        tree = ast.parse("".join(lines), filename)
    except SyntaxError as error:
        raise BadMarker(
            f"{filename}:{error.lineno}: a marker stands here where no statement may stand"
        ) from error
    finally:
        if collecting:
            gc.enable()
    calls = _Calls(filename)
    calls.visit(tree)
    if calls.made != len(markers):
        raise BadMarker(f"{filename}: a marker is not where a statement may stand")
    return compile(tree, filename, "exec", dont_inherit=True)


class _Calls(ast.NodeTransformer):
    """Turns the placed names into the right kind of call for the function around them."""

    def __init__(self, filename: str) -> None:
        self._filename = filename
        self._inside: list[bool] = []
        self.made = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node, is_async=False)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node, is_async=True)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        outside, self._inside = self._inside, []
        self.generic_visit(node)
        self._inside = outside
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            return node
        if call.func.id != _PLACE:
            return node
        if not self._inside:
            raise BadMarker(f"{self._filename}:{node.lineno}: a marker must be inside a function")
        self.made += 1
        call.func.id = ASYNC_CALL if self._inside[-1] else SYNC_CALL
        if self._inside[-1]:
            node.value = ast.copy_location(ast.Await(call), call)
        return node

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, *, is_async: bool) -> ast.AST:
        self._inside.append(is_async)
        self.generic_visit(node)
        self._inside.pop()
        return node
