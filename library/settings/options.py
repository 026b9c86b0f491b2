"""What an option is, told once: each has a record, made where the script adds it to its parser.

Whatever treats options by their kind (config files, `--resume`, the web page's commands) asks these records, so that an
option cannot be forgotten anywhere: without its use it cannot be added.
"""

import argparse
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from library import console
from library.errors import InputError
from library.settings.option_help import long_help, short_help
from library.settings.other_names import is_same_thing, meant_option, of_line

Said = dict[str, str | list[str] | bool]  # options as they were written, by name
Converter = Callable[[str], object]
ShownLines = Callable[["OptionParser", Any], Iterator[str]]

# ---------------------------------------------------------------------------------------------------------------------
# Records


@dataclass(frozen=True)
class Use:
    """What an option is for, which says where it counts."""

    compared: bool  # a run that is gone on with has to have the same value
    kept: bool  # `settings.toml` holds it
    for_one: bool  # the command that makes one of the run's pictures again has it, too
    in_config: bool = True  # it may stand in a config file


PICTURE = Use(compared=True, kept=True, for_one=True)  # how a picture looks
CHOICE = Use(compared=True, kept=True, for_one=False)  # which pictures are made, and how they are named
COMPUTING = Use(compared=False, kept=True, for_one=True)  # how they are computed; or compared by its files' content
RUN = Use(compared=False, kept=True, for_one=False)  # where lines come from and pictures go, or how many at a time
TELLING = Use(compared=False, kept=False, for_one=False)  # what is done with the plan, and what is told of it
COMMAND_LINE = Use(compared=False, kept=False, for_one=False, in_config=False)  # for the command line alone


@dataclass(frozen=True)
class Needs:
    """What has to be given beside an option: one of some others, or else what is wrong and what to do."""

    one_of: tuple[str, ...]  # without their hyphens
    problem: str


@dataclass(frozen=True)
class Option:
    """One option of the program.

    Args:
        name: without its hyphens.
        group: the heading that it stands under.
        use: what it is for.
        needs: what has to be given beside it.
        alternative: what it is one of several of, in the plural; of these at most one can be given.
        names_files: its values name files that pictures are made from.
        default: what it is where it is not given.
        not_with: what it does not go together with, without hyphens.
        words: values that a shell can complete.
    """

    name: str
    group: str
    use: Use
    needs: tuple[Needs, ...] = ()
    alternative: str = ""
    names_files: bool = False
    default: object = None
    not_with: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


class Options:
    """The options of a command line: each an attribute, converted or its default.

    Args:
        values: by name.
        said: those that were given, as they were written.
        table: what each is.
        parser: of the command line.
        argv: the command line.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        said: Said,
        table: Mapping[str, Option],
        parser: "OptionParser",
        argv: Sequence[str],
    ) -> None:
        self._values, self.said, self._table, self._parser, self._argv = values, said, table, parser, argv

    def __getattr__(self, name: str) -> Any:
        try:
            return vars(self)["_values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def given(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        return self._values.get(name) != self._table[name].default

    def is_free(self, name: str, beside: Collection[str]) -> bool:
        """Whether an option may be added: it and its alternatives are not said, what it needs is given or beside."""
        option = self._table[name]
        alternatives = {self._table[said].alternative for said in self.said} - {""}
        if name in self.said or option.alternative in alternatives:
            return False
        return all(any(self.given(one) or one in beside for one in needs.one_of) for needs in option.needs)

    def takes(self, name: str, text: str) -> bool:
        """Whether an option takes a text; "" is for one that is switched on, and spaces part several values.

        Raises:
            ArgumentTypeError: when its converter refuses the text.
        """
        convert = self._parser.action(name).type
        if text and callable(convert):
            for value in text.split() if self.takes_several(name) else [text]:
                convert(value)
        return bool(text) == (self._parser.action(name).nargs != 0)

    def takes_several(self, name: str) -> bool:
        """Whether an option takes several values."""
        return self._parser.action(name).nargs == "+"

    def with_added(self, arguments: Sequence[str]) -> "Options":
        """These with arguments that stand before the command line's own, which win."""
        return self._parser.parse([*arguments, *self._argv]) if arguments else self

    def given_in(self, group: str) -> list[str]:
        """The names of the options under a heading that are given."""
        return [name for name, option in self._table.items() if option.group == group and self.given(name)]

    def only(self, *names: str) -> "Options":
        """Some of them alone, as if nobody had said anything."""
        return Options({name: self._values[name] for name in names}, {}, {}, self._parser, ())

    def __getstate__(self) -> dict[str, object]:
        """What other processes are sent: the parser stays here."""
        return {name: value for name, value in vars(self).items() if name != "_parser"}

    def compared(self) -> dict[str, object]:
        """The options that a run which is gone on with has to agree in."""
        return {name: self._values[name] for name, option in self._table.items() if option.use.compared}

    def usual(self) -> dict[str, object]:
        """What these are where they are not given."""
        return {name: option.default for name, option in self._table.items() if option.use.compared}

    def files(self) -> list[Path]:
        """The files that options which change pictures name; folders and ids of the Hub are none."""
        found = []
        for name, option in self._table.items():
            value = self._values[name] if option.names_files and option.use.compared else None
            for text in value if isinstance(value, list) else [] if value is None else [value]:
                try:
                    path = Path(text).expanduser()
                    found += [path] if path.is_file() else []
                except (OSError, RuntimeError, ValueError):
                    continue  # no path
        return found

    def kept(self) -> Said:
        """What of the options as they were written makes up the run's settings."""
        return {name: value for name, value in self.said.items() if self._table[name].use.kept}

    def for_one(self) -> Said:
        """What of the options as they were written makes one of the run's pictures again."""
        return {name: value for name, value in self.said.items() if self._table[name].use.for_one}

    def check(self) -> None:
        """Refuse options without what they need, beside what they do not go with, and several where one is meant.

        Raises:
            InputError: for the first of these.
        """
        for name, option in self._table.items():
            if not self.given(name):
                continue
            for needs in option.needs:
                if not any(map(self.given, needs.one_of)):
                    raise InputError(f"--{name}", needs.problem)
            for other in filter(self.given, option.not_with):
                raise InputError(f"--{name} and --{other}", "do not go together; give one")
        self.check_alternatives()

    def check_alternatives(self) -> None:
        """Refuse several options where one is meant.

        Raises:
            InputError: for the first of these.
        """
        alternatives: dict[str, list[str]] = {}
        for name, option in self._table.items():
            if option.alternative and self.given(name):
                alternatives.setdefault(option.alternative, []).append(f"--{name}")
        for kind, given in alternatives.items():
            if len(given) > 1:
                raise InputError(" and ".join(given), f"are two {kind}; give one")


# ---------------------------------------------------------------------------------------------------------------------
# Parser


class OptionParser(argparse.ArgumentParser):
    """Argparse with one-line errors, converters that say which value they refused, and a record of each option."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False, **settings
        )
        self.table: dict[str, Option] = {}

    def error(self, message: str) -> NoReturn:
        """Write `error: --option value: what is wrong` and leave with status 2."""
        message = re.sub(r"^argument [^:]+: (?=--)", "", message)
        console.error(re.sub(r"^argument (?:\S+/)*(--\S+): ", r"\1: ", message))
        sys.exit(InputError.exit_status)

    def add_options(self, title: str) -> "OptionGroup":
        """A heading, for options to be added to."""
        return OptionGroup(self, self.add_argument_group(title), title)

    def parse(self, argv: Sequence[str]) -> Options:
        """Parse all arguments; an unknown one is refused with the nearest known one."""
        values, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(f"{unknown[0]}: no such option; {self._hint(unknown[0].partition('=')[0])}")
        return Options(vars(values), self.said(argv), self.table, self, argv)

    def _hint(self, unknown: str) -> str:
        """What somebody may have meant by an argument that is no option."""
        if not unknown.startswith("-"):
            return "see --help; a text with spaces needs quotes"
        name = unknown.lstrip("-")
        known = [each.lstrip("-") for action in self._actions for each in action.option_strings if each != "-h"]
        same = [each for each in known if each.lower() == name.lower()]
        option = same[0] if same else of_line(name)
        if option is not None and not same:
            here = f"; here it is --{option}" if option in known else ""
            return f"it is for prompt lines, within their quotes{here}"
        option = option or meant_option(name, known)
        if option is None:
            return "--help lists them all"
        return f"here it is --{option}" if is_same_thing(name, option) else f"did you mean --{option}?"

    def said(self, argv: Sequence[str]) -> Said:
        """The options that a command line gives, unconverted, by name."""
        try:
            said = vars(self._plain.parse_known_args(argv)[0])
            return {name: value for name, value in said.items() if value is not False}  # switched off again
        except argparse.ArgumentError:  # the parser that knows the types says what is wrong
            return {}

    @cached_property
    def _plain(self) -> argparse.ArgumentParser:
        """A parser of the same options that converts nothing and knows no defaults."""
        plain = _PlainParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        for action in self._actions:
            if isinstance(action, _Switch):
                _add_switch(plain, plain, action.option_strings[0], default=argparse.SUPPRESS)
            elif action.nargs == 0:
                names, default = action.option_strings, argparse.SUPPRESS
                plain.add_argument(*names, dest=action.dest, action="store_true", default=default)
            else:
                constant = {"const": action.const} if action.nargs == "?" else {}
                kind = "extend" if isinstance(action, argparse._ExtendAction) else "store"
                plain.add_argument(
                    *action.option_strings, dest=action.dest, nargs=action.nargs, action=kind, **constant
                )
        return plain

    def action(self, name: str) -> argparse.Action:
        """What argparse knows of an option."""
        return next(action for action in self._actions if action.dest == name)


class _PlainParser(argparse.ArgumentParser):
    """A parser that raises what others leave the program for."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


class OptionGroup:
    """Options under a heading of the parser's help."""

    def __init__(self, parser: OptionParser, group: argparse._ActionsContainer, title: str) -> None:
        self._parser, self._group, self._title = parser, group, title

    def add(
        self,
        *names: str,
        use: Use,
        help: str,
        metavar: str,
        convert: Converter = str,
        default: object = None,
        many: bool = False,
        again: bool = False,
        alone: str | None = None,
        required: bool = False,
        needs: Needs | Sequence[Needs] = (),
        alternative: str = "",
        names_files: bool = False,
        not_with: tuple[str, ...] = (),
        words: Iterable[str] = (),
    ) -> None:
        """Add an option with a value, or with `many` of them, which add up where it is given `again`; see `Option`.

        A value that is meant where the option stands `alone` may be left out.
        """
        self._group.add_argument(
            *names,
            help=help,
            metavar=metavar,
            type=_named(names[0], convert),
            default=default,
            nargs="+" if many else "?" if alone else None,
            const=alone,
            required=required,
            action="extend" if again else "store",
        )
        self._note(names[0], use, needs, alternative, names_files, default, not_with, tuple(words))

    def switch(
        self,
        name: str,
        *,
        use: Use,
        help: str,
        needs: Needs | Sequence[Needs] = (),
        alternative: str = "",
        not_with: tuple[str, ...] = (),
    ) -> None:
        """Add an option that is on or off; see `Option`."""
        _add_switch(self._parser, self._group, name, help=help)
        self._note(name, use, needs, alternative, default=False, not_with=not_with)

    def show_and_leave(
        self,
        name: str,
        *,
        help: str,
        lines: ShownLines,
        metavar: str | None = None,
        optional: bool = False,
        convert: Converter = str,
        words: Iterable[str] = (),
    ) -> None:
        """Add an option that writes some lines and leaves the program.

        Args:
            name: with its hyphens.
            help: on it.
            lines: made of the parser and the option's value, or None; may raise InputError.
            metavar: of its value, which may be `optional`; None where it has none.
            convert: the value's converter.
            words: values that a shell can complete.
        """
        settings: dict[str, Any] = {"nargs": 0}
        if metavar is not None:
            settings = {"metavar": metavar, "type": _named(name, convert), "nargs": "?" if optional else None}
        self._group.add_argument(name, help=help, action=_ShowLines, lines=lines, dest=name.lstrip("-"), **settings)
        self._note(name, COMMAND_LINE, words=tuple(words))

    def show_help(self, first: Sequence[str]) -> None:
        """Add the options that write the program's help and leave it; `first` are the options of the short one."""
        self.show_and_leave(
            "-h", help="write what people use first and leave", lines=lambda parser, _: short_help(parser, first)
        )
        self.show_and_leave(
            "--help",
            help="write all of this, or one group, and leave: --help networks",
            lines=long_help,
            metavar="GROUP",
            optional=True,
        )

    def only_one(self) -> "OptionGroup":
        """A part of the group of which one option can be given."""
        return OptionGroup(self._parser, self._group.add_mutually_exclusive_group(), self._title)

    def _note(
        self,
        name: str,
        use: Use,
        needs: Needs | Sequence[Needs] = (),
        alternative: str = "",
        names_files: bool = False,
        default: object = None,
        not_with: tuple[str, ...] = (),
        words: tuple[str, ...] = (),
    ) -> None:
        plain, needed = name.lstrip("-"), (needs,) if isinstance(needs, Needs) else tuple(needs)
        self._parser.table[plain] = Option(
            plain, self._title, use, needed, alternative, names_files, default, not_with, words
        )


class _Switch(argparse.Action):
    """Switches on, or by its name with `no-` or `no_` off: what a file of options has switched on."""

    def __init__(self, *, default: object = False, **settings: Any) -> None:
        super().__init__(nargs=0, default=default, **settings)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Note what it is."""
        setattr(namespace, self.dest, option_string in self.option_strings)


def _add_switch(parser: argparse.ArgumentParser, group: argparse._ActionsContainer, name: str, **settings: Any) -> None:
    """Add a switch; the names that switch it off are known to the parser and not shown in its help."""
    action = group.add_argument(name, action=_Switch, **settings)
    for off in (name.replace("--", "--no-", 1), name.replace("--", "--no_", 1)):
        parser._option_string_actions.setdefault(off, action)


class _ShowLines(argparse.Action):
    """Writes some lines and leaves."""

    def __init__(self, *, lines: ShownLines, **settings: Any) -> None:
        super().__init__(default=argparse.SUPPRESS, **settings)
        self._lines = lines

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        """Write the lines."""
        assert isinstance(parser, OptionParser)  # which alone has such options
        try:
            for line in self._lines(parser, None if self.nargs == 0 else values):
                console.result(line)
        except InputError as problem:
            parser.error(str(problem))
        parser.exit()


def _named(option: str, convert: Converter) -> Converter:
    """A converter that names the option and the value in its errors."""

    def convert_option(text: str) -> object:
        try:
            return convert(text)
        except argparse.ArgumentTypeError as problem:
            raise argparse.ArgumentTypeError(f"{option} {text}: {problem}") from None

    return convert_option
