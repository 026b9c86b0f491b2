"""Prompt lines taken apart: the prompt and its options."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from library import values
from library.errors import InputError
from library.settings import deep_shrink, gradual_latent, samplers, sizes
from library.settings.file_names import picture_name
from library.settings.other_names import meant_in_line
from library.settings.sampler_names import sampler_name, schedule_name
from networks.strengths import Strength, parse_strengths


@dataclass(frozen=True)
class PromptOption:
    """One `--name value` that a prompt line may hold; `sets` is what it overrides (see `job.JobSettings.override`)."""

    name: str
    sets: str
    metavar: str
    convert: Callable[[str], object]
    help: str


def _part(part: str, *options: tuple[str, str, str, Callable[[str], object], str]) -> list[PromptOption]:
    return [
        PromptOption(name, f"{part}.{field}", metavar, convert, help) for name, field, metavar, convert, help in options
    ]


PROMPT_OPTIONS = {
    option.name: option
    for option in (
        PromptOption("n", "negative_prompt", "TEXT", str.strip, "negative prompt"),
        PromptOption("w", "width", "PIXELS", values.size_px, "width, a multiple of 8"),
        PromptOption("h", "height", "PIXELS", values.size_px, "height, a multiple of 8"),
        PromptOption("s", "steps", "N", values.steps, "sampling steps, 1 to 1000"),
        PromptOption(
            "d", "seeds", "SEED[,SEED...]", values.seeds, "a seed for each picture: 1,2,3 or 5-8 (-1: a new one)"
        ),
        PromptOption("sampler", "sampler", "NAME", sampler_name, "sampler, by any of its names"),
        PromptOption("schedule", "schedule", "NAME", schedule_name, "schedule of the sampler"),
        PromptOption(
            "timesteps", "timesteps", "T,T,...", samplers.timesteps, "timesteps in place of a schedule, or none"
        ),
        PromptOption("eta", "eta", "SHARE", samplers.eta, "ddim and tcd: share of noise, or none for their own"),
        PromptOption("s_churn", "s_churn", "AMOUNT", samplers.s_churn, "euler: noise that is stirred in"),
        PromptOption("l", "guidance_scale", "SCALE", values.guidance_scale, "guidance scale"),
        PromptOption("t", "strength", "STRENGTH", values.strength, "img2img strength"),
        PromptOption(
            "am",
            "network_multipliers",
            "M[,M...]",
            parse_strengths,
            "a strength for each network; the last is the others', too",
        ),
        PromptOption(
            "nl", "negative_scale", "SCALE", values.number_or_none, "guidance scale of the negative prompt, or none"
        ),
        PromptOption("ig", "image_guidance", "SCALE", values.image_guidance, "edit models: guidance by the picture"),
        *_part(
            "gradual_latent",
            ("glt", "timesteps", "TIMESTEP", gradual_latent.timesteps_or_none, "Gradual Latent: timestep, or none"),
            ("glr", "ratio", "RATIO", gradual_latent.ratio, "Gradual Latent: first ratio"),
            ("gls", "ratio_step", "STEP", gradual_latent.ratio, "Gradual Latent: growth of the ratio"),
            ("gle", "every_n_steps", "N", gradual_latent.every_n_steps, "Gradual Latent: steps between growths"),
            ("glsn", "s_noise", "FACTOR", gradual_latent.s_noise, "Gradual Latent: noise of growing steps"),
            ("glus", "unsharp", "K,S,X[,T]", gradual_latent.unsharp, "Gradual Latent: unsharp masking, or none"),
        ),
        *_part(
            "deep_shrink",
            (
                "dsd1",
                "depth_1",
                "DEPTH",
                deep_shrink.depth_or_none,
                "Deep Shrink: first depth, 0 to 3 (XL: 8), or none",
            ),
            ("dst1", "timesteps_1", "TIMESTEP", deep_shrink.timesteps, "Deep Shrink: last timestep at that depth"),
            ("dsd2", "depth_2", "DEPTH", deep_shrink.depth_or_none, "Deep Shrink: second depth, or none"),
            ("dst2", "timesteps_2", "TIMESTEP", deep_shrink.timesteps, "Deep Shrink: last timestep at that depth"),
            ("dsr", "ratio", "RATIO", deep_shrink.ratio, "Deep Shrink: ratio"),
        ),
        *_part(
            "sizes",
            ("ow", "original_width", "PIXELS", sizes.pixels, "XL: width of the original that the model is told"),
            ("oh", "original_height", "PIXELS", sizes.pixels, "XL: its height"),
            ("nw", "original_width_negative", "PIXELS", sizes.pixels, "XL: its width for the negative prompt"),
            ("nh", "original_height_negative", "PIXELS", sizes.pixels, "XL: its height for the negative prompt"),
            ("ct", "crop_top", "PIXELS", sizes.pixels, "XL: where the original was cropped, from its top"),
            ("cl", "crop_left", "PIXELS", sizes.pixels, "XL: where it was cropped, from its left"),
        ),
        PromptOption("c", "clip_prompt", "TEXT", str.strip, "text for CLIP guidance, in place of the prompt"),
        PromptOption("f", "file_name", "NAME", picture_name, "name of the picture's file, in the folder of the run"),
    )
}

OPTION_START = re.compile(r"(?:^|(?<=\s))--")
_LONG_DASH_OPTION = re.compile(rf"(?:^|\s)([—–―]({'|'.join(PROMPT_OPTIONS)}))\s", re.IGNORECASE)


@dataclass(frozen=True)
class PromptLine:
    """A prompt line taken apart.

    Args:
        prompt: without its options.
        settings: what these set, by `PromptOption.sets`.
        warnings: doubts about it.
        networks: those that it uses beside the tags in its prompt, by name; they are looked for as the tags' are.
    """

    prompt: str
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    networks: tuple[tuple[str, Strength], ...] = ()


def one_line(text: str) -> str:
    """The text with its line breaks as spaces; only CR and LF are line breaks in a prompt file."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text).strip()


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a job file's row, in the prompt line that the row became."""

    start: int  # of it, in the prompt line
    column: str  # as the file calls it
    option: str  # that it is for; empty for the prompt


def place_of(where: str, start: int, cells: Sequence[Cell] = ()) -> str:
    """The place of a character of a prompt line, for messages: its column, or in a job file that of its cell."""
    column = next((cell.column for cell in reversed(cells) if cell.start <= start), start + 1)
    return f"{where}, column {column}" if where else f"column {column}"


def parse_prompt_line(line: str, where: str = "", cells: Sequence[Cell] = ()) -> PromptLine:
    """Cut `prompt --x value --y value` into the prompt and its options.

    Args:
        line: the line, with its choices made.
        where: its place.
        cells: those of the row that it was in a job file.

    Raises:
        InputError: for an unknown option, one given twice, and a value that its option refuses, with line and column.
    """
    starts = [match.start() for match in OPTION_START.finditer(line)]
    ends = [*starts[1:], len(line)]
    settings: dict[str, object] = {}
    for start, end in zip(starts, ends):
        place = place_of(where, start, _cells_of(line, start, cells))
        option, value = _parse_option(line[start:end].strip(), place)
        if option.sets in settings:
            raise InputError(f"--{option.name}", "given twice in one prompt; keep one of them", place)
        settings[option.sets] = value
    prompt = line[: starts[0]] if starts else line
    warnings = tuple(
        f"{where + ': ' if where else ''}{match[1]!r} is taken as text; an option begins with two hyphens: --{match[2]}"
        for match in _LONG_DASH_OPTION.finditer(line)
    )
    return PromptLine(prompt.strip(), settings, warnings)


def seeds_of(line: str) -> tuple[int, ...]:
    """The seeds that a line names, its choices made or not; none where they cannot be read, which is told later."""
    for option in OPTION_START.split(line)[1:]:
        name, _, value = option.partition(" ")
        if name.lower() == "d":
            with suppress(ArgumentTypeError):
                return values.seeds(value)
    return ()


def _cells_of(line: str, start: int, cells: Sequence[Cell]) -> Sequence[Cell]:
    """The cell that an option is in: its own, else the prompt's; choices in cells move where they begin."""
    if not cells:
        return ()
    name = line[start + 2 :].split(maxsplit=1)[:1]
    own = [replace(cell, start=0) for cell in cells if [cell.option] == name]
    return own or cells[:1]


def _parse_option(text: str, place: str) -> tuple[PromptOption, object]:
    """Convert one `--name value`; the name counts in either case."""
    match = re.fullmatch(r"--(\S*)\s*(.*)", text, re.DOTALL)  # fits whatever begins with two hyphens
    name, raw_value = match.groups() if match else (text, "")
    option = PROMPT_OPTIONS.get(name.lower())
    if option is None:
        hint = meant_in_line(name) or "--help lists them"
        raise InputError(f"--{name}", f"no such prompt option; {hint}", place)
    if not raw_value.strip() and option.name != "n":
        raise InputError(f"--{option.name}", f"needs a value; write --{option.name} {option.metavar}", place)
    try:
        return option, option.convert(raw_value)
    except ArgumentTypeError as problem:
        raise InputError(f"--{option.name} {raw_value.strip()}", str(problem), place) from None
