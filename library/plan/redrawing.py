"""`--from_pictures`: pictures drawn again as their metadata tells. Options that are given win over what it tells."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.errors import InputError, InputErrors
from library.files.model_files import name_of
from library.files.pictures import find_pictures
from library.plan.file_names import beside_others
from library.plan.redrawn_lines import LineMaker
from library.plan.redrawn_run import drawn_with, run_arguments
from library.plan.sources import SourceLine
from library.recipes.reading import PROGRAMS, read_recipe
from library.recipes.recipe import Recipe, Unreadable
from library.settings.options import Options

logger = logging.getLogger(__name__)

OPTION = "--from_pictures"
_MOST_NAMED = 12  # things in a line of what is not taken over


@dataclass
class Notes:
    """What is told of many pictures in one line each."""

    untold: dict[str, list[Path]] = field(default_factory=dict)  # what cannot be taken over → of which pictures
    faults: dict[str, list[Path]] = field(default_factory=dict)  # why pictures cannot be drawn again → which

    def lose(self, what: str, path: Path) -> None:
        """Note what of a picture's making is not taken over."""
        paths = self.untold.setdefault(what, [])
        if path not in paths:
            paths.append(path)

    def refuse(self, problem: str, path: Path) -> None:
        """Note why a picture cannot be drawn again."""
        self.faults.setdefault(problem, []).append(path)

    def tell(self) -> None:
        """Warn of what is not taken over, in one line.

        Raises:
            InputError: when there are pictures that cannot be drawn again.
        """
        faults = [InputError(f"{OPTION} {_all_of(paths)}", problem) for problem, paths in self.faults.items()]
        if faults:
            raise faults[0] if len(faults) == 1 else InputErrors(faults)
        if self.untold:
            named = [f"{what} ({_all_of(paths)})" for what, paths in list(self.untold.items())[:_MOST_NAMED]]
            if more := len(self.untold) - len(named):
                named.append(f"and {more} more")
            logger.warning("%s: not taken over: %s", OPTION, "; ".join(named))


def _all_of(paths: Sequence[Path]) -> str:
    """Several pictures by the first of them and their number."""
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} other{'s' * (len(paths) > 2)}"


def redrawn(options: Options) -> tuple[Options, list[SourceLine]]:
    """The options with those that the pictures tell, and a prompt line for each picture; none without any.

    Raises:
        InputError: for pictures without metadata that can be read, and such as cannot be drawn in one run.
    """
    if not options.from_pictures:
        return options, []
    options.check_alternatives()
    notes = Notes()
    told = _read_all(options, notes)
    if notes.faults:
        notes.tell()
    maker = LineMaker(options, notes)
    lines = [maker.line(path, recipe, size) for path, (recipe, size) in told.items()]
    recipes = {path: recipe for path, (recipe, _) in told.items()}
    arguments = run_arguments(options, recipes, notes)
    notes.tell()
    _tell_models(options, recipes)
    return options.with_added(arguments), lines


def _read_all(options: Options, notes: Notes) -> dict[Path, tuple[Recipe, tuple[int, int]]]:
    """How each of the pictures was made, and its width and height in pixels."""
    given = [_found(each, options) for each in options.from_pictures]
    told: dict[Path, tuple[Recipe, tuple[int, int]]] = {}
    for path in dict.fromkeys(path for paths in given for path in paths):
        try:
            recipe, (width, height) = read_recipe(path, f"{OPTION} {path}")
            if not (recipe.width or recipe.height or "image_path" in options.said):
                recipe = replace(recipe, width=str(width), height=str(height))
            told[path] = recipe, (width, height)
        except Unreadable as problem:
            notes.refuse(
                f"{problem}; leave it out, or give a picture of {', '.join(PROGRAMS[:-1])} or {PROGRAMS[-1]}", path
            )
    return told


def _found(given: str, options: Options) -> list[Path]:
    """The pictures that a path means; of a folder or glob without what this program has put beside them."""
    paths = [found.path for found in find_pictures(given, OPTION, natural=options.natural_order)]
    folders: dict[Path, list[str]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path.name)
    beside = {folder / name for folder, names in folders.items() for name in beside_others(names)}
    if beside:
        logger.info(
            "%s: first stages, guides and sheets are passed over: %d file%s",
            OPTION,
            len(beside),
            "s" * (len(beside) > 1),
        )
    return [path for path in paths if path not in beside]


def _tell_models(options: Options, recipes: Mapping[Path, Recipe]) -> None:
    """Name the models that pictures were made with, where they are not the one that draws."""
    model = name_of(options.ckpt)
    others = Counter(recipe.model for recipe in recipes.values() if not drawn_with(model, recipe))
    if others:
        named = ", ".join(f"{name} ({count})" for name, count in others.most_common(_MOST_NAMED))
        logger.warning("%s: made with other models than --ckpt %s: %s", OPTION, options.ckpt, named)
