"""What a picture's file says of it, from its own job."""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from library.files.textual_inversion import Embedding
from library.plan.job import Job
from library.plan.prompt_syntax import SD_SCRIPTS
from library.plan.run_plan import RunPlan
from library.plan.stages import stages
from library.plan.textual_inversion import words_met
from library.settings.cfg_interval import WHOLE_RUN, CfgInterval
from library.settings.control_net import ControlNetSpec
from library.settings.deep_shrink import DeepShrink
from library.settings.emphasis import ORIGINAL, Normalization
from library.settings.gradual_latent import GradualLatent
from library.settings.highres import HighresFix
from library.settings.loss_guidance import NO_LOSS_GUIDANCE, LossGuidanceSettings
from library.settings.masks import FILLS, NO_MASKS, MaskSettings
from library.settings.noise_schedule import USUAL_NOISE, NoiseSchedule
from library.settings.sampler_names import a1111_name
from library.settings.samplers import NOISE_LEVELS, SAMPLERS
from library.settings.sizes import NOT_SAID, ToldSizes
from library.settings.tiling import WHOLE, Tiling
from library.settings.upscaler import UpscalerSpec
from library.texts import readable
from networks.files import NetworkPlan


@dataclass(frozen=True)
class RunFacts:
    """What a picture's metadata says of its run rather than of its job."""

    model_name: str
    clip_skip: int
    model_hash: Callable[[], str | None]  # called when the first picture is written
    highres: HighresFix | None = None
    networks: NetworkPlan = field(default_factory=NetworkPlan)
    loss_guidance: LossGuidanceSettings = NO_LOSS_GUIDANCE
    control_nets: tuple[ControlNetSpec, ...] = ()
    cfg_interval: CfgInterval = WHOLE_RUN
    noise: NoiseSchedule = USUAL_NOISE
    guidance_rescale: float = 0.0
    normalization: Normalization = ORIGINAL
    zero_empty_negative: bool = False
    masks: MaskSettings = NO_MASKS
    tiling: Tiling = WHOLE
    tells_sizes: bool = False  # the model is told sizes
    upscaler: UpscalerSpec | None = None  # of finished pictures; None is LANCZOS
    embeddings: tuple[Embedding, ...] = ()  # whose words prompts may hold
    usual_clip_skip: int = 1  # the model's, where nothing is said
    asked: tuple[str, ...] = ()  # options that say of the model what its files do not; see `Prediction`
    control_nets_together: bool = False


class FileHash:
    """The SHA-256 of a file, worked out in the background; its first ten digits are what other tools call the hash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digits: str | None = None
        self._thread = threading.Thread(target=self._work_out, daemon=True)  # leaving the program does not wait for it
        self._thread.start()

    def __call__(self) -> str | None:
        """The hash; None for a folder, which has none, and for a file that went away."""
        self._thread.join()
        return self._digits

    def _work_out(self) -> None:
        with suppress(OSError), self._path.open("rb") as file:
            self._digits = hashlib.file_digest(file, "sha256").hexdigest()[:10]


def run_facts(plan: RunPlan) -> RunFacts:
    """What the pictures' metadata says of the run as a whole."""
    return RunFacts(
        *(plan.record.model, plan.text.clip_skip, FileHash(plan.model.path), plan.highres),
        *(plan.networks, plan.loss_guidance, plan.control_nets.specs, plan.cfg_interval),
        *(plan.noise, plan.guidance_rescale, plan.text.normalization, plan.text.zero_empty_negative, plan.masks),
        tiling=plan.tiling,
        tells_sizes=plan.model.family.told_sizes,
        upscaler=plan.upscaler,
        embeddings=plan.text.embeddings,
        usual_clip_skip=plan.model.family.clip_skip,
        asked=plan.model.prediction.asked,
        control_nets_together=plan.control_nets.together,
    )


def metadata(job: Job, facts: RunFacts) -> dict[str, str]:
    """A picture's metadata: the names of sd-scripts, and `parameters` as AUTOMATIC1111's web UI writes them."""
    values = {
        "prompt": job.prompt,
        "negative-prompt": job.negative_prompt,
        "seed": job.seed,
        "sampler": job.sampler,
        "steps": job.steps,
        "scale": job.guidance_scale,
        "negative-scale": job.negative_scale if job.has_empty else None,
        "image-guidance": job.image_guidance if job.drops_picture else None,
        "networks": facts.networks.describe(job.all_strengths),
        "clip-prompt": job.clip_prompt if facts.loss_guidance.clip_scale else None,
        "raw-prompt": job.raw_prompt,
        "sweep": "; ".join(f"{name}={value}" for name, value in job.cell.values) if job.cell else None,
    }
    texts = {name: readable(value) for name, value in values.items() if value is not None and value != ""}
    if facts.tells_sizes:  # what is not said is written as well, as sd-scripts writes it
        texts |= {each.name.replace("_", "-"): str(getattr(job.sizes, each.name)) for each in fields(job.sizes)}
    return texts | {"parameters": _a1111_parameters(job, facts)}


def shown_settings(job: Job, facts: RunFacts) -> dict[str, str]:
    """A picture's settings by the names that AUTOMATIC1111's web UI has for them."""
    settings: dict[str, object] = {
        "Steps": job.steps,
        "Sampler": a1111_name(job.sampler, job.schedule),
        "Schedule type": job.schedule.capitalize() if job.schedule in NOISE_LEVELS else None,
        "CFG scale": _number(job.guidance_scale),
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Model hash": facts.model_hash(),
        "Model": facts.model_name,
    }
    if job.source is not None or (facts.highres is not None and job.stage != 1):
        settings["Denoising strength"] = _number(job.strength)
    if facts.highres is not None and job.stage != 1:
        first, _ = stages(job, facts.highres)
        settings["First stage"] = f"{first.width}x{first.height}"
        settings["First stage steps"] = first.steps
        settings["Upscaler"] = facts.highres.method
    if job.upscale != 1:  # the size above is the one that it was drawn at, as with the web UI, whose names these are
        settings["Postprocess upscale by"] = _number(job.upscale)
        settings["Postprocess upscaler"] = facts.upscaler.name if facts.upscaler else "Lanczos"
    if job.prompt_syntax != SD_SCRIPTS:
        settings["Prompt syntax"] = job.prompt_syntax
    if max(facts.clip_skip, facts.usual_clip_skip) > 1:  # 1 where nothing is said, as with the web UI
        settings["Clip skip"] = facts.clip_skip
    if job.negative_scale is not None and job.has_empty:
        settings["Negative scale"] = _number(job.negative_scale)
    if job.image_guidance is not None and job.drops_picture:
        settings["Image CFG scale"] = _number(job.image_guidance)
    if job.has_negative and (start := facts.cfg_interval.start) > 0:
        settings["Guidance start"] = _number(start)
    if job.has_negative and (end := facts.cfg_interval.end) < 1:
        settings["Guidance end"] = _number(end)
    if job.has_negative and facts.guidance_rescale:
        settings["Guidance rescale"] = _number(facts.guidance_rescale)
    if job.has_negative and facts.zero_empty_negative:
        settings["Zero empty negative"] = True
    if facts.normalization != ORIGINAL:
        settings["Emphasis normalization"] = facts.normalization
    settings |= _schedule_parameters(job)
    if spacing := facts.noise.spacing_for(SAMPLERS[job.sampler], job.schedule):
        settings["Timestep spacing"] = spacing
    if "v_parameterization" in facts.asked:
        settings["V parameterization"] = True
    if facts.noise.zero_snr_for(SAMPLERS[job.sampler]):  # which is asked for again only where the model's files do not
        settings["Zero terminal SNR"] = "True" if "zero_terminal_snr" in facts.asked else "True (model)"
    if job.sizes != NOT_SAID:
        settings["Told sizes"] = _parts(job.sizes)
    if facts.tiling.splits(job.width, job.height):
        settings["Tile"] = f"{facts.tiling.size_px}, overlap {facts.tiling.overlap_px}"
    if job.gradual_latent.timesteps is not None:
        settings["Gradual Latent"] = _parts(job.gradual_latent)
    if job.deep_shrink.depth_1 is not None:
        settings["Deep Shrink"] = _parts(job.deep_shrink)
    for name, file in (("Source image", job.source), ("Mask", job.mask), ("Regions", job.regions)):
        settings[name] = None if file is None else file.name
    settings["Region colors"] = facts.masks.color_codes if job.regions else None
    settings |= _mask_parameters(job, facts.masks)
    if facts.control_nets and job.guides:
        used = zip(facts.control_nets, job.guides)
        settings["ControlNet"] = "; ".join(f"{spec.describe()}, guide {guide.name}" for spec, guide in used)
        settings["ControlNet together"] = facts.control_nets_together or None
        if facts.highres is not None and job.stage != 1 and not facts.highres.control_net:
            settings["ControlNet in second stage"] = False
    settings["Networks"] = facts.networks.describe(job.all_strengths) or None
    settings["Embeddings"] = ", ".join(words_met(facts.embeddings, (job.prompt, job.negative_prompt))) or None
    settings |= _loss_guidance_parameters(job, facts.loss_guidance)
    return {name: readable(value) for name, value in settings.items() if value is not None}


def _a1111_parameters(job: Job, facts: RunFacts) -> str:
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in shown_settings(job, facts).items()))
    return readable("\n".join(lines))


def _parts(settings: GradualLatent | DeepShrink | ToldSizes) -> str:
    """The fields of a settings object that are set: `name value, name value`."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _schedule_parameters(job: Job) -> dict[str, object]:
    """Timesteps that were given, and noise that a sampler was asked to add; by the web UI's names where it has any."""
    settings: dict[str, object] = {}
    if job.timesteps:
        settings["Timesteps"] = ", ".join(map(str, job.timesteps))
    if job.eta is not None:
        settings["Eta"] = _number(job.eta)
    if job.s_churn:
        settings["Sigma churn"] = _number(job.s_churn)
    return settings


def _mask_parameters(job: Job, masks: MaskSettings) -> dict[str, object]:
    """What was redrawn and how, by the web UI's names where it has any."""
    if not job.is_masked:
        return {}
    settings: dict[str, object] = {"Extend": ",".join(map(str, job.extend)) if job.extend else None}
    settings["Keep unmasked"] = masks.keep_unmasked or None
    if masks.from_alpha:
        settings["Mask"] = "transparency"
    if masks.invert and job.mask:
        settings["Mask mode"] = "Inpaint not masked"
    if masks.blur_px:
        settings["Mask blur"] = _number(masks.blur_px)
    if masks.fill != FILLS[0]:
        settings["Masked content"] = masks.fill
    if job.canvas:
        settings["Inpaint area"] = "Only masked"
        settings["Masked area padding"] = masks.padding_px
        settings["Regions in turn"] = len(job.boxes) if masks.each_region else None
        settings["Picture size"] = f"{job.canvas[0]}x{job.canvas[1]}"
    return settings


def _loss_guidance_parameters(job: Job, guidance: LossGuidanceSettings) -> dict[str, object]:
    """Guidance by CLIP and VGG16, and the goal picture's name."""
    settings: dict[str, object] = {}
    if guidance.clip_scale:
        settings["CLIP guidance scale"] = _number(guidance.clip_scale)
    if guidance.uses_goal_picture and job.goal is not None:
        if guidance.clip_image_scale:
            settings["CLIP image guidance scale"] = _number(guidance.clip_image_scale)
        if guidance.vgg16_scale:
            settings["VGG16 guidance scale"] = _number(guidance.vgg16_scale)
            settings["VGG16 guidance layer"] = guidance.vgg16_layer
        settings["Guide image"] = job.goal.name
    return settings


def _number(value: float) -> str:
    """A number in full, without a needless `.0`."""
    return str(int(value)) if value == int(value) else repr(value)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value
