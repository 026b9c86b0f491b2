"""The program's help: what people use first, the options under a heading, or all of them."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence

from library.errors import InputError

Headings = Sequence[argparse._ArgumentGroup]


def short_help(parser: argparse.ArgumentParser, first: Sequence[str]) -> Iterator[str]:
    """The options that people use first, by their names without hyphens, and what else there is to read."""
    by_name = {action.dest: action for action in parser._actions}

    def fill(text: argparse.HelpFormatter) -> None:
        text.add_usage(parser.usage, parser._actions, [])
        text.start_section("options that people use first")
        text.add_arguments([by_name[name] for name in first])
        text.end_section()

    yield from _formatted(parser, fill)
    more = f"--help writes all options, --help GROUP those of one group: {_titles(parser)}"
    yield from ("", *textwrap.wrap(more, _text_width(), break_on_hyphens=False))


def long_help(parser: argparse.ArgumentParser, wanted: str | None) -> Iterator[str]:
    """All options, or those under the headings whose words begin with those of `wanted`.

    Raises:
        InputError: when there is no such heading; it names them.
    """
    if wanted is None:
        return iter(parser.format_help().splitlines())
    found = [heading for heading in _headings(parser) if _is_named(heading.title or "", wanted)]
    if not found:
        raise InputError(f"--help {wanted}", f"no such group; write a word of one of these: {_titles(parser)}")

    def fill(text: argparse.HelpFormatter) -> None:
        for heading in found:
            text.start_section(heading.title)
            text.add_text(heading.description)
            text.add_arguments(heading._group_actions)
            text.end_section()

    return _formatted(parser, fill)


def group_words(groups: Headings) -> list[str]:
    """A word for each heading that `--help` tells it by, from the rest where there is such a one."""
    titles = [heading.title or "" for heading in _with_options(groups)]
    named = {title: re.findall(r"[^\W_]{5,}", title) or title.split()[-1:] for title in titles}
    return [
        next((word for word in words if sum(_is_named(other, word) for other in titles) == 1), words[0])
        for words in named.values()
    ]


def _headings(parser: argparse.ArgumentParser) -> Headings:
    return _with_options(parser._action_groups)


def _with_options(groups: Headings) -> Headings:
    """Those that something stands under; argparse has two of its own."""
    return [heading for heading in groups if heading._group_actions or heading.description]


def _titles(parser: argparse.ArgumentParser) -> str:
    return " | ".join(heading.title or "" for heading in _headings(parser))


def _is_named(title: str, wanted: str) -> bool:
    """Whether each word that is wanted begins one of a title's; none is wanted is no."""
    words = re.findall(r"\w+", wanted.lower())
    return bool(words) and all(re.search(rf"\b{word}", title.lower()) for word in words)


def _text_width() -> int:
    """The characters of a line, as argparse takes them."""
    return shutil.get_terminal_size().columns - 2


def _formatted(parser: argparse.ArgumentParser, fill: Callable[[argparse.HelpFormatter], None]) -> Iterator[str]:
    text = parser.formatter_class(prog=parser.prog)
    fill(text)
    return iter(text.format_help().splitlines())
