"""A job: one picture, and all that its making depends on."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from library.plan.canvas import Box, Canvas, Size, View
from library.plan.prompt_editing import Moment
from library.plan.prompt_syntax import SD_SCRIPTS, Prompt, PromptPart, read_negative, read_prompt
from library.settings.deep_shrink import DeepShrink
from library.settings.gradual_latent import GradualLatent
from library.settings.masks import Margins, MaskSettings
from library.settings.sizes import NOT_SAID, ToldSizes
from networks.strengths import OFF, Strength
from networks.tags import TagUse


@dataclass(frozen=True, slots=True)
class SweepCell:
    """A picture's place in a sweep: what the sweep sets for it, by the names of axes, in a prompt line as written.

    Pictures of one line whose `image` is the same have one seed, source and guides, and differ by the sweep alone.
    """

    line: str
    values: tuple[tuple[str, str], ...]
    image: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What the command line sets for all pictures and a prompt line may set for its own."""

    negative_prompt: str = ""
    width: int | None = None  # pixels; None leaves it to the source picture
    height: int | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    negative_scale: float | None = None
    image_guidance: float | None = None  # how closely an edit model keeps to its picture; None with other models
    strength: float = 0.8
    network_multipliers: tuple[Strength, ...] = ()  # one for each network that options name and is not merged
    gradual_latent: GradualLatent = field(default_factory=GradualLatent)
    deep_shrink: DeepShrink = field(default_factory=DeepShrink)
    clip_prompt: str = ""  # the text for CLIP guidance; empty means the prompt
    sampler: str = "ddim"  # its first name
    schedule: str = "own"  # likewise
    timesteps: tuple[int, ...] = ()  # instead of a schedule: one for each step
    eta: float | None = None  # share of noise in a step's change; None is the sampler's own
    s_churn: float = 0.0  # how much noise is stirred in, over all steps
    sizes: ToldSizes = NOT_SAID  # what an XL model is told
    upscale: float = 1.0  # factor by which the finished picture is enlarged without diffusion
    file_name: str = ""  # that its line gives the picture, without an ending; empty for that of the run's way

    def override(self, settings: Mapping[str, Any]) -> Self:
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
    prompt_syntax: str = SD_SCRIPTS
    raw_prompt: str  # the line as it was written
    where: str  # file and line of it
    file: Path
    width: int
    height: int
    source: Path | None = None  # the picture that img2img starts from
    mask: Path | None = None  # where it is repainted
    extend: Margins | None = None  # how far the source grows first; what is new is repainted
    boxes: tuple[Box, ...] = ()  # the parts of the source that are drawn one after another; none to draw it whole
    canvas: Size | None = None  # the source's size in pixels, where parts of it are drawn
    turn: int = 0  # which of the boxes is drawn
    regions: Path | None = None  # the map of its parts' regions; without one they are all the whole picture
    guides: tuple[Path, ...] = ()  # pictures, one for each ControlNet; a loss's goal is the first of them
    control_net: bool = True  # whether ControlNets steer it, where there are any
    follows: Path | None = None  # the file of the picture before it, where that one is a loss's goal
    tags: tuple[TagUse, ...] = ()  # the networks of its prompt's tags, by their places in the run
    stage: int = 0  # of Highres. fix: 1 is the small picture, 2 its enlargement; 0 is drawn in one go
    steps_before: int = 0  # that the stages before this one run
    cell: SweepCell | None = None  # of a sweep; None in a run without one

    @property
    def described(self) -> str:
        """Which picture it is, for messages: its file, where its line stands, and its seed."""
        return f"{self.file.name} ({f'{self.where}, ' if self.where else ''}seed {self.seed})"

    @property
    def file_size(self) -> Size:
        """Width and height in pixels of the picture's file; `width` and `height` are those that it is drawn at."""
        width, height = self.canvas or (self.width, self.height)
        return round(width * self.upscale), round(height * self.upscale)

    @property
    def is_img2img(self) -> bool:
        """Whether it starts from a picture, not from noise alone."""
        return self.source is not None or self.stage == 2

    @property
    def is_masked(self) -> bool:
        """Whether it is drawn over in part."""
        return self.source is not None and (self.mask is not None or self.extend is not None)

    def view(self, masks: MaskSettings) -> View | None:
        """What of its source picture is drawn; None without one."""
        if self.source is None:
            return None
        canvas = Canvas(self.source, self.mask, self.extend, masks)
        return View(canvas, (self.width, self.height), self.boxes[self.turn] if self.boxes else None, self.turn)

    @property
    def steps_run(self) -> int:
        """How many of the steps are run: with a picture to start from, only the last ones."""
        return int(self.steps * self.strength) if self.is_img2img else self.steps

    @property
    def goal(self) -> Path | None:
        """The picture that guidance by a loss draws it towards."""
        return self.guides[0] if self.guides else self.follows

    @property
    def said(self) -> Prompt:
        """The prompt taken apart."""
        return read_prompt(self.prompt, self.prompt_syntax)

    @property
    def parts(self) -> tuple[PromptPart, ...]:
        """The parts of the prompt; mostly there is one."""
        return self.said.parts

    @property
    def composes(self) -> bool:
        """Whether each part is a prediction of its own, added up by weight; regions' parts share one prediction."""
        return len(self.parts) > 1 and self.prompt_syntax != SD_SCRIPTS and self.regions is None

    @property
    def branches(self) -> int:
        """How many predictions classifier-free guidance joins at each step: prompt, negative prompt, empty prompt.

        Parts that compose have a prediction each, beside the negative prompt's at any scale. An edit model's third
        one is the negative prompt's without the picture (Brooks et al. 2023, https://arxiv.org/abs/2211.09800).
        """
        if self.guidance_scale <= 1 and not self.composes:
            return 1
        two = self.negative_scale is None and self.image_guidance is None
        return (len(self.parts) if self.composes else 1) + (1 if two else 2)

    @property
    def has_negative(self) -> bool:
        """Whether one of the branches is the negative prompt's."""
        return self.branches > 1

    @property
    def has_empty(self) -> bool:
        """Whether the last of the branches is an empty prompt's, for a scale of the negative prompt alone."""
        return self.has_negative and self.negative_scale is not None

    @property
    def drops_picture(self) -> bool:
        """Whether the last of the branches is the negative prompt's again, for which an edit model sees no picture."""
        return self.has_negative and self.image_guidance is not None

    def texts_at(self, step: int) -> tuple[str, ...]:
        """The texts of the branches at a step, from 0, in the order they are put into a batch."""
        moment = Moment(step + 1, self.steps_run, self.steps_before)
        parts = [part.text.at(moment) for part in self.parts]
        negative = [read_negative(self.negative_prompt, self.prompt_syntax).at(moment)] if self.has_negative else []
        return (*negative, *parts, *[""] * self.has_empty, *negative * self.drops_picture)

    @property
    def last_moment(self) -> Moment:
        """The last step that is run."""
        return Moment(self.steps_run, self.steps_run, self.steps_before)

    @property
    def all_texts(self) -> tuple[str, ...]:
        """The texts of the branches at all steps."""
        return tuple(dict.fromkeys(text for step in self.telling_steps for text in self.texts_at(step)))

    @property
    def telling_steps(self) -> range:
        """Steps that tell all texts: the first one where they do not change."""
        negative = read_negative(self.negative_prompt, self.prompt_syntax)
        changes = negative.changes or any(part.text.changes for part in self.parts)
        return range(self.steps_run if changes else 1)

    @property
    def tag_strengths(self) -> tuple[Strength, ...]:
        """The strengths of the networks of all the run's tags, by their places; up to the last that acts."""
        strengths = {tag.place: tag.strength for tag in self.tags}
        return tuple(strengths.get(place, OFF) for place in range(max(strengths, default=-1) + 1))

    @property
    def all_strengths(self) -> tuple[Strength, ...]:
        """The strengths of all networks that are not merged: those that options name, and those of tags."""
        return self.network_multipliers + self.tag_strengths

    def strengths_at(self, step: int) -> tuple[Strength, ...]:
        """What these come to at a step that is run, from 0."""
        return tuple(strength.at(step, self.steps_run) for strength in self.all_strengths)

    @property
    def text_multipliers(self) -> tuple[tuple[Strength, ...], ...]:
        """The networks' strengths in the text encoder, for each of `texts_at`.

        With regions, network i is for part i alone, and no network for the texts that are no part; tags' are for all.
        """
        if self.regions is None:
            return (self.all_strengths,) * len(self.texts_at(0))
        tags = self.tag_strengths
        none = tuple(m.without_text for m in self.network_multipliers) + tags
        alone = [
            tuple(m if place == part else m.without_text for place, m in enumerate(self.network_multipliers)) + tags
            for part in range(len(self.parts))
        ]
        return (*[none] * self.has_negative, *alone, *[none] * self.has_empty)

    @property
    def batch_key(self) -> tuple[Hashable, ...]:
        """Jobs with equal keys can share a batch, if their texts have equally many chunks."""
        return (
            *(self.width, self.height, self.steps, self.steps_run, self.branches),
            *(self.source is not None, self.is_masked, len(self.boxes), self.gradual_latent, self.deep_shrink),
            *(self.sampler, self.schedule, self.timesteps, self.eta, self.s_churn),
            *(self.network_multipliers, self.tag_strengths, len(self.parts), self.regions is not None),
        )
