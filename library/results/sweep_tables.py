"""The pictures of a sweep as tables: its axes as rows, columns and tables below each other."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from library.plan.job import SweepCell
from library.plan.sweep import Sweep
from library.results.made_picture import MadePicture


@dataclass(frozen=True)
class Table:
    """Rows of pictures, None where one is missing; an axis that there is not has no name."""

    heading: str  # the value on the third axis, with that one's name
    row_axis: str
    row_labels: Sequence[str]
    column_axis: str
    column_labels: Sequence[str]
    rows: Sequence[Sequence[MadePicture | None]]

    @property
    def pictures(self) -> list[MadePicture]:
        """Those that are there."""
        return [picture for row in self.rows for picture in row if picture is not None]


@dataclass(frozen=True)
class PromptTables:
    """The tables of one prompt line, and the seed where all of its pictures have the same ("" where not)."""

    line: str
    seed: str
    tables: Sequence[Table]


_Key = tuple[str, str]  # an axis and a value on it
_Dimension = tuple[str, Sequence[tuple[_Key, str]]]  # an axis, and what stands on it with the label of each
_IMAGE = "\0image"  # the axis of pictures that differ by more than a sweep's values
_EMPTY = '""'  # the label of a text that is empty, as it is written on the command line
_NOTHING: _Key = ("", "")
_NONE: _Dimension = ("", [(_NOTHING, "")])


def sweep_tables(pictures: Iterable[MadePicture], sweep: Sweep) -> Iterator[PromptTables]:
    """The tables of each prompt line.

    One axis is a row; of several the first gives rows, the second columns, the third tables. Where a line has several
    pictures in each combination, they are an axis of their own, or beside three axes tables of their own.
    """
    by_line: dict[tuple[str, str], list[MadePicture]] = {}
    for picture in pictures:
        by_line.setdefault((picture.job.where, _cell(picture).line), []).append(picture)
    for made in by_line.values():
        named = {name for name, _ in _cell(made[0]).values}
        dimensions: list[_Dimension] = [
            (axis.name, [((axis.name, value), value or _EMPTY) for value in axis.values])
            for axis in sweep.axes
            if axis.name in named
        ]
        by_image: dict[int, list[MadePicture]] = {}
        for picture in made:
            by_image.setdefault(_cell(picture).image, []).append(picture)
        if len(by_image) == 1 or len(dimensions) == _MOST_DIMENSIONS:
            for of_image in by_image.values():
                yield _tables(of_image, dimensions)
        else:
            images = _images([of_image[0] for of_image in by_image.values()])
            yield _tables(made, [*dimensions, images] if len(dimensions) == 2 else [images, *dimensions])


_MOST_DIMENSIONS = 3


def _cell(picture: MadePicture) -> SweepCell:
    cell = picture.job.cell
    assert cell is not None  # in a sweep each has one
    return cell


def _images(pictures: Sequence[MadePicture]) -> _Dimension:
    """The axis of pictures that a line has several of in each combination; tells their prompts, where these differ."""
    prompts = {picture.job.prompt for picture in pictures}
    return "seed", [
        (
            (_IMAGE, str(_cell(picture).image)),
            f"{picture.job.seed}{f', {picture.job.prompt}' if len(prompts) > 1 else ''}",
        )
        for picture in pictures
    ]


def _tables(made: Sequence[MadePicture], dimensions: Sequence[_Dimension]) -> PromptTables:
    """The tables of pictures by at most three dimensions."""
    by_image = any(key[0] == _IMAGE for _, along in dimensions for key, _ in along)
    all_three = [*([_NONE] if len(dimensions) < 2 else []), *dimensions, _NONE, _NONE][:3]
    (row_axis, rows), (column_axis, columns), (table_axis, tables) = all_three
    places: dict[frozenset[_Key], MadePicture] = {}
    for picture in made:
        cell = _cell(picture)
        image = [(_IMAGE, str(cell.image))] if by_image else []
        places[frozenset([*cell.values, *image])] = picture

    def at(*keys: _Key) -> MadePicture | None:
        return places.get(frozenset(key for key in keys if key != _NOTHING))

    seeds = {picture.job.seed for picture in made}
    return PromptTables(
        _cell(made[0]).line,
        str(made[0].job.seed) if len(seeds) == 1 else "",
        [
            Table(
                f"{table_axis}: {heading}" if table_axis else "",
                row_axis,
                [label for _, label in rows],
                column_axis,
                [label for _, label in columns],
                [[at(row, column, table) for column, _ in columns] for row, _ in rows],
            )
            for table, heading in tables
        ],
    )
