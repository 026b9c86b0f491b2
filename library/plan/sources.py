"""Where a run's prompt lines come from, and the pictures that it starts from and is guided by."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from library.errors import InputError
from library.files.pictures import Found, check_picture, find_pictures, read_drawn, region_color
from library.files.text_files import LINE_END, read_text
from library.plan.canvas import blurred, oriented_mask
from library.plan.job import SweepCell
from library.plan.job_files import is_job_file, read_rows
from library.plan.picture_prompts import read_prompt
from library.plan.prompt_lines import OPTION_START, Cell, PromptLine, one_line
from library.plan.prompt_syntax import SD_SCRIPTS, WEB_UI, without_comments
from library.settings.control_net import given_files
from library.settings.masks import NO_MARGINS, Margins, MaskSettings
from library.settings.options import Options
from library.values import MAX_SIZE_PX

logger = logging.getLogger(__name__)

Thing = TypeVar("Thing")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """A picture for img2img and its upright size in pixels."""

    path: Path
    width: int
    height: int

    def extended(self, by: Margins | None) -> tuple[int, int]:
        """Its width and height with borders."""
        left, top, right, bottom = by or NO_MARGINS
        return left + self.width + right, top + self.height + bottom


@dataclass(frozen=True)
class Sources:
    """The pictures that a run starts from and is guided by.

    Image k takes picture k, mask k and the k-th `guides_per_picture` guides, counting round and round.
    """

    pictures: tuple[SourcePicture, ...] = ()
    masks: tuple[Path, ...] = ()
    guides: tuple[Path, ...] = ()
    guides_per_picture: int = 1
    lacking: Mapping[Path, Sequence[int]] = field(default_factory=dict)  # parts whose colour a map lacks, from 0

    @property
    def files(self) -> list[Path]:
        """All of them."""
        return [*(picture.path for picture in self.pictures), *self.masks, *self.guides]

    def guides_of(self, place: int) -> tuple[Path, ...]:
        """The guides of image number `place`."""
        first = place * self.guides_per_picture
        places = range(first, first + self.guides_per_picture) if self.guides else ()
        return tuple(self.guides[place % len(self.guides)] for place in places)


NO_SOURCES = Sources()


def in_turn(things: Sequence[Thing], place: int) -> Thing | None:
    """The thing at a place, counting round and round."""
    return things[place % len(things)] if things else None


def find_sources(options: Options, settings: MaskSettings) -> Sources:
    """Find and check the pictures that img2img starts from, their masks, and the pictures that guide.

    Args:
        options: name them.
        settings: how masks are read.

    Raises:
        InputError: for one that is not there or cannot be used.
    """
    pictures = []
    if options.image_path is not None:
        for found in _found(options.image_path, "--image_path", options):
            pictures.append(SourcePicture(found.path, *_check(found, "--image_path", options)))
    if settings.extend:
        _check_canvas(pictures, settings.extend, any_size=options.allow_large_pictures)
    masks, lacking = _find_masks(options, pictures, settings), {}
    if (codes := options.network_regional_mask_max_color_codes) is not None:
        lacking = {mask: _lacking_colors(mask, codes) for mask in masks}
    guides = _find_guides(options, pictures)
    return Sources(tuple(pictures), tuple(masks), guides, max(1, len(given_files(options))), lacking)


def _found(given: str, option: str, options: Options) -> list[Found]:
    return find_pictures(given, option, natural=options.natural_order)


def _check(found: Found, option: str, options: Options) -> tuple[int, int]:
    return check_picture(found.path, option, where=found.where, any_size=options.allow_large_pictures)


def _check_canvas(pictures: Sequence[SourcePicture], extend: Margins, *, any_size: bool) -> None:
    """Refuse borders that make pictures larger than any may be."""
    for picture in pictures:
        width, height = picture.extended(extend)
        if max(width, height) > MAX_SIZE_PX and not any_size:
            problem = f"makes {picture.path.name} {width} x {height} pixels, more than {MAX_SIZE_PX} a side; add less"
            raise InputError(f"--extend {','.join(map(str, extend))}", problem)


def _find_masks(options: Options, pictures: Sequence[SourcePicture], settings: MaskSettings) -> list[Path]:
    """Find and check the masks: files, or the pictures themselves."""
    if settings.from_alpha:
        for picture in pictures:
            if _is_empty(picture.path, settings):
                what = "is transparent all over" if settings.invert else "has nothing transparent"
                problem = f"{what}, so that nothing would be redrawn; give another, or --mask_path"
                raise InputError(f"--image_path {picture.path}", problem)
        return [picture.path for picture in pictures]
    masks = _found(options.mask_path, "--mask_path", options) if options.mask_path is not None else []
    if len(pictures) > 1 and len(masks) not in (0, 1, len(pictures)):
        problem = f"{len(masks)} masks for {len(pictures)} pictures"
        if not options.resume:
            raise InputError(f"--mask_path {options.mask_path}", f"{problem}; give one for all, or one for each")
        logger.warning("--mask_path %s: %s, gone through round and round", options.mask_path, problem)
    for place, mask in enumerate(masks):
        size = _check(mask, "--mask_path", options)
        if picture := in_turn(pictures, place):
            _check_shape(mask.path, size, picture)
        _check_mask(mask.path, settings)
    return [mask.path for mask in masks]


def _check_shape(mask: Path, size: tuple[int, int], picture: SourcePicture) -> None:
    """Warn of a mask that is stretched over its picture."""
    stretched = size[0] * picture.height / (size[1] * picture.width)
    if not 1 / _SAME_SHAPE < stretched < _SAME_SHAPE:
        shapes = f"is {size[0]} x {size[1]} pixels and is stretched over {picture.path.name}"
        logger.warning("--mask_path %s: %s, %d x %d", mask, shapes, picture.width, picture.height)


_SAME_SHAPE = 1.05  # how far shapes may differ that are meant to be the same


def _is_empty(mask: Path, settings: MaskSettings) -> bool:
    """Whether a mask redraws nothing.

    Raises:
        InputError: when that is because of its blur.
    """
    drawn = oriented_mask(mask, settings)
    if drawn.getextrema()[1] == 0:
        return True
    if blurred(drawn, settings).getextrema()[1] == 0:
        raise InputError(f"--mask_blur {settings.blur_px:g}", f"leaves nothing of {mask}; blur it less")
    return False


def _check_mask(path: Path, settings: MaskSettings) -> None:
    """Warn of a mask that redraws nothing."""
    if _is_empty(path, settings):
        what = "white" if settings.invert else "black"
        if not settings.invert and not read_drawn(path, "--mask_path").getchannel("A").getbbox():
            what = "clear"
        problem = f"is {what} all over, so that nothing is repainted, and every region is the whole picture"
        logger.warning("--mask_path %s: %s", path, problem)


def _lacking_colors(path: Path, color_codes: int) -> list[int]:
    """The parts, from 0, whose pure colour a map does not have.

    Raises:
        InputError: when it has none of them.
    """
    import numpy as np

    pixels = np.asarray(read_drawn(path, "--mask_path")).reshape(-1, 4)
    seen = pixels[pixels[:, 3] > 0, :3]
    wanted = [region_color(part) for part in range(color_codes)]
    lacking = [part for part, color in enumerate(wanted) if not (seen == color).all(axis=1).any()]
    if len(lacking) == color_codes:
        listed = ", ".join(map(str, wanted))
        problem = f"has none of the pure colours {listed}; draw regions in them, without soft edges, as PNG"
        raise InputError(f"--mask_path {path}", problem)
    return lacking


def _find_guides(options: Options, sources: Sequence[SourcePicture]) -> tuple[Path, ...]:
    """Find the guide pictures, and check those that are not among the source pictures, which are checked already."""
    option = "--guide_image_path"
    guides = [found for given in options.guide_image_path or () for found in _found(given, option, options)]
    checked = {source.path for source in sources}
    for found in guides:
        if found.path not in checked:
            checked.add(found.path)
            _check(found, option, options)
    if (nets := len(given_files(options))) and not guides:
        name = "control_net_models" if options.control_net_models else "control_net_lllite_models"
        raise InputError(f"--{name}", "draws after a guide picture; give --guide_image_path too")
    if nets and len(guides) > 1 and len(guides) % nets:
        problem = f"{len(guides)} pictures for {nets} ControlNets; give one, or as many for each ControlNet"
        raise InputError("--guide_image_path", problem)
    return tuple(found.path for found in guides)


# ---------------------------------------------------------------------------------------------------------------------
# Prompt lines


@dataclass(frozen=True, slots=True)
class SourceLine:
    """One raw prompt line, without line breaks, and its place, for messages ("" for one from the command line).

    A line from a picture's metadata comes `parsed`, and belongs to that picture (its place among the sources).
    """

    text: str
    where: str = ""
    parsed: PromptLine | None = None
    picture: int | None = None
    cells: tuple[Cell, ...] = ()  # of the row that it was in a job file
    cell: SweepCell | None = None  # of a sweep, where it is one of a line's combinations


def source_lines(options: Options, sources: Sources) -> list[SourceLine]:
    """The prompt lines of the run; without any, those in the metadata of the source pictures.

    Raises:
        InputError: when there are none, or they cannot be read.
    """
    if options.interactive:
        return []
    if options.from_file is None and options.prompt is None and options.image_path is None:
        raise InputError("--prompt", "is missing; give --prompt TEXT, --from_file FILE or --interactive")
    if options.from_file is not None:
        return read_prompt_file(options.from_file, options.prompt_syntax)
    if options.prompt is not None:
        return [typed_line(options.prompt, "--prompt", options.prompt_syntax)]
    lines = []
    for number, picture in enumerate(sources.pictures):
        parsed = read_prompt(picture.path)
        lines.append(SourceLine(parsed.prompt, str(picture.path), parsed, number))
    return lines


_ROWS = "write one prompt a line (.txt), or rows (.jsonl, .csv)"
_NO_PROMPT_FILES = {
    **dict.fromkeys((".yaml", ".yml"), f"{_ROWS}; a list for __name__ belongs below --wildcard_dir"),
    ".toml": f"{_ROWS}; options from a file are for --config",
    ".json": "write an object for each picture, one a line, into a .jsonl file",
    **dict.fromkeys((".xlsx", ".ods"), "save the table as .csv"),
    **dict.fromkeys(
        (".png", ".jpg", ".jpeg", ".webp"), "a picture is for --image_path, or drawn again by --from_pictures"
    ),
}


def read_prompt_file(path: str, syntax: str = SD_SCRIPTS) -> list[SourceLine]:
    """Read a prompt file, or standard input for `-`: one prompt a line, blank lines and `#` comments skipped.

    A file that ends in `.jsonl` or `.csv` is a job file (see `job_files`).

    Raises:
        InputError: when it cannot be read, is not UTF-8, holds a NUL, or holds no prompt.
    """
    subject, name = f"--from_file {path}", "standard input" if path == "-" else path
    if advice := _NO_PROMPT_FILES.get(Path(path).suffix.lower()):
        raise InputError(subject, f"is no prompt file, of which each line is a prompt; {advice}")
    text = read_text(path, subject)
    clean = without_comments if syntax == WEB_UI else str
    if is_job_file(path):
        rows = read_rows(text, path, clean)
        if not rows:
            raise InputError(subject, "holds no row; write one for each prompt")
        return [SourceLine(row.text, row.where, cells=row.cells) for row in rows]
    lines = []
    for number, line in enumerate(map(clean, LINE_END.split(text)), start=1):
        if line.strip() and not line.startswith("#"):
            lines.append(SourceLine(line, f"{name}:{number}"))
    if not lines:
        raise InputError(subject, "holds no prompt, only blank lines and comments; write one prompt a line")
    return lines


def typed_line(text: str, subject: str, syntax: str) -> SourceLine:
    """A prompt line from the command line or the keyboard; line breaks within it, as in wrapped commands, are spaces.

    Raises:
        InputError: when it is not UTF-8, or holds a NUL.
    """
    try:
        text = os.fsencode(text).decode("utf-8")  # whatever the locale's encoding is
    except UnicodeError:
        raise InputError(subject, "the text is not UTF-8; set the terminal to UTF-8") from None
    if "\0" in text:
        raise InputError(subject, "the text holds a NUL character; leave it out")
    return SourceLine(one_line(without_comments(text) if syntax == WEB_UI else text))


def run_negative(text: str | None, syntax: str) -> str:
    """The negative prompt of all lines that have none, before its choices are made.

    Raises:
        InputError: when it is no text, or holds options as prompt lines do.
    """
    negative = typed_line(text or "", "--negative_prompt", syntax).text
    if match := OPTION_START.search(negative):
        problem = "takes the text of a negative prompt alone; take the options out of it"
        raise InputError(f"--negative_prompt, {negative[match.start() :][:40]!r}", problem)
    return negative
