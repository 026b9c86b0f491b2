"""The plan of a run: all that it will do, resolved and checked, before any model is loaded."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from library.files.loss_guidance import LossGuidanceFiles
from library.files.model_files import ModelFiles
from library.files.textual_inversion import Embedding
from library.files.tokenizers import load_tokenizer
from library.plan.batches import group_into_batches
from library.plan.engine import Engine
from library.plan.job import Job, JobSettings
from library.plan.job_maker import JobMaker, NameFile
from library.plan.run_record import RunRecord
from library.plan.seeds import SeedSource
from library.plan.stages import stages
from library.plan.sweep import Sweep
from library.plan.tokens import PromptTokens
from library.settings.cfg_interval import CfgInterval
from library.settings.computing import Computing
from library.settings.control_net import ControlNetSettings
from library.settings.emphasis import Normalization
from library.settings.fleet import Fleet
from library.settings.highres import HighresFix
from library.settings.loss_guidance import LossGuidanceSettings
from library.settings.masks import MaskSettings
from library.settings.noise_schedule import NoiseSchedule
from library.settings.options import Options
from library.settings.output import OutputSettings
from library.settings.repeats import Repeats
from library.settings.tiling import Tiling
from library.settings.upscaler import UpscalerSpec
from networks.files import NetworkPlan
from networks.strengths import Strength

Wording = tuple[str, tuple[Strength, ...], int]  # a text, the networks' multipliers, the chunks it is padded to


@dataclass(frozen=True)
class TextPlan:
    """How prompts are read."""

    model: ModelFiles
    embeddings: tuple[Embedding, ...]
    clip_skip: int
    normalization: Normalization
    zero_empty_negative: bool  # nothing in place of what the text encoders make of an empty negative prompt
    max_chunks: int
    moved_tokens: int  # see `PromptTokens`
    tokenizer_cache_dir: Path | None

    @cached_property
    def tokens(self) -> PromptTokens:
        """Tells the prompts' tokens; the tokenizer is loaded when it is first asked for."""
        family, texts = self.model.family, self.model.texts
        tokenizer = load_tokenizer(self.model.tokenizer, family, self.tokenizer_cache_dir)
        vocabulary = max(text.config["vocab_size"] for text in texts)
        return PromptTokens(tokenizer, family.encoders, vocabulary, self.max_chunks, self.embeddings, self.moved_tokens)


@dataclass(frozen=True)
class Keyboard:
    """What makes jobs of the prompts that are typed in."""

    maker: JobMaker
    seeds: SeedSource
    name_file: NameFile


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything a run will do."""

    options: Options  # what the user said, with what pictures to be drawn again tell
    model: ModelFiles
    text: TextPlan
    noise: NoiseSchedule
    cfg_interval: CfgInterval
    highres: HighresFix | None
    upscaler: UpscalerSpec | None  # of Highres. fix and of `Job.upscale`; None is LANCZOS
    networks: NetworkPlan
    control_nets: ControlNetSettings
    loss_guidance: LossGuidanceSettings
    loss_guidance_files: LossGuidanceFiles
    masks: MaskSettings
    tiling: Tiling
    engine: Engine
    computing: Computing
    fleet: Fleet | None  # that draws; None for this process
    output: OutputSettings
    repeats: Repeats
    sweep: Sweep
    defaults: JobSettings
    jobs: tuple[Job, ...]
    record: RunRecord  # what makes the run the same one when it is gone on with
    done: Mapping[int, Path]  # pictures that an earlier process has made, by their place in `jobs`
    resumed: bool
    keyboard: Keyboard | None  # when prompts come from there

    @property
    def guidance_rescale(self) -> float:
        """See `draw.denoiser.Cfg`."""
        return self.options.guidance_rescale

    @property
    def preview(self) -> bool:
        """Whether there may be a window."""
        return self.keyboard is not None and not self.options.no_preview

    @property
    def to_do(self) -> list[Job]:
        """The pictures that are still to be made."""
        return [job for place, job in enumerate(self.jobs) if place not in self.done]

    def batch_key(self, job: Job) -> tuple[Hashable, ...]:
        """Jobs with equal keys can be drawn together: their stages have the same shapes, and their texts one length."""
        chunks = self.text.tokens.chunks
        return tuple((*stage.batch_key, chunks(*stage.all_texts)) for stage in stages(job, self.highres))

    def batches(self, jobs: Iterable[Job]) -> list[list[Job]]:
        """The batches that jobs are drawn in, filled from all of them."""
        return group_into_batches(jobs, self.computing.batch_size, self.batch_key)

    def wordings(self, most: int) -> set[Wording] | None:
        """What the text encoders are asked for by the pictures that are still to be made; None where that is more."""
        found: set[Wording] = set()
        for job in self.to_do:
            for stage in stages(job, self.highres):
                chunks = self.text.tokens.chunks(*stage.all_texts)
                for step in stage.telling_steps:
                    asked = zip(stage.texts_at(step), stage.text_multipliers)
                    found.update((text, multipliers, chunks) for text, multipliers in asked)
            if len(found) > most:
                return None
        return found

    @property
    def texts_first(self) -> bool:
        """Whether text encoders are asked for all that they are needed for, and gone, before the U-Net is there.

        It pays where they are large, as XL's two; all pictures have to ask for the same, which no network changes.
        """
        if len(self.model.texts) == 1 or self.networks.specs:
            return False
        texts = (stage.all_texts for job in self.to_do for stage in stages(job, self.highres))
        first = next(texts, None)
        return first is not None and all(each == first for each in texts)

    def to_share(self) -> dict[str, object]:
        """What other processes need to plan the same run, as plain data."""
        return {"record": self.record.to_json(), "done": {place: file.name for place, file in self.done.items()}}
