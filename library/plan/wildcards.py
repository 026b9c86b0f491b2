"""Wildcards as prompts use them: their entries parsed, each once, and checked for loops and for growth without end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import InputError
from library.plan.dynamic_prompts import (
    WILDCARD,
    DynamicPrompt,
    PlaceOf,
    Text,
    VariantGroup,
    Wildcard,
    alternatives,
    depth,
    parse_choices,
    parse_dynamic_prompt,
    reach,
    split_weight,
)
from library.plan.prompt_lines import one_line

if TYPE_CHECKING:
    from library.files.wildcards import Entry, Source, WildcardFolder

logger = logging.getLogger(__name__)

MAX_REACH = 30_000  # characters and choices of a prompt; three chunks of 75 tokens have a thousand
MAX_NESTING = 50  # wildcards within wildcards
MAX_ENTRIES = 5_000_000  # of all wildcards together, those of globs counted again


class Wildcards:
    """The wildcards of a run.

    Args:
        folder: where they are; None where `__name__` is text.
    """

    def __init__(self, folder: WildcardFolder | None = None) -> None:
        self._folder = folder
        self._known: dict[str, Wildcard] = {}
        self._parsed: dict[Source, tuple[list[Text], list[float | None]] | InputError] = {}
        self._open: dict[Source, str] = {}  # those that are being read, each for the one before it, by their names
        self._groups: dict[str, VariantGroup] = {}
        self._held = 0  # entries
        self._warned = False

    @property
    def files(self) -> list[Path]:
        """The files that prompts have used so far."""
        return list(dict.fromkeys(source.file for source in self._parsed))

    def parse(self, line: str, where: str = "", place_of: PlaceOf | None = None) -> DynamicPrompt:
        """Find the variant groups and wildcards of a raw prompt line; see `parse_dynamic_prompt`.

        Raises:
            InputError: for a fault in the line, or in the files of its wildcards.
        """
        if self._folder is None:
            self._warn_of_text(line, where)
            return parse_dynamic_prompt(line, where, place_of=place_of, known=self._groups)
        dynamic = parse_dynamic_prompt(line, where, self._find, place_of, self._groups)
        if dynamic.is_dynamic and "__" in line:
            _check_reach(dynamic.pieces, line, where)
        return dynamic

    def _warn_of_text(self, line: str, where: str) -> None:
        if not self._warned and "__" in line and (match := WILDCARD.search(line)):
            self._warned = True
            place = f"{where}: " if where else ""
            logger.warning("%s%s is taken as text; --wildcard_dir DIR makes it a wildcard", place, match[0])

    def _find(self, name: str, where: str) -> Wildcard:
        """The wildcard of a name, or of a glob: all entries of those that it fits."""
        if name in self._known:
            return self._known[name]
        assert self._folder is not None
        texts: list[Text] = []
        weights: list[float | None] = []
        for source in self._folder.sources(name, where):
            more_texts, more_weights = self._entries(source, name, where)
            texts += more_texts
            weights += more_weights
        self._hold(len(texts), name, where)
        found = alternatives(texts, weights)
        if depth(texts) == MAX_NESTING:
            raise self._too_deep(name, where)
        if not found.possible:
            raise InputError(f"__{name}__", "all its entries have a weight of 0; give one of them another", where)
        self._known[name] = Wildcard(name, found)
        return self._known[name]

    def _entries(self, source: Source, name: str, where: str) -> tuple[list[Text], list[float | None]]:
        """The parsed entries of a file or list, and their weights; what is wrong with them is found out once."""
        if source in self._open:
            way = [*self._open.values()][list(self._open).index(source) :]
            problem = (
                f"leads back to itself: {' → '.join(f'__{each}__' for each in [*way, name])}; take one of them out"
            )
            raise InputError(f"__{name}__", problem, where)
        if len(self._open) == MAX_NESTING:
            raise self._too_deep(name, where)
        if source not in self._parsed:
            self._open[source] = name
            try:
                self._parsed[source] = self._read(source, name, where)
            except InputError as problem:
                self._parsed[source] = problem
            finally:
                del self._open[source]
        parsed = self._parsed[source]
        if isinstance(parsed, InputError):
            raise parsed
        return parsed

    @staticmethod
    def _too_deep(name: str, where: str) -> InputError:
        problem = f"wildcards stand more than {MAX_NESTING} deep within wildcards; use fewer"
        return InputError(f"__{name}__", problem, where)

    def _hold(self, entries: int, name: str, where: str) -> None:
        self._held += entries
        if self._held > MAX_ENTRIES:
            raise InputError(f"__{name}__", f"more than {MAX_ENTRIES:,} entries in use; use fewer globs", where)

    def _read(self, source: Source, name: str, where: str) -> tuple[list[Text], list[float | None]]:
        assert self._folder is not None
        entries = self._folder.entries(source)
        if not entries:
            place = " ".join([str(source.file), *source.keys])
            raise InputError(place, "holds no entry, only blank lines and comments; write one a line")
        self._hold(len(entries), name, where)
        texts: list[Text] = []
        weights: list[float | None] = []
        for entry in entries:
            weight, text = split_weight(entry.text)
            texts.append(self._parse_entry(entry, one_line(text)))
            weights.append(weight)
        return texts, weights

    def _parse_entry(self, entry: Entry, text: str) -> Text:
        parsed = parse_choices(text, lambda start: entry.where, self._find, may_enumerate=False)
        _check_reach(parsed, entry.text, entry.where)
        return parsed


def _check_reach(parsed: Text, text: str, where: str) -> None:
    """Refuse a text that can become endless: wildcards that are named twice by each other double at each level."""
    if (most := reach(parsed)) > MAX_REACH:
        problem = f"can become {most:,} characters, {MAX_REACH:,} are the limit; let it name fewer wildcards"
        raise InputError(text[:60], problem, where)
