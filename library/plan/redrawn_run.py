"""What recipes say of a whole run: options of the command line that all pictures have to share."""

from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path

from library.errors import InputError
from library.files.model_files import name_of
from library.plan.redrawn_lines import Notes
from library.plan.stages import first_side
from library.recipes.recipe import GUIDE, PLAIN, Recipe, number
from library.settings.options import Options
from library.values import PIXELS_PER_CELL

_SCALE = "highres_fix_scale"
_ZERO_SNR = "zero_terminal_snr"
_OF_MODEL = ("v_parameterization", _ZERO_SNR)  # which say of a model how it was trained
_OF_CONTROL_NETS = tuple(f"control_net_{of_each}" for of_each in ("types", "weights", "starts", "ratios", "preps"))
# Beside what `needs` of the options says
_NEEDS = {
    "inpaint_padding": "inpaint_area",
    "inpaint_regions": "inpaint_area",
    "clip_image_guidance_scale": GUIDE[0],
    "vgg16_guidance_scale": GUIDE[0],
    "vgg16_guidance_layer": "vgg16_guidance_scale",
    "tile_overlap": "tile",
}


def run_arguments(options: Options, recipes: Mapping[Path, Recipe], notes: Notes) -> list[str]:
    """The arguments that recipes put before a command line.

    Raises:
        InputError: when pictures differ in what a run has once.
    """
    said = {path: _of_picture(options, recipe) for path, recipe in recipes.items()}
    model = name_of(options.ckpt)
    for path, told in said.items():
        lost: dict[str, str] = {}
        if not drawn_with(model, recipes[path]):
            lost |= dict.fromkeys(_OF_MODEL, "another model needs it")
        if not _steered_by_given(options, told, recipes[path].control_nets):
            lost |= dict.fromkeys(_OF_CONTROL_NETS, "other ControlNets have it")
        for name in filter(told.__contains__, lost):
            notes.lose(f"{f'--{name} {told.pop(name)}'.rstrip()}, as {lost[name]}", path)
    if any(_ZERO_SNR in told for told in said.values()):
        # what a model's files say was told like the option once; to give that besides changes nothing
        for path in (path for path in said if recipes[path].zero_snr_of_model):
            said[path][_ZERO_SNR] = ""
    arguments: list[str] = []
    for name in sorted({name for told in said.values() for name in told}):
        values = {path: told.get(name) for path, told in said.items()}
        if len(set(values.values())) > 1:
            raise _differ(name, values)
        text = next(iter(values.values()))
        try:
            if text is not None and options.takes(name, text):
                several = options.takes_several(name)
                arguments += [f"--{name}", *text.split()] if several else [f"--{name}={text}" if text else f"--{name}"]
        except ArgumentTypeError as problem:
            for path in said:
                notes.lose(f"--{name} {text} ({str(problem).partition(';')[0]})", path)
    if f"--{_SCALE}=1" in arguments:
        arguments[arguments.index(f"--{_SCALE}=1")] = f"--{_SCALE}={_scale(recipes, notes):.6g}"
    return arguments


def drawn_with(model: str, recipe: Recipe) -> bool:
    """Whether a picture was made with a model, as far as its name tells."""
    return recipe.model.casefold() in ("", model.casefold())


def _steered_by_given(options: Options, told: Mapping[str, str], names: tuple[str, ...]) -> bool:
    """Whether a picture's ControlNets, by name, are the command line's, of which one may be for several kinds."""
    given = tuple(map(name_of, options.control_net_models or options.control_net_lllite_models or ()))
    several_kinds = "control_net_types" in told or options.control_net_types
    return names == given or bool(len(given) == 1 and set(names) == set(given) and several_kinds)


def _of_picture(options: Options, recipe: Recipe) -> dict[str, str]:
    """What a recipe says of the run, as far as the command line leaves it open; a first stage as a scale of 1."""
    told = {name: text for name, text in recipe.run.items() if text != "0" or name in _OF_CONTROL_NETS}
    if recipe.syntax != PLAIN:
        told["prompt_syntax"] = recipe.syntax
    if recipe.first_stage is not None and recipe.width and recipe.height:
        told[_SCALE] = "1"
    if "image_path" in options.said:
        told = {name: text for name, text in told.items() if not name.startswith("highres_fix")}
    while True:  # what is left out may be what others need
        beside = set(told)
        kept = {
            name: text
            for name, text in told.items()
            if options.is_free(name, beside) and _has_need(options, name, beside)
        }
        if len(kept) == len(told):
            return kept
        told = kept


def _has_need(options: Options, name: str, beside: set[str]) -> bool:
    need = _NEEDS.get(name)
    return need is None or need in beside or need in options.said


def _differ(name: str, values: Mapping[Path, str | None]) -> InputError:
    """Tells that pictures differ in an option, each value with its first picture and how many there are."""
    groups: dict[str | None, list[Path]] = {}
    for path, text in values.items():
        groups.setdefault(text, []).append(path)
    shown = []
    for text, paths in list(groups.items())[:4]:
        how = f"without --{name}" if text is None else f"with --{name}{f' {text}' if text and name != _SCALE else ''}"
        shown.append(f"{len(paths)} {how} ({paths[0]})")
    advice = "draw them in runs of their own" + ("" if name == _SCALE else f", or give --{name}")
    return InputError(
        "--from_pictures", f"pictures of one run share an option that these differ in: {', '.join(shown)}; {advice}"
    )


def _scale(recipes: Mapping[Path, Recipe], notes: Notes) -> float:
    """The scale of Highres. fix that gives all pictures their first stages; the nearest where none does.

    Raises:
        InputError: when the pictures' first stages are of different scales.
    """
    stages = {
        path: (_cells(recipe.width), _cells(recipe.height), *recipe.first_stage)
        for path, recipe in recipes.items()
        if recipe.first_stage is not None
    }
    wanted = list(stages.values())
    for digits in (1, 2, 3):
        for step in range(1, 10**digits + 1):
            if all(_fits(step / 10**digits, *sizes) for sizes in wanted):
                return step / 10**digits
    shares = {path: first_width / width for path, (width, _, first_width, _) in stages.items()}
    if max(shares.values()) - min(shares.values()) > _SAME_SHARE:
        texts: dict[Path, str | None] = {path: f"{share:.3g}" for path, share in shares.items()}
        problem = "pictures of one run share the scale of Highres. fix, and these have"
        listed = ", ".join(dict.fromkeys(text for text in texts.values() if text))
        raise InputError("--from_pictures", f"{problem} {listed}; draw them in runs of their own, or give --{_SCALE}")
    share = min(1.0, next(iter(shares.values())))
    for path, (width, height, first_width, first_height) in stages.items():
        here = f"{first_side(width, share)}x{first_side(height, share)}"
        notes.lose(f"first stage {first_width}x{first_height}, which is {here} here", path)
    return share


_SAME_SHARE = 0.02  # how far shares of rounded sizes may differ that are meant to be the same


def _fits(scale: float, width: int, height: int, first_width: int, first_height: int) -> bool:
    return (first_side(width, scale), first_side(height, scale)) == (first_width, first_height)


def _cells(side: str) -> int:
    """A told side in pixels as it is drawn."""
    value = int(number(side) or 0)
    return max(PIXELS_PER_CELL, value - value % PIXELS_PER_CELL)
