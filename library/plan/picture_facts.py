"""All that a picture is made by, as plain data for programs: what `--json` writes, in a run and of a plan.

docs/files.md documents the names. A field that jobs or settings gain turns up by itself under its own name; what has no
plain form is refused, so that nothing is ever told in Python's own writing.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path

from library.files.control_net import ControlNetFile
from library.files.lllite import LLLiteFile
from library.plan.job import Job, SweepCell
from library.plan.run_plan import RunPlan
from library.plan.run_record import FORMAT_VERSION
from library.plan.stages import stages
from library.settings.highres import HighresFix
from library.settings.masks import AREAS, REGIONS, MaskSettings
from library.settings.preprocessing import Preprocess
from library.settings.samplers import SAMPLERS, Sampler
from library.settings.upscaler import UpscalerSpec

# Fields of a job that are told under other names, or of which only a part is told
_TOLD_OTHERWISE = (
    "file",
    "file_name",
    "strength",
    "image_guidance",
    "network_multipliers",
    "tags",
    "gradual_latent",
    "deep_shrink",
    "clip_prompt",
    "guides",
    "upscale",
    "canvas",
    "cell",
)
_INNER = ("control_net", "follows", "stage", "steps_before", "turn")  # what jobs note for the way they are drawn


def picture_facts(plan: RunPlan, job: Job, file: Path | None = None) -> dict[str, object]:
    """A picture's settings, its own and those of its run.

    Args:
        plan: of the run.
        job: the picture.
        file: where it stands, if it is not where it was planned to be.
    """
    sampler = SAMPLERS[job.sampler]
    left_out = {*_TOLD_OTHERWISE, *_INNER}
    width, height = job.file_size
    has_start = job.source is not None or (plan.highres is not None and job.stage != 1)
    return {
        "format_version": FORMAT_VERSION,
        "file": str(file or job.file),
        "prompt": job.prompt,
        **{each.name: plain(getattr(job, each.name)) for each in fields(job) if each.name not in left_out},
        "width": width,
        "height": height,
        "drawn_size": [job.width, job.height],
        "strength": job.strength if has_start else None,
        "image_guidance": job.image_guidance if job.drops_picture else None,
        "timestep_spacing": plan.noise.spacing_for(sampler, job.schedule),
        "guidance_start": plan.cfg_interval.start,
        "guidance_end": plan.cfg_interval.end,
        "guidance_rescale": plan.guidance_rescale,
        **_model_facts(plan, sampler),
        "networks": _networks(plan, job),
        "network_pre_calc": plan.networks.pre_calculated,
        "control_nets": _control_nets(plan, job),
        "control_net_together": plan.control_nets.together,
        "first_stage": job.stage == 1,
        "highres": None if plan.highres is None or job.stage == 1 else _highres(job, plan.highres),
        "upscale": None if job.upscale == 1 else _upscale(job, plan.upscaler),
        "gradual_latent": None if job.gradual_latent.timesteps is None else plain(job.gradual_latent),
        "deep_shrink": None if job.deep_shrink.depth_1 is None else plain(job.deep_shrink),
        "loss_guidance": _loss_guidance(plan, job),
        "tile": plan.tiling.size_px,
        "tile_overlap": None if plan.tiling.size_px is None else plan.tiling.overlap_px,
        **_masks(plan.masks, job),
        "format": plan.output.suffix.removeprefix("."),
        "quality": None if plan.output.suffix == ".png" else plan.output.quality,
        **({"sweep": _place(job.cell)} if job.cell else {}),
    }


def _place(cell: SweepCell) -> dict[str, object]:
    """What a sweep sets for a picture, and which pictures differ by that alone: those of one image number."""
    return {"image": cell.image, "line": cell.line, "values": [{"name": n, "value": v} for n, v in cell.values]}


def to_json(facts: Mapping[str, object]) -> str:
    """One line of JSON."""
    return json.dumps(facts)


def plain(value: object) -> object:
    """A value as JSON has it: settings as objects, paths as texts.

    Raises:
        TypeError: for a value of any other kind.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    raise TypeError(f"{type(value).__name__} has no form in JSON; say in picture_facts.py how it is told")


def _masks(masks: MaskSettings, job: Job) -> dict[str, object]:
    """How maps of regions are read, and masks where the picture has one."""
    told: dict[str, object] = {
        "mask_from_alpha": masks.from_alpha,
        "mask_invert": masks.invert and job.mask is not None,
        "mask_blur": masks.blur_px,
        "fill": masks.fill,
        "inpaint_area": AREAS[masks.masked_area],
        "inpaint_padding": masks.padding_px if masks.masked_area else None,
        "inpaint_regions": REGIONS[masks.each_region] if masks.masked_area else None,
    }
    if not job.is_masked:  # a map of regions is none
        told = dict.fromkeys(told)
    return {"keep_unmasked": masks.keep_unmasked, "color_codes": masks.color_codes, **told}


def _model_facts(plan: RunPlan, sampler: Sampler) -> dict[str, object]:
    """The model, what is used in place of its parts, and how it reads texts and computes."""
    computing = plan.computing
    return {
        "model": plan.record.model,
        "family": plan.model.family.name,
        "model_kind": plan.model.inputs.kind,
        "prediction_type": plan.noise.prediction_type,
        "zero_terminal_snr": plan.noise.zero_snr_for(sampler),
        "vae": plan.record.options.get("vae"),
        "vae_in_float32": computing.no_half_vae,
        "precision": "fp16" if computing.fp16 else "bf16" if computing.bf16 else "fp32",
        "clip_skip": plan.text.clip_skip,
        "emb_normalize_mode": plan.text.normalization,
        "zero_empty_negative": plan.text.zero_empty_negative,
        "max_embeddings_multiples": plan.text.max_chunks,
        "embeddings": [
            {"word": embedding.word, "tokens": embedding.tokens, "xti": embedding.layers > 1}
            for embedding in plan.text.embeddings
        ],
    }


def _networks(plan: RunPlan, job: Job) -> list[object]:
    return [
        {
            "name": spec.name,
            "file": str(spec.weights.path),
            "module": spec.module,
            "arguments": plain(spec.arguments),
            "multiplier": str(strength) if strength.number is None else strength.number,
            "merged": merged,
        }
        for spec, strength, merged in plan.networks.in_picture(job.all_strengths)
    ]


def _control_nets(plan: RunPlan, job: Job) -> list[object]:
    return [
        {
            "name": spec.name,
            "file": str(spec.path),
            "lllite": isinstance(spec.file, LLLiteFile),
            "is_difference": isinstance(spec.file, ControlNetFile) and spec.file.is_difference,
            "kind": spec.control.kind,
            "preprocess": plain(how.facts()) if (how := spec.control.preprocess) else None,
            "canny": _canny(how),
            "weight": spec.control.weight,
            "start": spec.control.start,
            "end": spec.control.end,
            "guide": str(guide),
        }
        for spec, guide in zip(plan.control_nets.specs, job.guides)
    ]


def _canny(how: Preprocess | None) -> dict[str, object] | None:
    """Canny's thresholds alone, as earlier versions told them."""
    return None if how is None or how.name != "canny" else {"low": how.numbers[0], "high": how.numbers[1]}


def _highres(job: Job, highres: HighresFix) -> dict[str, object]:
    """Highres. fix's first stage, and how its picture is enlarged."""
    first, *_ = stages(job, highres)
    settings = {each.name: getattr(highres, each.name) for each in fields(highres) if each.name != "save_first"}
    settings["upscaler"] = _upscaler(highres.upscaler)
    settings |= {"width": first.width, "height": first.height, "steps": first.steps}
    return {name: plain(value) for name, value in settings.items()}


def _upscale(job: Job, upscaler: UpscalerSpec | None) -> dict[str, object]:
    """How the finished picture is enlarged."""
    return {"factor": job.upscale, "upscaler": _upscaler(upscaler)}


def _upscaler(upscaler: UpscalerSpec | None) -> dict[str, object] | None:
    return None if upscaler is None else {"module": upscaler.module, "arguments": dict(upscaler.arguments)}


def _loss_guidance(plan: RunPlan, job: Job) -> dict[str, object] | None:
    """Guidance by CLIP and VGG16, and what it draws towards."""
    guidance, models = plan.loss_guidance, plan.loss_guidance_files
    if not guidance.uses_anything:
        return None
    return {
        **{each.name: plain(getattr(guidance, each.name)) for each in fields(guidance)},
        "clip_prompt": (job.clip_prompt or job.prompt) if guidance.clip_scale else None,
        "guide": plain(job.goal) if guidance.uses_goal_picture else None,
        "clip_model": None if models.clip is None else str(models.clip.weights.path.parent),
        "vgg16_model": None if models.vgg16 is None else str(models.vgg16.path),
    }
