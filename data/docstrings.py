"""The corpus that every installation brings along: the docstrings of its scientific packages.

Mathematics, references and worked examples, written and reviewed by people, with no network. The sources are parsed,
not imported: importing torch alone takes seconds, and would still miss what only its stubs spell out.
"""

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from data.sources import Source

PACKAGES = ("numpy", "torch", "sympy", "mpmath", "networkx")
COMPILER = {"_inductor", "_dynamo", "_functorch", "_export", "_higher_order_ops"}  # torch's: engineering, not science
SKIPPED_FOLDERS = {"tests", "test", "testing", "_testing", "benchmarks", "_vendor"} | COMPILER
DOC_SETTERS = {"add_docstr", "add_docstr_all", "add_newdoc"}  # give a docstring to what is written in C
SHORTEST = 80  # characters; below that a docstring is a label
OPENING = 200  # characters, not counting blanks, that two docstrings share only if one is a variant of the other


def from_docstrings(packages: Iterable[str] = PACKAGES) -> Source:
    """The docstrings of those of `packages` that are installed, always in the same order."""
    roots = {}
    for package in packages:
        spec = find_spec(package)
        if spec and spec.submodule_search_locations:
            roots[package] = Path(spec.submodule_search_locations[0])
    if not roots:
        raise ValueError(f"there are no docstrings to read: none of {', '.join(packages)} is installed")
    texts = (text for root in roots.values() for path in source_files(root) for text in docstrings(path.read_bytes()))
    return Source(
        documents=distinct(texts),
        description=f"docstrings of {', '.join(f'{package} {version(package)}' for package in roots)}",
        licence="BSD-3-Clause, as the packages themselves; who passes the text on passes on their notices",
        total_bytes=13_000_000 if packages == PACKAGES else None,
    )


def source_files(root: Path) -> list[Path]:
    """A package's .py and .pyi files. In the stubs, torch's docstrings have their templates filled in."""
    return [
        path
        for path in sorted(root.rglob("*.py*"))
        if path.suffix in (".py", ".pyi") and SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1])
    ]


def docstrings(source: bytes) -> Iterator[str]:
    """The docstrings in a Python file: of the module, classes and functions, and those given to functions in C."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a file for another version of Python
        return
    for node in (tree, *_statements(tree)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Expr | ast.Assign) and _sets_docstring(node.value):
            yield from (inspect.cleandoc(text) for argument in node.value.args[1:] for text in _strings(argument))


def distinct(texts: Iterable[str]) -> Iterator[str]:
    """Leave out the short ones, and those that open as an earlier one does: the same function in another class."""
    seen = set()
    for text in texts:
        opening = "".join(text.split())[:OPENING]
        if len(text) >= SHORTEST and opening not in seen:
            seen.add(opening)
            yield text


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements below `node`. ast.walk would enter every expression too, and take several times as long."""
    for field in ("body", "orelse", "handlers", "finalbody"):
        for statement in getattr(node, field, ()):
            yield statement
            yield from _statements(statement)


def _sets_docstring(node: ast.expr) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name.lstrip("_") in DOC_SETTERS


def _strings(node: ast.expr) -> Iterator[str]:
    """The texts that an expression of literals stands for: strings, their sums, tuples of them, templates filled in."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            yield "".join((*_strings(left), *_strings(right)))
        case ast.Tuple(elts=elements):
            for element in elements:
                yield from _strings(element)
        case ast.Call(func=ast.Attribute(value=template, attr="format")):
            for text in _strings(template):
                with suppress(ValueError, LookupError):  # what fills it in is not a literal: left blank
                    yield text.format_map(defaultdict(str))
