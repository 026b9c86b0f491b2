"""Contact sheets: small pictures in a grid with labels, one sheet for each prompt, or prompts by seeds."""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.files.pictures import opened
from library.results.made_picture import MadePicture

if TYPE_CHECKING:  # imported where sheets are drawn
    from PIL import Image, ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

SMALLEST_CELL_PX, LARGEST_CELL_PX = 128, 256  # the side of the square that a picture stands in
MAX_CELLS = 100  # on one sheet
_GAP_PX, _TEXT_PX = 8, 14
_LINE_PX = _TEXT_PX + 4


@dataclass(frozen=True)
class Sheet:
    """One sheet: rows of pictures (None leaves a place free), what stands above them and left of each row."""

    title: str
    rows: Sequence[Sequence[MadePicture | None]]
    row_labels: Sequence[str] = ()

    @property
    def first(self) -> MadePicture:
        """Its first picture."""
        return next(picture for row in self.rows for picture in row if picture is not None)

    @property
    def cell_px(self) -> int:
        """The side of the squares: that of the largest picture, within bounds."""
        jobs = [picture.job for row in self.rows for picture in row if picture is not None]
        longest = max(max(job.file_size) for job in jobs)
        return min(max(longest, SMALLEST_CELL_PX), LARGEST_CELL_PX)


def sheets_by_prompt(pictures: Iterable[MadePicture]) -> Iterator[Sheet]:
    """A sheet for each prompt line, more where its pictures are many."""
    by_line: dict[tuple[str, str], list[MadePicture]] = {}
    for picture in pictures:
        by_line.setdefault((picture.job.where, picture.job.raw_prompt), []).append(picture)
    for (_, line), made in by_line.items():
        for start in range(0, len(made), MAX_CELLS):
            part = made[start : start + MAX_CELLS]
            columns = math.ceil(math.sqrt(len(part)))
            yield Sheet(line, [part[at : at + columns] for at in range(0, len(part), columns)])


def sheets_by_seed(pictures: Iterable[MadePicture]) -> Iterator[Sheet]:
    """Prompt lines by seeds, for runs whose iterations have one seed each; parted where there are many."""
    table: dict[str, dict[int, MadePicture]] = {}
    for picture in pictures:
        table.setdefault(picture.job.raw_prompt, {})[picture.job.seed] = picture
    seeds = list(dict.fromkeys(seed for row in table.values() for seed in row))
    for first in range(0, len(seeds), 10):
        columns = seeds[first : first + 10]
        lines = [line for line in table if any(seed in table[line] for seed in columns)]
        for start in range(0, len(lines), MAX_CELLS // 10):
            labels = lines[start : start + MAX_CELLS // 10]
            yield Sheet("", [[table[line].get(seed) for seed in columns] for line in labels], labels)


def draw_sheet(sheet: Sheet) -> bytes:
    """A sheet as the content of a PNG file."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_TEXT_PX)
    columns, cell_px = max(map(len, sheet.rows)), sheet.cell_px
    label_px = cell_px if sheet.row_labels else 0
    width = label_px + columns * (cell_px + _GAP_PX) + _GAP_PX
    title = wrap(sheet.title, font, width - 2 * _GAP_PX, 6)
    cell_height = cell_px + _LINE_PX + _GAP_PX
    top = _GAP_PX + len(title) * _LINE_PX
    canvas = Image.new("RGB", (width, top + len(sheet.rows) * cell_height), "white")
    draw = ImageDraw.Draw(canvas)
    _write(draw, (_GAP_PX, _GAP_PX // 2), title, font)
    for number, row in enumerate(sheet.rows):
        y = top + number * cell_height
        if sheet.row_labels:
            _write(
                draw, (_GAP_PX, y), wrap(sheet.row_labels[number], font, label_px - _GAP_PX, cell_px // _LINE_PX), font
            )
        for place, picture in enumerate(row):
            if picture is not None:
                x = label_px + _GAP_PX + place * (cell_px + _GAP_PX)
                small = _small(picture.file, cell_px)
                canvas.paste(small, (x + (cell_px - small.width) // 2, y + (cell_px - small.height) // 2))
                draw.text((x, y + cell_px + 1), f"seed {picture.job.seed}", "black", font)
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    return stream.getvalue()


def _small(file: Path, side_px: int) -> "Image.Image":
    from PIL import Image

    with opened(file, str(file)) as picture:
        picture.draft("RGB", (side_px, side_px))
        small = picture.convert("RGB")
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return small


def _write(draw: "ImageDraw.ImageDraw", place: tuple[int, int], lines: Sequence[str], font: "Font") -> None:
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * _LINE_PX), line, "black", font)


def wrap(text: str, font: "Font", width_px: int, most: int) -> list[str]:
    """Break a text into at most so many lines of a width, at spaces where there are any; the last tells of a cut."""
    lines: list[str] = []
    rest = text
    while rest and len(lines) < most:
        fitting = _fitting(rest, font, width_px)
        end = fitting if fitting == len(rest) else rest.rfind(" ", 1, fitting + 1)
        end = end if end > 0 else fitting
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-1] + "…"
    return lines


def _fitting(text: str, font: "Font", width_px: int) -> int:
    """How many of a text's characters fit into a width, at least one."""
    low, high = 1, min(len(text), width_px)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width_px else (low, middle - 1)
    return low
