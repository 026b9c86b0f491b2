"""Contact sheets: small pictures in a grid with labels; one for each prompt, prompts by seeds, or a sweep's tables."""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library.files.pictures import opened
from library.plan.sweep import Sweep
from library.results.captions import captions, differ_in_one_thing
from library.results.letters import Letters, warn_of_lacking
from library.results.made_picture import MadePicture
from library.results.sweep_tables import Table, sweep_tables

if TYPE_CHECKING:  # imported where sheets are drawn
    from PIL import Image, ImageDraw

    class Font(Protocol):
        """Whatever knows how wide texts are."""

        def getlength(self, text: str, /) -> float: ...


SMALLEST_CELL_PX, LARGEST_CELL_PX = 128, 256  # the longer side of what a picture stands in
MAX_CELLS = 100  # on one sheet
_MOST_COLUMNS, _MOST_IN_A_ROW = 10, 20  # of a sweep's table, and where it has but one row
_GAP_PX, _TEXT_PX = 8, 14
_LINE_PX = _TEXT_PX + 4
_MOST_TITLE, _MOST_LABEL, _MOST_CAPTION = 6, 3, 5  # lines


@dataclass(frozen=True)
class Block:
    """Rows of pictures (None leaves a place free), and what stands left of each row, above each column and all."""

    rows: Sequence[Sequence[MadePicture | None]]
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    heading: str = ""


@dataclass(frozen=True)
class Sheet:
    """One sheet: blocks below each other, the lines above them, and captions of pictures by their files."""

    title: Sequence[str]
    blocks: Sequence[Block]
    captions: Mapping[Path, Sequence[str]] = field(default_factory=dict)

    @property
    def pictures(self) -> list[MadePicture]:
        """All of its pictures."""
        return [picture for block in self.blocks for row in block.rows for picture in row if picture is not None]

    @property
    def cell_px(self) -> tuple[int, int]:
        """Width and height that pictures stand in: the shape of theirs, its longer side within bounds."""
        sizes = [picture.job.file_size for picture in self.pictures]
        width, height = max(width for width, _ in sizes), max(height for _, height in sizes)
        longest = max(width, height)
        scale = min(max(longest, SMALLEST_CELL_PX), LARGEST_CELL_PX) / longest
        return max(round(width * scale), SMALLEST_CELL_PX), max(round(height * scale), 1)


# ---------------------------------------------------------------------------------------------------------------------
# What stands on which sheet


def sheets_by_prompt(pictures: Iterable[MadePicture]) -> Iterator[Sheet]:
    """A sheet for each prompt line, more where its pictures are many; one for lines that differ in one option."""
    by_line: dict[tuple[str, str], list[MadePicture]] = {}
    for picture in pictures:
        by_line.setdefault((picture.job.where, picture.job.raw_prompt), []).append(picture)
    groups, columns = list(by_line.values()), 0
    titles = [line for _, line in by_line]
    if len(groups) > 1 and differ_in_one_thing(groups):
        columns = max(map(len, groups))
        groups, titles = [[picture for made in groups for picture in made]], [groups[0][0].job.prompt]
    for title, made in zip(titles, groups):
        for start in range(0, len(made), MAX_CELLS):
            part = made[start : start + MAX_CELLS]
            across = columns if 1 < columns <= _MOST_COLUMNS else math.ceil(math.sqrt(len(part)))
            block = Block([part[at : at + across] for at in range(0, len(part), across)])
            yield Sheet([title], [block], captions(part))


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
            rows = [[table[line].get(seed) for seed in columns] for line in labels]
            seeds_alone = {p.file: [f"seed {p.job.seed}"] for row in rows for p in row if p is not None}
            yield Sheet([], [Block(rows, labels)], seeds_alone)


def sheets_of_sweep(pictures: Iterable[MadePicture], sweep: Sweep) -> Iterator[Sheet]:
    """A sheet for each prompt line with all of its tables; several where they are too large for one."""
    for prompt in sweep_tables(pictures, sweep):
        title = [prompt.line, *([f"seed: {prompt.seed}"] if prompt.seed else [])]
        blocks: list[Block] = []
        for block in (part for table in prompt.tables for part in _parts(table)):
            if blocks and sum(map(_cells, [*blocks, block])) > MAX_CELLS:
                yield Sheet(title, blocks)
                blocks = []
            blocks.append(block)
        if blocks:
            yield Sheet(title, blocks)


def _cells(block: Block) -> int:
    return sum(map(len, block.rows))


def _parts(table: Table) -> Iterator[Block]:
    """A table, cut where it is too large; without parts that no picture stands in."""
    columns, rows = len(table.column_labels), len(table.row_labels)
    most = _MOST_IN_A_ROW if rows == 1 else _MOST_COLUMNS
    for top, bottom in _cut(rows, MAX_CELLS // min(columns, most)):
        for left, right in _cut(columns, most):
            part = [row[left:right] for row in table.rows[top:bottom]]
            if any(picture is not None for row in part for picture in row):
                row_labels = _named(table.row_axis, table.row_labels[top:bottom])
                yield Block(part, row_labels, _named(table.column_axis, table.column_labels[left:right]), table.heading)


def _named(axis: str, labels: Sequence[str]) -> Sequence[str]:
    return [f"{axis}: {label}" for label in labels] if axis else ()


def _cut(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a number of things into parts of much the same size, none larger than `most`; gives their ends."""
    parts = math.ceil(count / most)
    return pairwise(round(part * count / parts) for part in range(parts + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Drawn


def draw_sheet(sheet: Sheet) -> bytes:
    """A sheet as the content of a PNG file; letters that no font has are warned of."""
    from PIL import Image

    letters = Letters(_TEXT_PX)
    layout = _Layout(sheet, letters)
    canvas = Image.new("RGB", layout.size_px, "white")
    layout.draw(canvas)
    warn_of_lacking(letters, "--grid")
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    return stream.getvalue()


class _Layout:
    """Where everything on a sheet goes."""

    def __init__(self, sheet: Sheet, letters: Letters) -> None:
        self._sheet, self._letters = sheet, letters
        self._width_px, self._height_px = sheet.cell_px
        self._label_px = max(map(self._label_width, sheet.blocks))
        columns = max(len(row) for block in sheet.blocks for row in block.rows)
        width = self._label_px + columns * (self._width_px + _GAP_PX) + _GAP_PX
        self._title = [line for text in sheet.title for line in wrap(text, letters, width - 2 * _GAP_PX, _MOST_TITLE)]
        self._captions = {file: self._caption(texts) for file, texts in sheet.captions.items()}
        self._row_px = self._height_px + max(map(len, self._captions.values()), default=0) * _LINE_PX + _GAP_PX
        self._top_px = _GAP_PX + len(self._title) * _LINE_PX
        self.size_px = width, self._top_px + sum(map(self._block_height, sheet.blocks))

    def _label_width(self, block: Block) -> int:
        """How wide the labels of rows may be: as a picture, or where columns have some, too, no wider than they are."""
        if not block.row_labels or not block.column_labels:
            return self._width_px if block.row_labels else 0
        longest = max(map(self._letters.getlength, block.row_labels))
        return min(math.ceil(longest) + 2 * _GAP_PX, self._width_px)

    def _caption(self, texts: Sequence[str]) -> list[str]:
        return [line for text in texts for line in wrap(text, self._letters, self._width_px, 2)][:_MOST_CAPTION]

    def _labels(self, block: Block) -> list[list[str]]:
        return [wrap(label, self._letters, self._width_px, _MOST_LABEL) for label in block.column_labels]

    def _head_lines(self, block: Block) -> int:
        return bool(block.heading) + max(map(len, self._labels(block)), default=0)

    def _block_height(self, block: Block) -> int:
        return self._head_lines(block) * _LINE_PX + len(block.rows) * self._row_px

    def draw(self, canvas: "Image.Image") -> None:
        """Draw all of it."""
        from PIL import ImageDraw

        draw = ImageDraw.Draw(canvas)
        self._write(draw, (_GAP_PX, _GAP_PX // 2), self._title)
        top = self._top_px
        for block in self._sheet.blocks:
            self._draw_block(canvas, draw, block, top)
            top += self._block_height(block)

    def _draw_block(self, canvas: "Image.Image", draw: "ImageDraw.ImageDraw", block: Block, top: int) -> None:
        lefts = [self._label_px + _GAP_PX + at * (self._width_px + _GAP_PX) for at in range(max(map(len, block.rows)))]
        if block.heading:
            self._write(draw, (_GAP_PX, top), wrap(block.heading, self._letters, canvas.width - 2 * _GAP_PX, 1))
        for left, label in zip(lefts, self._labels(block)):
            self._write(draw, (left, top + bool(block.heading) * _LINE_PX), label)
        y = top + self._head_lines(block) * _LINE_PX
        for number, row in enumerate(block.rows):
            if block.row_labels:
                room = max(self._row_px // _LINE_PX - 1, 1)
                label = wrap(block.row_labels[number], self._letters, self._label_px - _GAP_PX, room)
                self._write(draw, (_GAP_PX, y), label)
            for left, picture in zip(lefts, row):
                if picture is not None:
                    small = _small(picture.file, (self._width_px, self._height_px))
                    canvas.paste(
                        small, (left + (self._width_px - small.width) // 2, y + (self._height_px - small.height) // 2)
                    )
                    self._write(draw, (left, y + self._height_px + 1), self._captions.get(picture.file, ()))
            y += self._row_px

    def _write(self, draw: "ImageDraw.ImageDraw", place: tuple[int, int], lines: Sequence[str]) -> None:
        for number, line in enumerate(lines):
            self._letters.draw(draw, (place[0], place[1] + number * _LINE_PX), line)


def _small(file: Path, size_px: tuple[int, int]) -> "Image.Image":
    from PIL import Image

    with opened(file, str(file)) as picture:
        picture.draft("RGB", size_px)
        small = picture.convert("RGB")
    small.thumbnail(size_px, Image.Resampling.LANCZOS)
    return small


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
