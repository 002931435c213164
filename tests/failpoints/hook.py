"""The import hook: a module of the product that holds markers is compiled with them as calls.

Only such modules are touched; they are compiled from their source each time and the bytecode cache
is neither read nor written, so a run with failpoints leaves nothing behind for a run without. Kept
light: in a stack with failpoints every Python process begins with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import decode_source
from pathlib import Path
from types import CodeType, ModuleType

PACKAGES = frozenset({"lakebus", "storage", "actors", "serve_app", "cluster", "migrations"})
MARK = b"# failpoint:"


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        from tests.failpoints.rewriting import compile_with_calls  # only where a marker is

        path = self.get_filename(fullname)
        return compile_with_calls(decode_source(self.get_data(path)), path)

    def exec_module(self, module: ModuleType) -> None:
        from tests.failpoints import points, rewriting  # only where a marker is

        module.__dict__[rewriting.ASYNC_CALL] = points.reach
        module.__dict__[rewriting.SYNC_CALL] = points.reach_sync
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or type(spec.loader) is not SourceFileLoader:
            return spec
        if holds_markers(spec.origin):
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def holds_markers(path: str) -> bool:
    return MARK in Path(path).read_bytes()


def install() -> None:
    """From here on, imports find failpoints. Repeating it changes nothing.

    Raises RuntimeError when a module with markers is already there, because it has none of them.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    early = [
        name
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in PACKAGES
        and (path := getattr(module, "__file__", None)) is not None
        and path.endswith(".py")
        and holds_markers(path)
    ]
    if early:
        raise RuntimeError(
            f"the failpoints come too late: {', '.join(early)} were imported before;"
            " install the hook first of all"
        )
    sys.meta_path.insert(0, _Finder())
