"""A picture's recipe as a prompt line: values by the names of a line's options, each checked as if it were typed."""

import re
from argparse import ArgumentTypeError
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from library.errors import InputError
from library.plan.prompt_lines import PROMPT_OPTIONS, PromptLine, one_line
from library.plan.prompt_syntax import WEB_UI
from library.plan.prompt_syntax import read_prompt as take_apart
from library.plan.sources import SourceLine
from library.recipes.emphasis import without_networks
from library.recipes.recipe import Recipe, file_stem
from library.settings.options import Options
from library.settings.other_names import IN_LINES
from library.settings.sampler_names import NamedSampler, told_sampler, told_schedule
from library.settings.samplers import OWN, SAMPLERS
from library.values import FRESH_SEED, MAX_SEED, MAX_SIZE_PX, PIXELS_PER_CELL
from networks.files import FOLDER_STEMS
from networks.folder import NetworkFolder
from networks.strengths import Strength, parse_strength, parse_tag

# An option of the command line → what of a line it takes the place of, beside what is its own there
_ALSO = {
    "sampler": ("schedule", "timesteps", "eta", "s_churn"),
    "schedule": ("timesteps",),
    "timesteps": ("schedule", "s"),
    "steps": ("timesteps",),
}
_WORDS = {"s": "steps", "l": "scale", "t": "strength", "d": "seed", "w": "width", "h": "height"}


class Notes(Protocol):
    """What is told of many pictures at once; see `redrawing`."""

    def lose(self, what: str, path: Path) -> None:
        """Note what of a picture's making is not taken over."""

    def refuse(self, problem: str, path: Path) -> None:
        """Note why a picture cannot be drawn again."""


class LineMaker:
    """Makes prompt lines of recipes.

    Args:
        options: of the run.
        notes: of what is not taken over.
    """

    def __init__(self, options: Options, notes: Notes) -> None:
        self._options, self._notes = options, notes
        said = options.said
        self._given = {IN_LINES[name] for name in said if name in IN_LINES}
        self._given |= {other for name, others in _ALSO.items() if name in said for other in others}
        self._networks = _Networks(options, notes)

    def line(self, path: Path, recipe: Recipe, size: tuple[int, int]) -> SourceLine:
        """The line of a picture.

        Args:
            path: of the picture.
            recipe: how it was made.
            size: its width and height in pixels, where its recipe tells none.
        """
        texts = self._texts(path, recipe, size)  # what it says of them comes first: it changes most
        for options, what in recipe.files:
            if not any(option in self._options.said for option in options):
                self._notes.lose(f"{what}: give --{options[0]}", path)
        for what in recipe.untold:
            self._notes.lose(what, path)
        prompt, networks = self._networks.use(path, recipe, texts, self._given)
        settings: dict[str, object] = {}
        for name, text in list(texts.items()):
            option = PROMPT_OPTIONS[name]
            try:
                settings[option.sets] = option.convert(text)
            except ArgumentTypeError as problem:
                self._notes.lose(f"{_WORDS.get(name, name)} {text[:40]!r} ({str(problem).partition(';')[0]})", path)
                del texts[name]
        text = " ".join([prompt, *(f"--{name} {text}" for name, text in texts.items())])
        return SourceLine(text, str(path), PromptLine(prompt, settings, networks=networks))

    def _texts(self, path: Path, recipe: Recipe, size: tuple[int, int]) -> dict[str, str]:
        """What a recipe says, by the names of a line's options, without what the command line gives."""
        negative = one_line(recipe.negative_prompt)
        if recipe.syntax == WEB_UI:  # where tags in a negative prompt do nothing
            negative = without_networks(negative)
        texts = {"n": negative, "s": recipe.steps, "l": recipe.scale}
        if self._draws_over(recipe):
            texts["t"] = recipe.strength
        texts |= {"d": self._seed(path, recipe.seed)} | self._size(path, recipe, size)
        texts |= self._sampler(path, recipe) | dict(recipe.line)
        self._leave_noise(path, texts)
        return {name: text for name, text in texts.items() if text and name not in self._given}

    def _leave_noise(self, path: Path, texts: dict[str, str]) -> None:
        """Leave out what a sampler that only stands in for another has no like of."""
        if "sampler" in self._given:
            return
        sampler = SAMPLERS[texts.get("sampler", self._options.sampler.name)]
        for name, takes in (("eta", sampler.eta is not None), ("s_churn", sampler.churns)):
            if name in texts and not takes:
                self._notes.lose(f"{name} {texts.pop(name)[:20]} of {sampler.name}", path)

    def _draws_over(self, recipe: Recipe) -> bool:
        """Whether there will be a picture that strength means something for."""
        said = self._options.said
        return "image_path" in said or recipe.first_stage is not None or "highres_fix_scale" in said

    def _seed(self, path: Path, text: str) -> str:
        """A seed within what there are here; ComfyUI's have a bit more."""
        if text == str(FRESH_SEED):
            self._notes.lose("seed -1, which is a new one each time", path)
        if text.isascii() and text.isdigit() and len(text) <= 20 and int(text) > MAX_SEED:
            self._notes.lose(f"seed {text}, which is {int(text) & MAX_SEED} here", path)
            return str(int(text) & MAX_SEED)
        return text

    def _size(self, path: Path, recipe: Recipe, size: tuple[int, int]) -> dict[str, str]:
        """Width and height, made multiples of 8; the picture's own where its recipe tells none."""
        told = [_whole(recipe.width), _whole(recipe.height)]
        if None in told:
            if recipe.width or recipe.height:
                self._notes.lose(f"size {recipe.width[:20]!r} x {recipe.height[:20]!r}", path)
            if "image_path" in self._options.said:
                return {}
            told = list(size)
        sides = [max(PIXELS_PER_CELL, side - side % PIXELS_PER_CELL) for side in told if side is not None]
        if sides != told:
            self._notes.lose("size {}x{}, which is {}x{} here".format(*told, *sides), path)
        return {"w": str(sides[0]), "h": str(sides[1])}

    def _sampler(self, path: Path, recipe: Recipe) -> dict[str, str]:
        """Sampler and schedule, the nearest where they are not here."""
        if not recipe.sampler or "sampler" in self._options.said:
            return self._schedule(path, recipe.schedule, self._options.sampler.name)
        found, is_same = told_sampler(recipe.sampler)
        if found is None:
            known = "give --sampler to draw it with another"
            self._notes.refuse(f"sampler {recipe.sampler[:60]!r}: there is none like it here; {known}", path)
            return {}
        if not is_same:
            self._notes.lose(f"sampler {recipe.sampler}, for which {found.name} draws", path)
        told = (
            recipe.schedule
            if told_schedule(recipe.schedule) not in (None, OWN) or not found.schedule
            else found.schedule
        )
        return {"sampler": str(NamedSampler(found.name))} | self._schedule(path, told, found.name)

    def _schedule(self, path: Path, text: str, sampler: str) -> dict[str, str]:
        """A schedule, as far as a sampler goes through it."""
        if self._given & {"schedule", "sampler"}:
            return {}
        schedule = told_schedule(text)
        if schedule == "linspace" != text.lower() and SAMPLERS[sampler].spacing in ("linspace", None):
            return {}  # by another program's name for what the sampler does anyway
        if schedule is None or schedule not in SAMPLERS[sampler].schedules:
            self._notes.lose(f"schedule {text[:60]} of {sampler}", path)
            return {}
        return {} if schedule == OWN else {"schedule": schedule}


def _whole(text: str) -> int | None:
    """A side in pixels; None for what is none."""
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 6 else 0
    return value if 0 < value <= MAX_SIZE_PX else None


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class _Networks:
    """Finds the networks that recipes name: among those that options name, else in `--network_dir`."""

    def __init__(self, options: Options, notes: Notes) -> None:
        self._options, self._notes = options, notes
        paths = [Path(each) for each in options.network_weights or ()]
        merged = len(paths) if options.network_merge else options.network_merge_n_models or 0
        names = [(each.parent if each.stem in FOLDER_STEMS else each).stem.casefold() for each in paths]
        self._all, self._own = set(names), names[merged:]
        self._usual = [str(each) for each in (options.network_mul or [])[merged:]]
        self._folder = NetworkFolder(Path(options.network_dir)) if options.network_dir else None

    def use(
        self, path: Path, recipe: Recipe, texts: dict[str, str], given: Collection[str]
    ) -> tuple[str, tuple[tuple[str, Strength], ...]]:
        """A recipe's prompt, with tags for the networks that are found so far as they can stand there; and the others.

        The strengths of networks that options name become the line's `--am`.
        """
        prompt = one_line(recipe.prompt)
        tagged = self._tagged(path, prompt) if recipe.syntax == WEB_UI else {}
        named = self._named(recipe, tagged, path)
        if recipe.syntax != WEB_UI and not named:
            return prompt, ()
        can_tag = self._options.prompt_syntax == WEB_UI or (
            "prompt_syntax" not in self._options.said and recipe.syntax == WEB_UI
        )
        kept: list[str] = []
        strengths: dict[str, Strength] = {}
        beside: list[tuple[str, Strength]] = []
        added = ""
        for name, strength in named.items():
            if name.casefold() in self._all:
                strengths[name.casefold()] = strength
            elif not self._is_there(name):
                where = "not in --network_dir" if self._folder else "give --network_dir"
                self._notes.lose(f"network {name[:60]} ({where})", path)
            elif name in tagged and can_tag:
                kept.append(name)
            elif can_tag:
                added += f" <lora:{name}:{strength}>"
            else:
                beside.append((name, strength))
        if recipe.syntax == WEB_UI:
            prompt = without_networks(prompt, kept)
        if strengths and self._own and "am" not in given:
            usual = dict(zip(self._own, [*self._usual, *["1"] * len(self._own)]))
            texts["am"] = ",".join(str(strengths.get(name, usual[name])) for name in self._own)
        return prompt + added, tuple(beside)

    def _tagged(self, path: Path, prompt: str) -> dict[str, Strength]:
        """The networks that tags name; of one that two name, the first counts."""
        named: dict[str, Strength] = {}
        for tag in take_apart(prompt, WEB_UI).tags:
            try:
                name, strength = parse_tag(*tag)
            except InputError:
                self._notes.lose(f"network <{tag.kind}:{tag.name[:60]}:…>", path)
                continue
            if name in named:
                self._notes.lose(f"a second tag of network {name[:60]}", path)
            named.setdefault(name, strength)
        for name in re.findall(r"<hypernet:([^<>:]*)", prompt, re.IGNORECASE):
            self._notes.lose(f"hypernetwork {name[:60]}", path)
        return named

    def _named(self, recipe: Recipe, tagged: Mapping[str, Strength], path: Path) -> dict[str, Strength]:
        """The networks of a recipe: those that tags name, then those beside."""
        named = dict(tagged)
        for network in recipe.networks:
            if any(file_stem(name).casefold() == network.name.casefold() for name in named):
                continue
            try:
                named[network.name] = parse_strength(network.strength)
            except ArgumentTypeError:
                self._notes.lose(f"network {network.name[:60]} with strength {network.strength[:20]!r}", path)
        return named

    def _is_there(self, name: str) -> bool:
        if self._folder is None or any(mark in name for mark in "<>:"):
            return False
        try:
            self._folder.find(name, name)
        except InputError:
            return False
        return True
