"""Values by name, whatever they are: built-in ones, and a user's, which may replace them for a while."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

BUILT_IN = "built in"


class RegistryError(ValueError):
    """What can be wrong with a name: the base of the registry's own errors, and a ValueError like all of ours."""


class UnknownModelError(RegistryError, LookupError):
    """Nothing has this name, or more than one thing."""


class ConflictError(RegistryError):
    """The name is taken."""


@dataclass(frozen=True)
class Entry:
    name: str
    value: Any
    source: str  # BUILT_IN, file:line, or the plugin


class Entries:
    """Names match whatever their case and keep their spelling. Where two differ in case only, each needs its own."""

    def __init__(self, kind: str, given: Callable[[], Mapping[str, Entry]]):
        self.kind = kind  # for messages
        self._given = given  # the entries that are there without the user
        self._own: dict[str, Entry] = {}  # the user's, by the name of the entry that each replaces, or its own

    def _places(self) -> dict[str, str]:
        """{name: place} of every entry: an own one stands in the place of the one that it replaces."""
        return {entry.name: place for place, entry in {**self._given(), **self._own}.items()}

    def all(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in {**self._given(), **self._own}.values()}

    def find(self, name: str) -> Entry | None:
        """The entry that `name` means, or None. Raises UnknownModelError where it may mean two."""
        entries = self.all()
        matched = matching(name, entries)
        if len(matched) > 1:
            raise UnknownModelError(f"{name!r} may be {' or '.join(map(repr, matched))}: spell out the one you mean")
        return entries[matched[0]] if matched else None

    def add(self, name: str, value: Any, source: str, override: bool) -> None:
        """Raises ConflictError, which says where the first came from, for a name that is taken."""
        there = self.find(name)
        if there and not override:
            raise ConflictError(
                f"{source}: the {self.kind} {there.name!r} exists ({there.source}); override=True replaces it"
            )
        self._own[self._places()[there.name] if there else name] = Entry(name, value, source)

    def remove(self, name: str) -> None:
        """Take out one of the user's; what it replaced is back. Raises UnknownModelError if there is none."""
        there = self.find(name)
        if there is None:
            raise UnknownModelError(f"no {self.kind} is called {name!r}{self.nearest(name)}")
        if there not in self._own.values():
            raise RegistryError(
                f"the {self.kind} {there.name!r} cannot be taken out: it is not registered, {there.source}"
            )
        del self._own[self._places()[there.name]]

    def nearest(self, name: str) -> str:
        """For messages: what may have been meant, and what there is."""
        close = self.close_to(name)
        hint = f", did you mean {' or '.join(close)}?" if close else "."
        return f"{hint} There are {', '.join(sorted(self.all(), key=str.casefold))}"

    def close_to(self, name: str) -> list[str]:
        names = sorted(self.all(), key=str.casefold)
        near = get_close_matches(name.casefold(), {other.casefold() for other in names}, n=3)
        return [other for folded in near for other in names if other.casefold() == folded]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Afterwards the user's entries are those of before."""
        before = dict(self._own)
        try:
            yield
        finally:
            self._own = before


def matching(name: str, names: Collection[str]) -> list[str]:
    """Those of `names` that `name` may mean: itself, or else those that differ from it in case only."""
    if name in names:
        return [name]
    return [other for other in names if other.casefold() == name.casefold()]


def caller() -> str:
    """file:line of the code that called the function that asks."""
    frame = sys._getframe(2)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
