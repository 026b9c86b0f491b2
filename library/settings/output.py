"""Where pictures go, in which format, and what is made and told of them."""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

from library.errors import InputError
from library.files.picture_files import DEFAULT_QUALITY, FORMATS
from library.settings.file_names import NamePattern
from library.settings.options import Options


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What the user said of it."""

    folder: Path
    suffix: str = ".png"
    quality: int = DEFAULT_QUALITY  # of WebP and JPEG
    sequential_names: bool = False
    original_names: bool = False  # those of the source pictures
    name_pattern: NamePattern | None = None  # in place of the usual names
    sheets: bool = False
    page: bool = False
    as_json: bool = False  # standard output holds a JSON object for each picture, not its path alone


def picture_format(text: str) -> str:
    """Convert the name of a format of picture files."""
    name = {"jpeg": "jpg"}.get(text.lower(), text.lower())
    if name not in FORMATS:
        raise ArgumentTypeError(f"no such format; known are {', '.join(FORMATS)}")
    return name


def from_options(options: Options) -> OutputSettings:
    """What the options say of it.

    Raises:
        InputError: for a quality of a format that has none.
    """
    if options.quality is not None and options.format == "png":
        raise InputError("--quality", "is for WebP and JPEG, PNG loses nothing; give --format too, or leave it out")
    return OutputSettings(
        folder=options.outdir,
        suffix=f".{options.format}",
        quality=options.quality or DEFAULT_QUALITY,
        sequential_names=options.sequential_file_name,
        original_names=options.use_original_file_name,
        name_pattern=NamePattern.from_text(options.file_name) if options.file_name else None,
        sheets=options.grid,
        page=options.html,
        as_json=options.json,
    )
