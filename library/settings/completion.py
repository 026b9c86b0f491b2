"""What completes the program's options in a shell: their names, and the values that are words or files."""

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from library.settings.option_help import group_words

_FILES = ("FILE", "PATH", "DIR", "MODEL", "VAE")  # what values that are files or folders are called in the help
_FUNCTION = "_gen_img_diffusers"


class _Described(Protocol):
    """What is known of an option; see `settings.options.Option`."""

    @property
    def words(self) -> tuple[str, ...]: ...


class _Parser(Protocol):
    """A parser with what is known of its options."""

    prog: str
    _actions: list[argparse.Action]
    _action_groups: list[argparse._ArgumentGroup]

    @property
    def table(self) -> Mapping[str, _Described]: ...


def script(parser: _Parser, shell: str) -> Iterator[str]:
    """The lines of a script for one of `SHELLS`, which the shell reads when it starts."""
    return _SCRIPTS[shell](parser)


def _words(parser: _Parser, action: argparse.Action) -> Sequence[str]:
    """The values of an option that are words."""
    return group_words(parser._action_groups) if action.dest == "help" else parser.table[action.dest].words


def _is_file(action: argparse.Action) -> bool:
    return action.metavar in _FILES


def _bash(parser: _Parser) -> Iterator[str]:
    """Bash completes files by itself where a function finds nothing. It tells a command by its first word alone."""
    names = " ".join(name for action in parser._actions for name in action.option_strings)
    yield from (
        "# for ~/.bashrc: source this file",
        f"{_FUNCTION}() {{",
        "    local place",
        "    COMPREPLY=()",
        f'    [[ " ${{COMP_WORDS[*]:0:COMP_CWORD}} " == *{parser.prog}" "* ]] || return',
        '    if [[ "$2" == -* ]]; then',
        f'        COMPREPLY=($(compgen -W "{names}" -- "$2"))',
        "        return",
        "    fi",
        "    for ((place = COMP_CWORD - 1; place > 0; place--)); do",
        '        [[ "${COMP_WORDS[place]}" == --* ]] && break',
        "    done",
        '    case "${COMP_WORDS[place]}" in',
    )
    for action in parser._actions:
        if words := _words(parser, action):
            answer = f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$2"))'
            yield f"        {'|'.join(action.option_strings)}) {answer} ;;"
    yield from (
        "    esac",
        "}",
        f"complete -o bashdefault -o default -F {_FUNCTION} {parser.prog} python python3",
    )


def _zsh(parser: _Parser) -> Iterator[str]:
    """Zsh completes the words after `python script` as if the script were the command."""
    yield from (
        "# for ~/.zshrc, after compinit: source this file",
        f"{_FUNCTION}() {{",
        "    _arguments \\",
    )
    for action in parser._actions:
        words = _words(parser, action)
        values = f"({' '.join(words)})" if words else "_files" if _is_file(action) else ""
        # many values go on up to the next option
        value = "" if action.nargs == 0 else f":{'*-*:' if action.nargs == '+' else ''}{action.metavar}:{values}"
        for name in action.option_strings:
            yield f"        {shlex.quote(f'{name}[{_described(action.help)}]{value}')} \\"
    yield from ("        && return 0", "}", f"compdef {_FUNCTION} {parser.prog}")


def _fish(parser: _Parser) -> Iterator[str]:
    """Fish completes a command by each line whose condition holds."""
    yield from (
        "# for ~/.config/fish/config.fish: source this file",
        f"function _{_FUNCTION}",
        f"    string match -q -- '*{parser.prog}' (commandline -opc)",
        "end",
        f"for command in {parser.prog} python python3",
    )
    for action in parser._actions:
        words = _words(parser, action)
        value = "" if action.nargs == 0 else " -r" if _is_file(action) else " -x"
        value = f" -x -a '{' '.join(words)}'" if words else value
        names = " ".join(
            f"-{'l' if name.startswith('--') else 's'} {name.lstrip('-')}" for name in action.option_strings
        )
        described = re.sub(r"([\\'])", r"\\\1", action.help or "")
        yield f"    complete -c $command -n _{_FUNCTION} {names}{value} -d '{described}'"
    yield "end"


def _described(text: str | None) -> str:
    """A description for zsh's `_arguments`."""
    return re.sub(r"([\\:\[\]])", r"\\\1", text or "")


_SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
SHELLS = tuple(_SCRIPTS)
