"""From prompt lines to jobs, one for each picture."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.files.families import Family
from library.plan.canvas import Box, Canvas, Size, find_boxes
from library.plan.dynamic_prompts import DynamicPrompt
from library.plan.emphasis import unclosed_weight
from library.plan.job import Job, JobSettings
from library.plan.job_checks import check_loss_guidance, check_settings, warn_of_lacking_colors, warn_of_unused_seeds
from library.plan.prompt_lines import PromptLine, parse_prompt_line, place_of, seeds_of
from library.plan.prompt_syntax import SD_SCRIPTS, check_tags, read_prompt, web_ui_marks
from library.plan.sampling import Sampling
from library.plan.seeds import SeedsAgain, SeedSource, seed_of
from library.plan.sources import NO_SOURCES, SourceLine, SourcePicture, Sources, in_turn
from library.plan.stages import stages
from library.plan.sweep import NO_SWEEP, Sweep
from library.plan.wildcards import Wildcards
from library.settings import gradual_latent
from library.settings.deep_shrink import USUAL_DEPTH
from library.settings.gradual_latent import ancestral_timesteps
from library.settings.highres import HighresFix
from library.settings.loss_guidance import NO_LOSS_GUIDANCE, LossGuidanceSettings
from library.settings.masks import NO_MASKS, MaskSettings
from library.settings.samplers import SAMPLERS
from library.settings.sizes import NOT_SAID
from library.settings.tiling import WHOLE, Tiling
from library.values import MAX_SEED, PIXELS_PER_CELL
from networks.strengths import Strength, parse_tag
from networks.tags import TaggedNetworks, TagUse

logger = logging.getLogger(__name__)

# a picture's seed, its source picture, and more of it by the names of its fields → its file
NameFile = Callable[[int, Path | None, Mapping[str, Any]], Path]


class JobMaker:
    """Turns prompt lines into jobs.

    Args:
        defaults: the command line's settings.
        images_per_prompt: pictures for a line that does not enumerate its variants; None is one, or one for each of
            the seeds that the line names.
        family: of the model that they are drawn with.
        sources: pictures and masks for img2img, and guides.
        highres: draws each picture in two stages.
        check: refuses a job that the rest of the run cannot draw.
        loss_guidance: by CLIP and VGG16.
        sampling: what the rest of the run means for samplers.
        unet_config: of the model; None for that of the family's published ones.
        syntax: of the prompts.
        wildcards: that prompt lines may name.
        tagged: the networks that prompts' tags name; None where there are no tags.
        masks: how masks are read, and what is drawn of pictures.
        tiling: what of a picture the model sees at once.
        sweep: what each line is drawn with in all combinations.
    """

    def __init__(
        self,
        defaults: JobSettings,
        images_per_prompt: int | None,
        family: Family,
        sources: Sources = NO_SOURCES,
        highres: HighresFix | None = None,
        check: Callable[[Job], None] = lambda job: None,
        loss_guidance: LossGuidanceSettings = NO_LOSS_GUIDANCE,
        sampling: Sampling | None = None,
        unet_config: Mapping[str, Any] | None = None,
        syntax: str = SD_SCRIPTS,
        wildcards: Wildcards | None = None,
        tagged: TaggedNetworks | None = None,
        masks: MaskSettings = NO_MASKS,
        tiling: Tiling = WHOLE,
        sweep: Sweep = NO_SWEEP,
    ) -> None:
        self.defaults = defaults
        self.images_per_prompt = images_per_prompt
        self.family = family
        self.sources = sources
        self.highres = highres
        self.check = check
        self.loss_guidance = loss_guidance
        self.sampling = sampling or Sampling(defaults.steps, defaults.schedule)
        self.shrink_points = family.shrink_points(unet_config or family.config("unet"))
        self.syntax = syntax
        self._warned_of_syntax = False
        self.wildcards = wildcards or Wildcards()
        self._negative = self._run_negative()
        self.tagged = tagged
        self.masks = masks
        self.tiling = tiling
        self.sweep = sweep
        self._made = 0
        self._last_file: Path | None = None

    def jobs(self, line: SourceLine, seeds: SeedSource, name_file: NameFile) -> Iterator[Job]:
        """The jobs of one prompt line.

        Args:
            line: the line.
            seeds: for lines that name none.
            name_file: names the pictures.

        Raises:
            InputError: for a fault in the line, with its place.
        """
        if not self.sweep.axes:
            yield from self._jobs(line, seeds, name_file)
            return
        first, again = self._made, SeedsAgain(seeds)
        for combined in self.sweep.lines(line):
            self._made = first  # sources and guides are those of the other combinations, too
            again.rewind()
            try:
                yield from self._jobs(combined, again, name_file)
            except InputError as problem:
                raise self._told_of_sweep(problem, line, combined) from None

    def _told_of_sweep(self, problem: InputError, line: SourceLine, combined: SourceLine) -> InputError:
        """A combination's fault with the values that it has, unless the line has the same fault without them."""
        assert combined.cell is not None  # it is a combination
        try:
            list(copy(self)._jobs(line, SeedSource(0, None), lambda *_: Path()))
        except InputError as of_line:
            if str(of_line) == str(problem):
                return problem
        values = ", ".join(f"{name}={value}" for name, value in combined.cell.values)
        return InputError(f"--sweep {values}", str(problem))

    def _jobs(self, line: SourceLine, seeds: SeedSource | SeedsAgain, name_file: NameFile) -> Iterator[Job]:
        """The jobs of one prompt line, or of one combination of it."""
        if line.parsed is not None:
            said = line.parsed.settings.get("seeds", ())
            for image in range(self.images_per_prompt or 1):  # those that are told, then new ones
                yield self._job(line.parsed, seed_of(said[image : image + 1], 0, seeds), line, name_file)
            return
        dynamic = dynamic_prompt(line, self.wildcards)
        variants: Iterable[DynamicPrompt] = (
            dynamic.combinations() if dynamic.enumerated else [dynamic] * pictures_of(line.text, self.images_per_prompt)
        )
        parsed: PromptLine | None = None
        image = -1
        for image, variant in enumerate(variants):
            if parsed is None or variant.is_dynamic or dynamic.enumerated:
                parsed = parse_prompt_line(variant.resolve(0), line.where, line.cells)
            said = parsed.settings.get("seeds")
            seed = seed_of(said, image, seeds)
            resolved = parsed
            if variant.is_dynamic:
                resolved = parse_prompt_line(variant.resolve(seed), line.where, line.cells)
                if resolved.settings.get("seeds") != said:
                    raise InputError("--d", "cannot be left to a {…} choice, which is drawn from it", line.where)
            for warning in resolved.warnings:
                logger.warning("%s", warning)
            yield self._job(resolved, seed, line, name_file)
        if unused := len(seeds_of(line.text)) - (image + 1):
            warn_of_unused_seeds(unused, image + 1, line.where)

    def _job(self, parsed: PromptLine, seed: int, line: SourceLine, name_file: NameFile) -> Job:
        overrides = {name: value for name, value in parsed.settings.items() if name != "seeds"}
        if line.parsed is not None and not self.family.told_sizes:  # a picture's, which another family has made
            overrides = {name: value for name, value in overrides.items() if not name.startswith("sizes.")}
        if said := overrides.get("network_multipliers"):
            overrides["network_multipliers"] = self._multipliers(said, line.where)
        overrides = self.sampling.resolve(overrides, self.defaults, line.where)
        if self._negative.is_dynamic:  # by other choices than those of the prompt
            overrides.setdefault("negative_prompt", self._negative.resolve(MAX_SEED - seed))
        settings = self.defaults.override(_with_implied(overrides, self.defaults))
        place = self._made if line.picture is None else line.picture
        picture = in_turn(self.sources.pictures, place)
        mask = in_turn(self.sources.masks, place)
        has_parts = len(read_prompt(parsed.prompt, self.syntax).parts) > 1
        self._check_syntax(parsed.prompt, settings.negative_prompt, line.where)
        if "strength" in overrides and picture is None and self.highres is None:
            place_of_line = f"{line.where}: " if line.where else ""
            logger.warning("%s--t does nothing without --image_path and without Highres. fix", place_of_line)
        tags = self._tags(parsed, line.where)
        mask, regions = (None, mask) if has_parts else (mask if picture else None, None)
        width, height = self._size(settings, picture, line.where)
        boxes, canvas = self._boxes(picture, mask, regions, (width, height), line.where)
        common: dict[str, Any] = {each.name: getattr(settings, each.name) for each in fields(settings)}
        common |= {"width": width, "height": height}
        for_name = {**common, "prompt": parsed.prompt, "where": line.where}
        job = Job(
            **common,
            prompt=parsed.prompt,
            prompt_syntax=self.syntax,
            seed=seed,
            raw_prompt=line.text.strip(),
            where=line.where,
            file=name_file(seed, picture.path if picture else None, for_name),
            source=picture.path if picture else None,
            mask=mask,
            extend=self.masks.extend if picture else None,
            boxes=boxes,
            canvas=canvas,
            regions=regions,
            guides=self.sources.guides_of(place),
            tags=tags,
            cell=replace(line.cell, image=self._made) if line.cell else None,
            follows=self._last_file if self.loss_guidance.uses_goal_picture and not self.sources.guides else None,
        )
        self._made += 1
        warn_of_lacking_colors(job, self.sources)
        self.check(job)
        self._last_file = job.file
        for stage in stages(job, self.highres):
            self.sampling.check(stage)
            check_settings(stage)
            self._check_sizes(stage)
            check_loss_guidance(stage, self.loss_guidance)
        return job

    def _run_negative(self) -> DynamicPrompt:
        """The negative prompt of lines without one; its choices are made for each picture."""
        negative = self.wildcards.parse(self.defaults.negative_prompt, "--negative_prompt")
        if negative.enumerated:
            problem = "counts pictures by the combinations of a prompt; write {a|b}, or put it into the lines"
            raise InputError("{e$$…}", problem, "--negative_prompt")
        return negative

    def _size(self, settings: JobSettings, picture: SourcePicture | None, where: str) -> tuple[int, int]:
        """A job's width and height: what is said, else the canvas's, cut down to multiples of 8."""
        if settings.width is not None and settings.height is not None:
            return settings.width, settings.height
        if picture is None or self.masks.masked_area:  # an area is drawn as large as the model draws
            usual_px = self.family.size_px
            return settings.width or usual_px, settings.height or usual_px
        if settings.width is not None or settings.height is not None:
            raise InputError("--W, --H", "img2img needs both to resize a picture; give both or neither", where)
        across, down = picture.extended(self.masks.extend)
        width, height = across - across % PIXELS_PER_CELL, down - down % PIXELS_PER_CELL
        if (width, height) != (across, down):
            logger.warning("source pictures whose sides are no multiples of %d are resized to such", PIXELS_PER_CELL)
        return width, height

    def _boxes(
        self, picture: SourcePicture | None, mask: Path | None, regions: Path | None, size: Size, where: str
    ) -> tuple[tuple[Box, ...], Size | None]:
        """The parts of a source picture that are drawn, and its size where it is not drawn whole."""
        if regions is not None and self.masks.from_alpha:
            problem = "gives a mask, and a prompt with AND reads a map of regions; give it with --mask_path"
            raise InputError("--mask_from_alpha", problem, where)
        if picture is None or not self.masks.masked_area:
            return (), None
        if regions is not None:
            problem = "draws a part of the picture, and a prompt with AND has a map of the whole; leave one of them out"
            raise InputError("--inpaint_area mask", problem, where)
        canvas, within = Canvas(picture.path, mask, self.masks.extend, self.masks), picture.extended(self.masks.extend)
        return find_boxes(canvas, within, size, where), within

    def _check_sizes(self, job: Job) -> None:
        """Refuse Gradual Latent and Deep Shrink where they cannot work, and sizes that the model is not told."""
        if job.sizes != NOT_SAID and not self.family.told_sizes:
            problem = f"{self.family.name} models are told none; leave --original_width, --ow and their like out"
            raise InputError("original sizes and crops", problem, job.where)
        height, width = job.height // PIXELS_PER_CELL, job.width // PIXELS_PER_CELL
        if job.gradual_latent.timesteps is not None:
            if job.sampler != gradual_latent.SAMPLER:
                problem = f"works with the sampler {gradual_latent.SAMPLER} only; use it, or leave Gradual Latent out"
                raise InputError("Gradual Latent", problem, job.where)
            spacing = self.sampling.noise.spacing_for(SAMPLERS[job.sampler], job.schedule)
            timesteps = ancestral_timesteps(job.steps, spacing)[job.steps - job.steps_run :]
            if problem := job.gradual_latent.check(timesteps, height, width):
                raise InputError("Gradual Latent", problem, job.where)
        height, width = (self.tiling.within_tile(side) // PIXELS_PER_CELL for side in (job.height, job.width))
        if problem := job.deep_shrink.check(height, width, self.shrink_points):
            raise InputError("Deep Shrink", problem, job.where)

    def _check_syntax(self, prompt: str, negative_prompt: str, where: str) -> None:
        """Refuse tags that say nothing, and warn once of what only the other syntax understands."""
        if lost := unclosed_weight(prompt) or unclosed_weight(negative_prompt):
            place = f"{where}: " if where else ""
            logger.warning("%s%r: the bracket is never closed and the weight is text; write ) after it", place, lost)
        if self.syntax != SD_SCRIPTS:
            check_tags(prompt, negative_prompt, where)
        elif not self._warned_of_syntax and (marks := web_ui_marks(prompt) or web_ui_marks(negative_prompt)):
            self._warned_of_syntax = True
            place = f"{where}: " if where else ""
            logger.warning("%s%s is taken as text; --prompt_syntax webui gives it its meaning", place, marks)

    def _tags(self, parsed: PromptLine, where: str) -> tuple[TagUse, ...]:
        """The networks of a prompt's tags, and those that a line names beside it."""
        tags = [parse_tag(*tag, where) for tag in read_prompt(parsed.prompt, self.syntax).tags]
        tags += parsed.networks
        return self.tagged.use(tags, where) if self.tagged and tags else ()

    def _multipliers(self, said: tuple[Strength, ...], where: str) -> tuple[Strength, ...]:
        """A line's multipliers for all networks; a short list repeats its last."""
        texts = (str(each) if each.number is None else f"{each.number:g}" for each in said)
        subject, networks = f"--am {','.join(texts)}", len(self.defaults.network_multipliers)
        if not networks:
            raise InputError(
                subject,
                "there is no network whose multiplier could change (a merged one's cannot); leave it out",
                where,
            )
        if len(said) > networks:
            raise InputError(subject, f"{len(said)} multipliers for {networks} networks; give at most as many", where)
        return said + said[-1:] * (networks - len(said))


def dynamic_prompt(line: SourceLine, wildcards: Wildcards) -> DynamicPrompt:
    """A line's groups and wildcards.

    Raises:
        InputError: for a fault in them.
    """
    return wildcards.parse(line.text, line.where, partial(place_of, line.where, cells=line.cells))


def pictures_of(text: str, images_per_prompt: int | None) -> int:
    """How many pictures a line gives that does not enumerate its variants."""
    return images_per_prompt or len(seeds_of(text)) or 1


def _with_implied(overrides: dict[str, object], defaults: JobSettings) -> dict[str, object]:
    """A prompt line's settings; minor options of Gradual Latent or Deep Shrink alone mean its usual use."""
    parts = {path.partition(".")[0] for path in overrides}
    implied: dict[str, object] = {}
    if "gradual_latent" in parts and defaults.gradual_latent.timesteps is None:
        implied["gradual_latent.timesteps"] = gradual_latent.USUAL_TIMESTEPS
    if "deep_shrink" in parts and defaults.deep_shrink.depth_1 is None:
        implied["deep_shrink.depth_1"] = USUAL_DEPTH
    return implied | overrides
