"""The loop's commands, lines that begin with a colon: they keep options from prompt to prompt and save lines."""

import os
import re
from collections.abc import Callable, Mapping
from copy import copy
from operator import attrgetter
from pathlib import Path

from library import console
from library.errors import EnvironmentFault, InputError, ProgramError
from library.files.picture_files import save_whole
from library.plan.all_jobs import count_pictures, plan_jobs
from library.plan.job import Job, JobSettings
from library.plan.line_text import as_typed, prompt_line
from library.plan.prompt_lines import OPTION_START, PROMPT_OPTIONS
from library.plan.run_plan import Keyboard, RunPlan
from library.plan.seeds import SeedSource
from library.plan.sources import SourceLine, typed_line
from library.settings.other_names import nearest
from library.texts import readable, shell_word

Kept = Mapping[str, str]  # options of a line, by name: their values as they were typed

_COMMAND = re.compile(r":([A-Za-z]\S*)\s*(.*)", re.DOTALL)
_NAMED = re.compile(r"(?:^|[\s{|])--(\w+)")  # options of a line, those within its choices as well
# what an option leaves nothing to do for
_IN_PLACE_OF = {"timesteps": ("s", "schedule"), "s": ("timesteps",), "schedule": ("timesteps",)}
_ALWAYS_SHOWN = ("w", "h", "s", "sampler", "l")
_NOT_SHOWN = ("d", "f")  # unless they are kept


def is_command(typed: str) -> bool:
    """Whether a line is a command; a prompt that begins so has a space before it."""
    return _COMMAND.match(typed) is not None


class Session:
    """What lasts from one prompt of the loop to the next.

    Args:
        plan: the run.
        keyboard: what makes jobs of lines.
    """

    def __init__(self, plan: RunPlan, keyboard: Keyboard) -> None:
        self._plan, self._keyboard = plan, keyboard
        self._maker = keyboard.maker
        self._kept: Kept = {}
        self._before: list[tuple[str, Kept]] = []  # commands that changed what is kept, and what was before each
        self._drawn: list[str] = []  # a line for each picture

    # -----------------------------------------------------------------------------------------------------------------
    # Lines

    def jobs(self, line: SourceLine) -> list[Job]:
        """The pictures of a line, with the options that are kept where it has none of its own.

        Raises:
            InputError: for a fault in it.
        """
        line = SourceLine(_joined(line.text, _without(self._kept, _named(line.text))))
        repeats = self._plan.repeats
        maker = copy(self._maker)  # it counts pictures, and of a refused line there are none
        maker.sweep.check([line])
        count_pictures([line], repeats.images_per_prompt, repeats.iterations, maker.wildcards, maker.sweep)
        jobs = plan_jobs([line], maker, self._keyboard.seeds, self._keyboard.name_file, repeats.iterations)
        self._maker = maker
        self._drawn += [prompt_line(job, maker.defaults, maker.family.size_px) for job in jobs]
        return jobs

    def _tried(self, options: str, kept: Kept) -> Job:
        """A picture as it would be with these options; nothing counts it.

        Raises:
            InputError: for a fault in them.
        """
        line, maker = SourceLine(_joined(options, kept)), copy(self._maker)
        file = self._plan.output.folder / "picture.png"
        return plan_jobs([line], maker, SeedSource(0, None), lambda *_: file, iterations=1)[0]

    # -----------------------------------------------------------------------------------------------------------------
    # Commands

    def obey(self, typed: str) -> None:
        """Do what a command says, or tell in one line why not."""
        match = _COMMAND.match(typed)
        assert match is not None  # see `is_command`
        name, rest = match[1].lower(), match[2].strip()
        try:
            if name not in _COMMANDS:
                near = nearest(name, _COMMANDS)
                hint = f"did you mean :{near}?" if near else f"there are {', '.join(f':{each}' for each in _COMMANDS)}"
                raise InputError(f":{name}", f"no such command; {hint} (before a prompt's colon, write a space)")
            command, takes, _ = _COMMANDS[name]
            if rest and not takes:
                raise InputError(f":{name} {rest}", f"takes nothing; write :{name} alone")
            command(self, rest)
        except ProgramError as problem:
            for each in getattr(problem, "problems", [problem]):
                console.error(each)

    def set(self, text: str) -> None:
        """Keep options for the prompts that follow, or tell which are kept."""
        text = typed_line(text, ":set", self._maker.syntax).text
        if text:
            options = _options(text)
            others = _without(self._kept, options)
            self._tried(text, others)
            self._change(f":set {text}", {**others, **options})
        console.answer(self._told())

    def unset(self, text: str) -> None:
        """Keep some options no longer, or none at all."""
        names = [word.lstrip("-").lower() for word in text.split()] or list(self._kept)
        for name in names:
            if name not in self._kept:
                raise InputError(f":unset --{name}", f"is not kept; {self._told()}")
        if names:
            self._change(f":unset {text}".strip(), {n: value for n, value in self._kept.items() if n not in names})
        console.answer(self._told())

    def undo(self, _: str) -> None:
        """Take back the last change of what is kept."""
        if not self._before:
            raise InputError(":undo", "there is nothing to take back; :set and :unset change what is kept")
        command, self._kept = self._before.pop()
        console.answer(f"taken back: {command}; {self._told()}")

    def show(self, _: str) -> None:
        """Tell what holds for the next prompt, as its options."""
        job, usual = self._tried("", self._kept), JobSettings()
        swept = {axis.option.name: axis for axis in self._maker.sweep.axes if axis.option}
        for name, option in PROMPT_OPTIONS.items():
            if name in self._kept:
                console.answer(f"{f'--{name} {self._kept[name]}':24} {option.help}; kept by :set")
            elif name in swept:
                console.answer(f"{f'--{name}':24} {option.help}; each of --sweep {swept[name]}")
            elif name not in _NOT_SHOWN:
                value = attrgetter(option.sets)(job)
                if name in _ALWAYS_SHOWN or value != attrgetter(option.sets)(usual):
                    console.answer(f"{f'--{name} {as_typed(value)}':24} {option.help}")

    def save(self, text: str) -> None:
        """Write the pictures so far as a prompt file."""
        subject = f":save {text}".strip()
        if not text:
            raise InputError(subject, "needs a file; write :save prompts.txt")
        if not self._drawn:
            raise InputError(subject, "nothing was drawn yet; type a prompt first")
        try:
            file = Path(text).expanduser()
            if file.suffix not in ("", ".txt"):
                raise InputError(subject, "a prompt file is a text; let its name end in .txt")
            if os.path.lexists(file):
                raise InputError(subject, "is there already; give another name")
            # lines have their seeds, and each is one picture
            once = "".join(f" --{option} 1" for option, count in self._repeats().items() if count not in (None, 1))
            instead = "--interactive and --sweep" if self._maker.sweep.axes else "--interactive"
            again = f"the same command with --from_file {shell_word(str(file))}{once} in place of {instead} draws them"
            content = "\n".join([f"# The pictures of a loop; {again}", *self._drawn]) + "\n"
            file = save_whole(readable(content).encode(), file)
        except (OSError, RuntimeError, ValueError) as problem:  # no path
            raise InputError(subject, f"is no path ({problem}); give another") from None
        except EnvironmentFault as problem:
            reason = getattr(problem.__cause__, "strerror", None) or problem
            raise InputError(subject, f"cannot be written: {reason}; give another place") from None
        console.answer(f"{file}: a line for each of {len(self._drawn)} pictures; {again}")

    def help(self, _: str) -> None:
        """Tell which commands there are."""
        for name, (_command, takes, told) in _COMMANDS.items():
            console.answer(f"{f':{name} {takes}':16} {told}")
        console.answer(f"{':q':16} leave, as Ctrl-D does")
        console.answer(
            "Options are those of a prompt line (see --help line); a line's own win. A prompt that begins with"
        )
        console.answer("a colon and a letter has a space before it.")

    def _repeats(self) -> dict[str, int | None]:
        repeats = self._plan.repeats
        return {"images_per_prompt": repeats.images_per_prompt, "n_iter": repeats.iterations}

    def _change(self, command: str, kept: Kept) -> None:
        self._before.append((command, self._kept))
        self._kept = kept

    def _told(self) -> str:
        return f"kept: {_joined('', self._kept)}" if self._kept else "nothing is kept; :set --s 20 keeps an option"


# What does it, what it takes, and what is told of it
_COMMANDS: Mapping[str, tuple[Callable[[Session, str], None], str, str]] = {
    "set": (
        Session.set,
        "OPTIONS",
        "keep options for the prompts that follow: :set --s 20 --n blurry; alone, tell them",
    ),
    "unset": (Session.unset, "NAMES", "keep them no longer: :unset --s; alone, keep none"),
    "undo": (Session.undo, "", "take back the last :set or :unset"),
    "show": (Session.show, "", "tell what holds for the next prompt"),
    "save": (Session.save, "FILE", "write the pictures so far as a prompt file, with their seeds"),
    "help": (Session.help, "", "tell this"),
}


def _named(text: str) -> set[str]:
    """The options that a line names."""
    return {match[1].lower() for match in _NAMED.finditer(text)}


def _options(text: str) -> dict[str, str]:
    """The options of a text that is nothing else.

    Raises:
        InputError: when it is something else, too.
    """
    before, *options = OPTION_START.split(text)
    if before.strip():
        raise InputError(f":set {text}", "takes options of a line; write them as in a line, :set --s 20 --n blurry")
    pairs = [option.partition(" ") for option in options]
    return {name.lower(): value.strip() for name, _, value in pairs}


def _without(kept: Kept, names: Mapping[str, str] | set[str]) -> dict[str, str]:
    """What is kept and holds beside options of these names."""
    gone = {*names, *(other for name in names for other in _IN_PLACE_OF.get(name, ()))}
    return {name: value for name, value in kept.items() if name not in gone}


def _joined(text: str, kept: Kept) -> str:
    """A line with what is kept after it."""
    return " ".join([text, *(f"--{name} {value}".strip() for name, value in kept.items())]).strip()
