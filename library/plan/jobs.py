"""From prompt lines to jobs, one for each picture, and to the batches they run in. Knows no torch."""

import logging
import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Self, TypeVar

from library.errors import InputError, InputErrors
from library.plan.prompts import DynamicPrompt, PromptLine, parse_dynamic_prompt, parse_prompt_line
from library.settings import gradual_latent
from library.settings.deep_shrink import USUAL_DEPTH, DeepShrink
from library.settings.gradual_latent import GradualLatent, ancestral_timesteps
from library.settings.highres import HighresFix, stages
from library.settings.loss_guidance import NO_GUIDANCE, GuidanceSettings
from library.settings.samplers import Sampler
from library.values import PIXELS_PER_CELL

logger = logging.getLogger(__name__)

DEFAULT_SIZE_PX = 512
PART_SEPARATOR = " AND "  # between the parts of a prompt that have regions of their own
MAX_JOBS = 1_000_000  # in one run; far beyond a night's work, far below what fills the memory
_RANDOM_SEED_LIMIT = 0x7FFFFFFF
Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What the command line sets for all pictures and a prompt line may set for its own."""

    negative_prompt: str = ""
    width: int | None = None  # pixels; None leaves it to the source picture, or to `DEFAULT_SIZE_PX`
    height: int | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    negative_scale: float | None = None
    strength: float = 0.8
    network_multipliers: tuple[float, ...] = ()  # one for each network that is not merged
    gradual_latent: GradualLatent = field(default_factory=GradualLatent)
    deep_shrink: DeepShrink = field(default_factory=DeepShrink)
    clip_prompt: str = ""  # the text for CLIP guidance; empty means the prompt

    def override(self, settings: Mapping[str, object]) -> Self:
        """These settings with others in their place; `part.name` is a field of a part."""
        changed = self
        for path, value in settings.items():
            part, _, name = path.rpartition(".")
            changes = {part: replace(getattr(changed, part), **{name: value})} if part else {name: value}
            changed = replace(changed, **changes)
        return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(JobSettings):
    """One picture: all that its making depends on, and where it goes."""

    prompt: str
    seed: int
    raw_prompt: str  # the line as it was written
    where: str  # file and line of it
    file: Path
    width: int = DEFAULT_SIZE_PX
    height: int = DEFAULT_SIZE_PX
    source: Path | None = None  # the picture that img2img starts from
    mask: Path | None = None  # where it is repainted
    regions: Path | None = None  # the map of its parts' regions; without one they are all the whole picture
    guides: tuple[Path, ...] = ()  # the pictures that guide it
    control_net: bool = True  # whether ControlNets steer it, where there are any
    guide_size: tuple[int, int] | None = None  # (width, height) in pixels they see the guides at; None is the picture's
    follows: Path | None = None  # the file of the picture before it, where that one guides it
    stage: int = 0  # of Highres. fix: 1 is the small picture, 2 its enlargement; 0 is drawn in one go

    @property
    def is_img2img(self) -> bool:
        """Whether it starts from a picture, not from noise alone."""
        return self.source is not None or self.stage == 2

    @property
    def steps_run(self) -> int:
        """How many of the steps are run: with a picture to start from, only the last ones."""
        return int(self.steps * self.strength) if self.is_img2img else self.steps

    @property
    def branches(self) -> int:
        """How many predictions guidance joins at each step: prompt, negative prompt, empty prompt."""
        if self.guidance_scale <= 1:
            return 1
        return 2 if self.negative_scale is None else 3

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the prompt, each for a region of its own; mostly there is one."""
        return tuple(part.strip() for part in self.prompt.split(PART_SEPARATOR))

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the branches, in the order they are put into a batch."""
        return {
            1: self.parts,
            2: (self.negative_prompt, *self.parts),
            3: (self.negative_prompt, *self.parts, ""),
        }[self.branches]

    @property
    def text_multipliers(self) -> tuple[tuple[float, ...], ...]:
        """The networks' multipliers in the text encoder, for each of `texts`.

        With regions, network i is for part i alone, and no network for the texts that are no part.
        """
        if self.regions is None:
            return (self.network_multipliers,) * len(self.texts)
        none = tuple(0.0 for _ in self.network_multipliers)
        alone = [
            tuple(m if place == part else 0.0 for place, m in enumerate(self.network_multipliers))
            for part in range(len(self.parts))
        ]
        return {1: (*alone,), 2: (none, *alone), 3: (none, *alone, none)}[self.branches]

    @property
    def batch_key(self) -> tuple[Hashable, ...]:
        """Jobs with equal keys can share a batch, if their texts have equally many chunks."""
        return (
            *(self.width, self.height, self.steps, self.steps_run, self.branches),
            *(self.source is not None, self.mask is not None, self.gradual_latent, self.deep_shrink),
            *(self.network_multipliers, len(self.parts), self.regions is not None),
        )


@dataclass(frozen=True, slots=True)
class SourceLine:
    """One raw prompt line, without line breaks, and its place, for messages ("" for one from the command line).

    A line from a picture's metadata comes `parsed`, and belongs to that picture (its place among the sources).
    """

    text: str
    where: str = ""
    parsed: PromptLine | None = None
    picture: int | None = None


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """A picture for img2img and its upright size in pixels."""

    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class Sources:
    """The pictures that a run starts from and is guided by.

    Image k takes picture k, mask k and the k-th `guides_per_picture` guides, counting round and round.
    """

    pictures: tuple[SourcePicture, ...] = ()
    masks: tuple[Path, ...] = ()
    guides: tuple[Path, ...] = ()
    guides_per_picture: int = 1

    def guides_of(self, place: int) -> tuple[Path, ...]:
        """The guides of image number `place`."""
        first = place * self.guides_per_picture
        return tuple(_in_turn(self.guides, first + i) for i in range(self.guides_per_picture)) if self.guides else ()


class SeedSource:
    """Hands out the seeds of pictures whose prompt line names none.

    Args:
        seed: what `--seed` says; None draws anew each run.
        pictures: how many the run makes; a single one has `seed` itself.
        same_in_iteration: all pictures of an iteration share one seed.
    """

    def __init__(self, seed: int | None, pictures: int | None, *, same_in_iteration: bool = False) -> None:
        self._rng = random.Random(seed) if seed is not None else random.SystemRandom()
        self._only = seed if pictures == 1 else None
        self._same_in_iteration = same_in_iteration
        self._shared: int | None = None

    def start_iteration(self) -> None:
        """Draw the iteration's seed where its pictures share one."""
        self._shared = self._draw() if self._same_in_iteration else None

    def next(self) -> int:
        """The next picture's seed."""
        return self._shared if self._shared is not None else self._draw()

    def _draw(self) -> int:
        return self._rng.randint(0, _RANDOM_SEED_LIMIT) if self._only is None else self._only


def random_seed() -> int:
    """A seed out of nothing."""
    return random.SystemRandom().randint(0, _RANDOM_SEED_LIMIT)


class JobMaker:
    """Turns prompt lines into jobs.

    Args:
        defaults: the command line's settings.
        images_per_prompt: pictures for a line that does not enumerate its variants.
        seeds: seeds for lines that name none.
        name_file: gives the next picture's file, from its seed and its source picture.
        sampler: what the jobs are drawn with.
        sources: pictures and masks for img2img, and guides.
        highres: draws each picture in two stages.
        check: refuses a job that the rest of the run cannot draw.
        guidance: by CLIP and VGG16.
    """

    def __init__(
        self,
        defaults: JobSettings,
        images_per_prompt: int,
        seeds: SeedSource,
        name_file: Callable[[int, Path | None], Path],
        sampler: Sampler,
        sources: Sources = Sources(),  # it is immutable
        highres: HighresFix | None = None,
        check: Callable[[Job], None] = lambda job: None,
        guidance: GuidanceSettings = NO_GUIDANCE,
    ) -> None:
        self.defaults = defaults
        self.images_per_prompt = images_per_prompt
        self.seeds = seeds
        self.name_file = name_file
        self.sampler = sampler
        self.sources = sources
        self.highres = highres
        self.check = check
        self.guidance = guidance
        self._made = 0
        self._last_file: Path | None = None

    def jobs(self, line: SourceLine) -> Iterator[Job]:
        """The jobs of one prompt line.

        Raises:
            InputError: for a fault in the line, with its place.
        """
        if line.parsed is not None:
            for _ in range(self.images_per_prompt):
                yield self._job(line.parsed, self.seeds.next(), line)
            return
        dynamic = parse_dynamic_prompt(line.text, line.where)
        variants: Iterable[DynamicPrompt] = (
            dynamic.combinations() if dynamic.enumerated else [dynamic] * self.images_per_prompt
        )
        parsed: PromptLine | None = None
        for image, variant in enumerate(variants):
            if parsed is None or variant.is_dynamic or dynamic.enumerated:
                parsed = parse_prompt_line(variant.resolve(0), line.where)
            seeds = parsed.settings.get("seeds")
            seed = seeds[min(image, len(seeds) - 1)] if seeds else self.seeds.next()
            resolved = parsed
            if variant.is_dynamic:
                resolved = parse_prompt_line(variant.resolve(seed), line.where)
                if resolved.settings.get("seeds") != seeds:
                    raise InputError("--d", "cannot be left to a {…} choice, which is drawn from it", line.where)
            for warning in resolved.warnings:
                logger.warning("%s", warning)
            yield self._job(resolved, seed, line)

    def _job(self, parsed: PromptLine, seed: int, line: SourceLine) -> Job:
        overrides = {name: value for name, value in parsed.settings.items() if name != "seeds"}
        if said := overrides.get("network_multipliers"):
            overrides["network_multipliers"] = self._multipliers(said, line.where)
        settings = self.defaults.override(_with_implied(overrides, self.defaults))
        place = self._made if line.picture is None else line.picture
        picture = _in_turn(self.sources.pictures, place)
        mask, has_parts = _in_turn(self.sources.masks, place), PART_SEPARATOR in parsed.prompt
        width, height = _size(settings, picture, line.where)
        common = {each.name: getattr(settings, each.name) for each in fields(settings)}
        job = Job(
            **common | {"width": width, "height": height},
            prompt=parsed.prompt,
            seed=seed,
            raw_prompt=line.text.strip(),
            where=line.where,
            file=self.name_file(seed, picture.path if picture else None),
            source=picture.path if picture else None,
            mask=None if has_parts or picture is None else mask,
            regions=mask if has_parts else None,
            guides=self.sources.guides_of(place),
            follows=self._last_file if self.guidance.uses_guide and not self.sources.guides else None,
        )
        self._made += 1
        self.check(job)
        self._last_file = job.file
        for stage in stages(job, self.highres):
            _check_job(stage, self.sampler)
            _check_guidance(stage, self.guidance)
        return job

    def _multipliers(self, said: tuple[float, ...], where: str) -> tuple[float, ...]:
        """A line's multipliers for all networks; a short list repeats its last."""
        subject, networks = f"--am {','.join(f'{m:g}' for m in said)}", len(self.defaults.network_multipliers)
        if not networks:
            raise InputError(
                subject,
                "there is no network whose multiplier could change (a merged one's cannot); leave it out",
                where,
            )
        if len(said) > networks:
            raise InputError(subject, f"{len(said)} multipliers for {networks} networks; give at most as many", where)
        return said + said[-1:] * (networks - len(said))


def _with_implied(overrides: dict[str, object], defaults: JobSettings) -> dict[str, object]:
    """A prompt line's settings; minor options of Gradual Latent or Deep Shrink alone mean its usual use."""
    parts = {path.partition(".")[0] for path in overrides}
    implied: dict[str, object] = {}
    if "gradual_latent" in parts and defaults.gradual_latent.timesteps is None:
        implied["gradual_latent.timesteps"] = gradual_latent.USUAL_TIMESTEPS
    if "deep_shrink" in parts and defaults.deep_shrink.depth_1 is None:
        implied["deep_shrink.depth_1"] = USUAL_DEPTH
    return implied | overrides


def _in_turn(things: Sequence[Thing], place: int) -> Thing | None:
    return things[place % len(things)] if things else None


def _size(settings: JobSettings, picture: SourcePicture | None, where: str) -> tuple[int, int]:
    """A job's width and height: what is said, else the source picture's, cut down to multiples of 8."""
    said = (settings.width, settings.height)
    if picture is None:
        return settings.width or DEFAULT_SIZE_PX, settings.height or DEFAULT_SIZE_PX
    if None not in said:
        return said
    if said != (None, None):
        raise InputError("--W, --H", "img2img needs both to resize a picture; give both or neither", where)
    width, height = (side - side % PIXELS_PER_CELL for side in (picture.width, picture.height))
    if (width, height) != (picture.width, picture.height):
        logger.warning("source pictures whose sides are no multiples of %d are resized to such", PIXELS_PER_CELL)
    return width, height


def _check_job(job: Job, sampler: Sampler) -> None:
    """Refuse and warn of settings that do not go together.

    Raises:
        InputError: for steps that the sampler cannot do, or when nothing of an img2img job would be run.
    """
    fewest, most = sampler.steps
    if not fewest <= job.steps <= most:
        problem = f"the sampler {sampler.name} does {fewest} to {most} steps; use as many or another sampler"
        raise InputError(f"{job.steps} steps", problem, job.where)
    if job.steps_run < 1:
        smallest = math.ceil(1000 / job.steps) / 1000
        raise InputError(
            f"strength {job.strength:g} of {job.steps} steps",
            f"leaves no step to run; use a strength of {smallest:g} or more, or more steps",
            job.where,
        )
    _check_sizes(job, sampler)
    if job.guidance_scale > sampler.highest_scale:
        place = f"{job.where}: " if job.where else ""
        advice = f"the sampler {sampler.name} is made for a scale of 1 to {sampler.highest_scale:g}"
        logger.warning("%sguidance scale %g: %s", place, job.guidance_scale, advice)
    if len(job.parts) > 1 and job.regions is None:
        logger.warning("a prompt's parts (AND) have no map of regions (--mask_path): each is for the whole picture")
    if job.negative_scale is not None and job.branches == 1:
        place = f"{job.where}: " if job.where else ""
        logger.warning("%sthe negative scale does nothing at a guidance scale of 1 or less", place)


def _check_sizes(job: Job, sampler: Sampler) -> None:
    """Refuse Gradual Latent and Deep Shrink where they cannot work."""
    height, width = job.height // PIXELS_PER_CELL, job.width // PIXELS_PER_CELL
    if job.gradual_latent.timesteps is not None:
        if sampler.name != gradual_latent.SAMPLER:
            problem = f"works with the sampler {gradual_latent.SAMPLER} only; use it, or leave Gradual Latent out"
            raise InputError("Gradual Latent", problem, job.where)
        timesteps = ancestral_timesteps(job.steps)[job.steps - job.steps_run :]
        if problem := job.gradual_latent.check(timesteps, height, width):
            raise InputError("Gradual Latent", problem, job.where)
    if problem := job.deep_shrink.check(height, width):
        raise InputError("Deep Shrink", problem, job.where)


def _check_guidance(job: Job, guidance: GuidanceSettings) -> None:
    """Refuse pictures that cannot be guided, and warn of a text for CLIP that nothing reads."""
    if guidance.uses_anything and len(job.parts) > 1:
        problem = "a prompt in parts cannot be guided by CLIP or VGG16; leave out AND, or the guidance"
        raise InputError("AND", problem, job.where)
    smallest = guidance.smallest_side_px
    if min(job.width, job.height) < smallest:
        problem = f"VGG16's layer {guidance.vgg16_layer} sees nothing of it; use sides of {smallest} pixels or more"
        raise InputError(f"{job.width} x {job.height} pixels", problem, job.where)
    if job.clip_prompt and not guidance.clip_scale:
        place = f"{job.where}: " if job.where else ""
        logger.warning("%s--c does nothing without --clip_guidance_scale", place)


def count_pictures(lines: Sequence[SourceLine], images_per_prompt: int, iterations: int) -> int:
    """How many pictures a run makes.

    Raises:
        InputError: for a fault in a line's dynamic prompt, and for more than `MAX_JOBS`.
    """

    def parse(line: SourceLine) -> DynamicPrompt:
        return parse_dynamic_prompt(line.text if line.parsed is None else "", line.where)

    dynamics = _for_all(lines, parse)
    pictures = iterations * sum(d.count() if d.enumerated else images_per_prompt for d in dynamics)
    if pictures > MAX_JOBS:
        raise InputError(
            f"--n_iter {iterations}, --images_per_prompt {images_per_prompt}",
            f"{pictures:,} pictures, more than {MAX_JOBS:,} in one run; make several runs",
        )
    return pictures


def plan_jobs(
    lines: Sequence[SourceLine], maker: JobMaker, iterations: int, shuffle: random.Random | None = None
) -> list[Job]:
    """The jobs of a run, in the order of its pictures: iteration by iteration, line by line.

    Args:
        lines: the prompt lines.
        maker: makes jobs of them.
        iterations: how often all lines are gone through.
        shuffle: mixes the lines anew for each iteration; None leaves their order.
    """
    jobs: list[Job] = []
    for _ in range(iterations):
        maker.seeds.start_iteration()
        order = list(lines)
        if shuffle is not None:
            shuffle.shuffle(order)
        for made in _for_all(order, lambda line: list(maker.jobs(line))):
            jobs += made
    return jobs


def _for_all(lines: Sequence[SourceLine], work: Callable[[SourceLine], Thing]) -> list[Thing]:
    """What `work` gives for each line; its refusals are raised together, after all lines have been looked at."""
    results: list[Thing] = []
    problems: list[InputError] = []
    for line in lines:
        try:
            results.append(work(line))
        except InputError as problem:
            problems.append(problem)
    if problems:
        raise problems[0] if len(problems) == 1 else InputErrors(problems)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def group_into_batches(jobs: Iterable[Job], batch_size: int, key: Callable[[Job], object]) -> list[list[Job]]:
    """Fill batches with jobs of equal key from anywhere in the run; batches are in the order of their first job."""
    batches: list[list[Job]] = []
    filling: dict[object, list[Job]] = {}
    for job in jobs:
        job_key = key(job)
        batch = filling.get(job_key)
        if batch is None or len(batch) == batch_size:
            batch = filling[job_key] = []
            batches.append(batch)
        batch.append(job)
    return batches
