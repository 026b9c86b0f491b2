"""Files of wildcards: lists of texts, one of which stands for `__name__` in a prompt.

A `.txt` file is one wildcard, an entry a line. A `.yaml` file is a tree of mappings, with lists of entries at its ends.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from library.errors import InputError
from library.files.text_files import LINE_END, read_text
from library.texts import is_text

MAX_FILE_BYTES = 4 << 20  # as much as the fingerprint of a run's file looks at whole
_MAX_FILES = 100_000  # in a folder; more are taken for the wrong folder
_MAX_DEPTH = 32  # of mappings in YAML
_MAX_HINTS = 20  # nearest names are looked for so often; that takes long where there are many
_NULLS = ("", "~", "null", "Null", "NULL")  # YAML's


@dataclass(frozen=True)
class Source:
    """Where a wildcard's entries are: a file and, in YAML, the keys that lead to them."""

    file: Path
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One entry of a wildcard as it is written, and its file and line."""

    text: str
    where: str


class WildcardFolder:
    """The wildcards below a folder, by name.

    `colours.txt` is `colours`, `dir/colours.txt` is `dir/colours`. What stands in `dir/all.yaml` below the keys `warm`
    and `red` is `dir/warm/red`, and `dir/all/warm/red` as well.

    Args:
        folder: the folder.
        option: what named it, for messages.

    Raises:
        InputError: when there is no such folder.
    """

    def __init__(self, folder: Path, option: str = "--wildcard_dir") -> None:
        self._subject = f"{option} {folder}"
        try:
            self._folder = folder.expanduser()
            found = self._folder.is_dir()
        except (OSError, RuntimeError, ValueError):
            found = False
        if not found:
            raise InputError(self._subject, "is no folder; give one that holds .txt or .yaml files")
        self._leaves: dict[Source, list[Entry]] = {}  # what YAML files hold
        self._globs: dict[str, list[Source]] = {}
        self._hints = 0

    def sources(self, name: str, where: str) -> list[Source]:
        """Where the entries of a name are; a glob, in which `*` stands for what is no slash and `**` for anything, may
        have several.

        Raises:
            InputError: when there is no such wildcard, or two have the name.
        """
        if "*" in name:
            found = self._fitting(name)
        else:
            found = self._names.get(name, [])
            if len(found) > 1:
                files = " and ".join(str(source.file) for source in found[:2])
                raise InputError(f"__{name}__", f"is in {files}; rename one of them", where)
        if not found:
            raise InputError(f"__{name}__", f"no such wildcard{self._hint(name)}", where)
        return found

    def entries(self, source: Source) -> list[Entry]:
        """The entries of a wildcard as they are written.

        Raises:
            InputError: when its file cannot be read.
        """
        if source in self._leaves:
            return self._leaves[source]
        text = read_text(str(source.file), str(source.file), MAX_FILE_BYTES)
        return [
            Entry(line.strip(), f"{source.file}:{number}")
            for number, line in enumerate(LINE_END.split(text), start=1)
            if line.strip() and not line.startswith("#")
        ]

    def _fitting(self, glob: str) -> list[Source]:
        """The sources whose names fit a glob, by their names."""
        if glob not in self._globs:
            fitting = [name for name in sorted(self._names) if _fits(name, glob)]
            self._globs[glob] = list(dict.fromkeys(source for name in fitting for source in self._names[name]))
        return self._globs[glob]

    def _hint(self, name: str) -> str:
        if any(each.startswith(f"{name}/") for each in self._names):
            return f", {name} is a group of them; write __{name}/*__ for all, or a name from it"
        self._hints += 1
        nearest = get_close_matches(name, self._names, n=1, cutoff=0.5) if self._hints <= _MAX_HINTS else []
        return f" in {self._folder}; " + (f"did you mean __{nearest[0]}__?" if nearest else "check its name")

    @cached_property
    def _names(self) -> dict[str, list[Source]]:
        names: dict[str, list[Source]] = {}
        for file in self._files():
            path = file.relative_to(self._folder).with_suffix("").as_posix()
            if file.suffix.lower() == ".txt":
                names.setdefault(path, []).append(Source(file))
                continue
            above = path.rpartition("/")[0]
            for keys, entries in _read_tree(file):
                source = Source(file, keys)
                self._leaves[source] = entries
                for start in (above, path):
                    names.setdefault("/".join((start, *keys) if start else keys), []).append(source)
        return names

    def _files(self) -> list[Path]:
        """The files of wildcards, sorted; hidden ones, such as macOS' `._` files, are passed over."""
        found = []
        for folder, folders, names in os.walk(self._folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                file = Path(folder, name)
                wanted = file.suffix.lower() in (".txt", ".yaml", ".yml") and not name.startswith(".")
                if wanted and file.is_file():  # no pipe, which would wait for a writer
                    found.append(file)
            if len(found) > _MAX_FILES:
                raise InputError(self._subject, f"holds more than {_MAX_FILES:,} files; give the wildcards' own folder")
        return sorted(found)


def _fits(name: str, glob: str) -> bool:
    return ("**" in glob or name.count("/") == glob.count("/")) and fnmatchcase(name, glob)


# ---------------------------------------------------------------------------------------------------------------------
# YAML. Its events are read, not its objects: they tell lines, scalars stay as they are written (`no`, `1e3`, `007`),
# and no alias can make much out of little.


def _read_tree(file: Path) -> list[tuple[tuple[str, ...], list[Entry]]]:
    """The lists of entries in a file of YAML, each with the keys that lead to it.

    Raises:
        InputError: when the file cannot be read, or holds something else.
    """
    text = read_text(str(file), str(file), MAX_FILE_BYTES)
    try:
        events = yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return list(_Tree(file, events).leaves())
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise InputError(place, f"is no YAML ({problem.problem or problem.context}); mend it") from None
    except (yaml.YAMLError, RecursionError) as problem:
        reason = " ".join(str(problem).split())
        raise InputError(str(file), f"is no YAML ({reason}); mend it") from None


class _Tree:
    """The events of a file of YAML as a tree."""

    def __init__(self, file: Path, events: Iterator[Any]) -> None:
        self._file = file
        self._events = events

    def leaves(self) -> Iterator[tuple[tuple[str, ...], list[Entry]]]:
        """The lists, each with its keys."""
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent) and (documents := documents + 1) > 1:
                self._refuse(event, "a second document begins here; make one file of each")
            if isinstance(event, yaml.MappingStartEvent):
                self._check(event)
                yield from self._mapping(())
            elif isinstance(event, yaml.NodeEvent):
                self._refuse(event, "is no mapping of names to lists; write `name:` and entries below it")

    def _mapping(self, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Entry]]]:
        seen = set()
        while not isinstance(key := next(self._events), yaml.MappingEndEvent):
            name = self._scalar(key, "a name")
            if name in seen:
                self._refuse(key, f"the name {name!r} stands here twice; keep one")
            seen.add(name)
            value = next(self._events)
            self._check(value)
            if isinstance(value, yaml.MappingStartEvent):
                if len(keys) == _MAX_DEPTH:
                    self._refuse(value, f"names stand more than {_MAX_DEPTH} deep; use fewer")
                yield from self._mapping((*keys, name))
            elif isinstance(value, yaml.SequenceStartEvent):
                yield (*keys, name), self._list()
            else:
                self._refuse(value, f"{name} has no list; write each entry on a line of its own, after a hyphen")

    def _list(self) -> list[Entry]:
        entries = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            text = self._scalar(event, "an entry")
            entries.append(Entry(text.strip(), f"{self._file}:{event.start_mark.line + 1}"))
        return entries

    def _scalar(self, event: Any, what: str) -> str:
        self._check(event)
        if not isinstance(event, yaml.ScalarEvent):
            problem = f"{what} is a text or a number, no list and no mapping"
            self._refuse(event, f"{problem}; put what begins with [ or {{ in quotes")
        if event.implicit[0] and event.value in _NULLS:
            self._refuse(event, f"{what} is empty; write a text, in quotes if it is to be empty")
        if "\0" in event.value or not is_text(event.value):
            self._refuse(event, f"{what} holds what is no text (NUL, half a character); leave it out")
        return event.value

    def _check(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"aliases are not read; write out what *{event.anchor} stands for")
        if getattr(event, "tag", None) is not None:
            self._refuse(event, f"the tag {event.tag} is not read; leave it out")

    def _refuse(self, event: Any, problem: str) -> None:
        raise InputError(f"{self._file}:{event.start_mark.line + 1}", problem)
