"""From options to a plan: what a run will do, resolved and checked before a model is loaded. Knows no torch."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from library.console import say
from library.errors import InputError
from library.files.model_files import ModelFiles, find_model
from library.files.picture_files import DEFAULT_QUALITY
from library.files.pictures import check_picture, find_pictures, read_picture, read_prompt, region_color
from library.files.textual_inversion import Embedding, find_embeddings
from library.plan import parts as resume
from library.plan.file_names import FileNames, check_folder
from library.plan.jobs import (
    Job,
    JobMaker,
    JobSettings,
    SeedSource,
    SourceLine,
    SourcePicture,
    Sources,
    random_seed,
)
from library.plan.prompts import one_line
from library.plan.run_record import RunRecord
from library.run.manifest import finished
from library.settings.cfg_interval import WHOLE_RUN, GuidanceInterval
from library.settings.control_net import ControlNetSpec, plan_control_nets
from library.settings.deep_shrink import DeepShrink
from library.settings.gradual_latent import GradualLatent
from library.settings.highres import DEFAULT_FIRST_STEPS, HighresFix, UpscalerSpec, check_upscaler
from library.settings.loss_guidance import GuidanceFiles, GuidanceSettings, find_guidance_models, guidance_settings
from library.settings.samplers import SAMPLERS, Sampler
from networks.files import OWN_MODULE, NetworkPlan, describe_metadata, plan_networks

logger = logging.getLogger(__name__)

Part = TypeVar("Part")
_LINE_END = re.compile(r"\r\n|\n|\r")

# ---------------------------------------------------------------------------------------------------------------------
# Prompt sources


def read_prompt_file(path: str) -> list[SourceLine]:
    """Read a prompt file, or standard input for `-`: one prompt a line, blank lines and `#` comments skipped.

    Raises:
        InputError: when it cannot be read, is not UTF-8, holds a NUL, or holds no prompt.
    """
    subject, name = f"--from_file {path}", "standard input" if path == "-" else path
    if path == "-" and sys.stdin is None:
        raise InputError(subject, "standard input is closed; give a file")
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(subject, f"cannot be read: {reason}; check the path") from None
    text = _decode(raw, subject)
    lines = []
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if line.strip() and not line.startswith("#"):
            lines.append(SourceLine(line, f"{name}:{number}"))
    if not lines:
        raise InputError(subject, "holds no prompt, only blank lines and comments; write one prompt a line")
    return lines


def _decode(raw: bytes, subject: str) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(subject, "line 1, byte 1: the file is UTF-16; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        lines = re.split(rb"\r\n|\n|\r", raw[: problem.start])
        place = f"line {len(lines)}, byte {len(lines[-1]) + 1}"
        raise InputError(subject, f"{place}: 0x{raw[problem.start]:02X} is not UTF-8; save the file as UTF-8") from None
    if (place := text.find("\0")) >= 0:
        lines = _LINE_END.split(text[:place])
        raise InputError(subject, f"line {len(lines)}: holds a NUL character; save it as plain text")
    return text


def typed_line(text: str, subject: str) -> SourceLine:
    """A prompt line from the command line or the keyboard; line breaks within it, as in wrapped commands, are spaces.

    Raises:
        InputError: when it is not UTF-8, or holds a NUL.
    """
    try:
        text = os.fsencode(text).decode("utf-8")  # whatever the locale's encoding is
    except UnicodeError:
        raise InputError(subject, "the text is not UTF-8; set the terminal to UTF-8") from None
    if "\0" in text:
        raise InputError(subject, "the text holds a NUL character; leave it out")
    return SourceLine(one_line(text))


# ---------------------------------------------------------------------------------------------------------------------
# The run

# the options that make use of guide pictures
_GUIDE_USERS = ("--control_net_models", "--clip_image_guidance_scale", "--vgg16_guidance_scale")


# options that a plan holds as they were given
_AS_GIVEN = (
    *("tokenizer_cache_dir", "clip_skip", "fp16", "bf16", "compile", "vae_slices", "keep_unmasked"),
    *("outdir", "images_per_prompt", "dry_run", "json", "grid", "html"),
)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything a run will do, resolved and checked, before any model is loaded."""

    model: ModelFiles
    networks: NetworkPlan
    embeddings: tuple[Embedding, ...]
    guidance: GuidanceSettings
    guidance_files: GuidanceFiles
    guidance_interval: GuidanceInterval
    tokenizer_cache_dir: Path | None
    clip_skip: int
    max_chunks: int
    sampler: Sampler
    fp16: bool
    bf16: bool
    xformers: bool
    channels_last: bool
    batch_size: int
    vae_batch_size: int
    compile: bool  # the U-Net
    low_vram: bool  # text encoder and VAE leave the device while they are not used
    vae_slices: int | None
    keep_unmasked: bool
    region_color_codes: int | None
    highres: HighresFix | None
    control_nets: tuple[ControlNetSpec, ...]
    control_nets_together: bool
    save_guides: bool
    outdir: Path
    images_per_prompt: int
    iterations: int
    defaults: JobSettings
    jobs: tuple[Job, ...]
    record: RunRecord | None  # what makes the run the same one when it is gone on with; None in interactive use
    done: Mapping[int, Path]  # pictures that an earlier process has made, by their place in `jobs`
    resumed: bool
    keyboard: JobMaker | None  # makes the jobs when prompts come from the keyboard
    preview: bool
    dry_run: bool
    json: bool
    quality: int
    grid: bool
    html: bool
    same_seed_in_iteration: bool

    @property
    def to_do(self) -> list[Job]:
        """The pictures that are still to be made."""
        return [job for place, job in enumerate(self.jobs) if place not in self.done]

    def to_share(self) -> dict[str, object]:
        """What other processes need to plan the same run, as plain data."""
        return {"record": self.record.to_json(), "done": {place: file.name for place, file in self.done.items()}}


def make_plan(options: argparse.Namespace, shared: Mapping[str, object] | None = None) -> RunPlan:
    """Resolve what the user said, reading every prompt line and every header.

    Args:
        options: what the user said.
        shared: the plan of the process that this one works beside (see `RunPlan.to_share`).

    Raises:
        InputError: for the first thing that cannot work.
    """
    _check_combinations(options)
    highres = _highres_fix(options)
    guidance = guidance_settings(options)
    interval = GuidanceInterval(options.guidance_start, options.guidance_end)
    sources = _find_sources(options)
    lines = _source_lines(options, sources)
    check_folder(options.outdir, "--outdir")
    earlier = resume.shared_run(shared) if shared else resume.find_run(options, lines) if options.resume else None
    begun = earlier.record if earlier else None
    model = _find_model(options)
    networks = _plan_networks(options, model)
    embeddings = find_embeddings(options.textual_inversion_embeddings or [], options.XTI_embeddings or [], model)
    seed = options.seed if options.seed is not None else random_seed()
    maker = JobMaker(
        _job_defaults(options, networks),
        options.images_per_prompt,
        SeedSource(seed, None, same_in_iteration=options.iter_same_seed),
        _file_names(options, highres, begun).next,
        SAMPLERS[options.sampler],
        sources,
        highres,
        check=partial(_check_regions, networks),
        guidance=guidance,
    )
    jobs, parts = resume.plan_parts(options, lines, maker, seed, begun)
    if lines:
        _check_use(options, sources, interval, jobs)
    batch_size = _batch_size(options, guidance, sources)
    pictures = [*(picture.path for picture in sources.pictures), *sources.masks, *sources.guides]
    record = resume.make_record(options, model, pictures, parts, begun)
    return RunPlan(
        model=model,
        guidance=guidance,
        guidance_files=find_guidance_models(options, guidance),
        guidance_interval=interval,
        networks=networks,
        embeddings=embeddings,
        max_chunks=options.max_embeddings_multiples,
        sampler=maker.sampler,
        xformers=options.xformers or options.diffusers_xformers,
        channels_last=options.opt_channels_last,
        batch_size=batch_size,
        vae_batch_size=_vae_batch_size(options.vae_batch_size, batch_size),
        low_vram=options.lowvram,
        region_color_codes=options.network_regional_mask_max_color_codes,
        highres=highres,
        control_nets=plan_control_nets(options, model.unet.config),
        control_nets_together=options.control_net_together,
        save_guides=options.control_net_save_guides,
        iterations=options.n_iter,
        defaults=maker.defaults,
        jobs=tuple(jobs),
        record=record,
        done=finished(earlier, options.outdir, jobs) if earlier else {},
        resumed=earlier is not None,
        keyboard=maker if options.interactive else None,
        preview=options.interactive and not options.no_preview,
        quality=options.quality or DEFAULT_QUALITY,
        same_seed_in_iteration=options.iter_same_seed,
        **{name: getattr(options, name) for name in _AS_GIVEN},
    )


def _find_model(options: argparse.Namespace) -> ModelFiles:
    """Find and check the model, and tell what is doubtful about it."""
    model = find_model(options.ckpt, v2=options.v2, v_parameterization=options.v_parameterization, vae=options.vae)
    for warning in model.warnings:
        logger.warning("%s", warning)
    _check_clip_skip(options.clip_skip, model)
    return model


def _batch_size(options: argparse.Namespace, guidance: GuidanceSettings, sources: Sources) -> int:
    """How many pictures are drawn at a time: one, where each is guided by the one before it."""
    if guidance.uses_guide and not sources.guides:
        logger.warning("no --guide_image_path: each picture is guided by the one before it, one at a time")
        return 1
    return options.batch_size


def _job_defaults(options: argparse.Namespace, networks: NetworkPlan) -> JobSettings:
    """What holds for pictures whose prompt line says nothing else."""
    return JobSettings(
        width=options.W,
        height=options.H,
        steps=options.steps,
        guidance_scale=options.scale,
        negative_scale=options.negative_scale,
        strength=options.strength,
        gradual_latent=_part(GradualLatent, options, "gradual_latent_", unsharp_params="unsharp"),
        deep_shrink=_part(DeepShrink, options, "ds_"),
        network_multipliers=networks.multipliers,
    )


def _file_names(options: argparse.Namespace, highres: HighresFix | None, begun: RunRecord | None) -> FileNames:
    """The names of the run's files, past those of the run that it goes on with."""
    return FileNames(
        options.outdir,
        sequential=options.sequential_file_name,
        original=options.use_original_file_name,
        now=datetime.now(),
        two_stages=highres is not None,
        suffix=f".{options.format}",
        taken=[name for part in begun.parts for name in part.files] if begun else (),
    )


def _check_use(options: argparse.Namespace, sources: Sources, interval: GuidanceInterval, jobs: Sequence[Job]) -> None:
    """Refuse what was given for all pictures and is used by none."""
    _check_growth_options(options, jobs)
    if interval != WHOLE_RUN and all(job.branches == 1 for job in jobs):
        problem = "there is no guidance at a scale of 1 or less; give a higher --scale, or leave it out"
        name = "guidance_start" if interval.start > 0 else "guidance_end"
        raise InputError(f"--{name} {getattr(options, name):g}", problem)
    if sources.masks and not any(job.mask or job.regions for job in jobs):
        problem = "is for inpainting or for prompts with AND; give --image_path or such a prompt, or leave it out"
        raise InputError(f"--mask_path {options.mask_path}", problem)


def _check_combinations(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    sources = [name for name in ("--prompt", "--from_file", "--interactive") if _given(options, name)]
    if len(sources) > 1:
        raise InputError(" and ".join(sources), "are two sources of prompts; give one")
    if not sources and options.image_path is None:
        raise InputError("--prompt", "is missing; give --prompt TEXT, --from_file FILE or --interactive")
    if options.fp16 and options.bf16:
        raise InputError("--fp16 and --bf16", "are two precisions; give one")
    guides = ("--clip_guidance_scale", "--clip_image_guidance_scale", "--vgg16_guidance_scale")
    for name in ("--compile", "--lowvram"):
        if _given(options, name) and any(_given(options, guide) for guide in guides):
            raise InputError(name, "does not go together with guidance by CLIP or VGG16; leave one out")
    if options.network_regional_mask_max_color_codes is not None and options.mask_path is None:
        raise InputError("--network_regional_mask_max_color_codes", "reads a map of regions; give --mask_path too")
    if options.image_path is None:
        for name in ("--keep_unmasked", "--use_original_file_name"):
            if _given(options, name):
                raise InputError(name, "is for img2img; give --image_path too, or leave it out")
    if options.guide_image_path and not any(_given(options, name) for name in _GUIDE_USERS):
        problem = f"nothing uses it; give {', '.join(_GUIDE_USERS[:-1])} or {_GUIDE_USERS[-1]} too, or leave it out"
        raise InputError("--guide_image_path", problem)
    if options.quality is not None and options.format == "png":
        raise InputError("--quality", "is for WebP and JPEG, PNG loses nothing; give --format too, or leave it out")
    for name in ("--resume", "--dry_run", "--json", "--grid", "--html"):
        if options.interactive and _given(options, name):
            raise InputError(f"{name} and --interactive", "do not go together; give one")
    if options.sequential_file_name and options.use_original_file_name:
        raise InputError("--sequential_file_name and --use_original_file_name", "are two ways to name files; give one")


def _part(kind: type[Part], options: argparse.Namespace, prefix: str, **renamed: str) -> Part:
    """A settings object of the options whose names begin with `prefix`, those that were given."""
    given = {
        renamed.get(name.removeprefix(prefix), name.removeprefix(prefix)): value
        for name, value in vars(options).items()
        if name.startswith(prefix) and value is not None
    }
    return kind(**given)


def _highres_fix(options: argparse.Namespace) -> HighresFix | None:
    """How Highres. fix is done, if it is."""
    names = ("steps", "save_1st", "latents_upscaling", "upscaler", "upscaler_args", "disable_control_net")
    given = [f"--highres_fix_{name}" for name in names if _given(options, f"--highres_fix_{name}")]
    if options.highres_fix_scale is None:
        if given:
            raise InputError(given[0], "is for Highres. fix; give --highres_fix_scale too, or leave it out")
        return None
    if options.image_path is not None:
        problem = "do not go together, Highres. fix draws its own first picture; give one of them"
        raise InputError("--highres_fix_scale and --image_path", problem)
    if options.highres_fix_latents_upscaling and options.highres_fix_upscaler:
        problem = "are two ways of enlarging; give one"
        raise InputError("--highres_fix_latents_upscaling and --highres_fix_upscaler", problem)
    if options.highres_fix_upscaler_args and not options.highres_fix_upscaler:
        raise InputError("--highres_fix_upscaler_args", "has no upscaler; give --highres_fix_upscaler too")
    upscaler = None
    if options.highres_fix_upscaler:
        upscaler = UpscalerSpec(options.highres_fix_upscaler, options.highres_fix_upscaler_args or ())
        check_upscaler(upscaler)
    return HighresFix(
        scale=options.highres_fix_scale,
        steps=options.highres_fix_steps or DEFAULT_FIRST_STEPS,
        save_first=options.highres_fix_save_1st,
        enlarge_latents=options.highres_fix_latents_upscaling,
        upscaler=upscaler,
        control_net=not options.highres_fix_disable_control_net,
    )


def _check_growth_options(options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Refuse options of Gradual Latent and Deep Shrink that no picture of the run uses."""
    for prefix, switch, used in (
        ("gradual_latent_", "gradual_latent_timesteps", any(job.gradual_latent.timesteps is not None for job in jobs)),
        ("ds_", "ds_depth_1", any(job.deep_shrink.depth_1 is not None for job in jobs)),
    ):
        given = [name for name, value in vars(options).items() if name.startswith(prefix) and value is not None]
        if given and not used and switch not in given:
            raise InputError(f"--{given[0]}", f"does nothing by itself; give --{switch} too")


_NETWORK_OPTIONS = (
    *("--network_weights", "--network_mul", "--network_args", "--network_show_meta"),
    *("--network_merge", "--network_merge_n_models", "--network_pre_calc"),
)


def _given(options: argparse.Namespace, name: str) -> bool:
    return getattr(options, name.removeprefix("--")) not in (None, False)


def _plan_networks(options: argparse.Namespace, model: ModelFiles) -> NetworkPlan:
    """Check the networks that the options name, and decide which of them are merged."""
    modules = options.network_module or []
    if not modules:
        for name in _NETWORK_OPTIONS:
            if _given(options, name):
                raise InputError(name, "is for networks; give --network_module too, or leave it out")
        return NetworkPlan()
    merged = len(modules) if options.network_merge else 0
    if (first := options.network_merge_n_models) is not None:
        if first > len(modules):
            subject = f"--network_merge_n_models {first}"
            raise InputError(subject, f"there are {len(modules)} networks; give at most that number")
        merged = first
    if merged and options.network_pre_calc:
        raise InputError("--network_pre_calc", "is for networks that are not merged; leave out one of the two")
    specs = plan_networks(
        modules, options.network_weights or [], options.network_mul or [], options.network_args or [], model
    )
    if options.network_show_meta:
        for spec in specs:
            for line in describe_metadata(spec):
                say(line)
    return NetworkPlan(specs, merged, options.network_pre_calc)


def _check_regions(networks: NetworkPlan, job: Job) -> None:
    """Refuse networks that cannot keep to the regions of a job's parts."""
    if job.regions is None:
        return
    if networks.merged or networks.pre_calculated:
        option = "--network_merge" if networks.merged else "--network_pre_calc"
        problem = "acts on the whole picture, not on the regions of a prompt with AND; leave it out, or --mask_path"
        raise InputError(option, problem, job.where)
    for spec in networks.specs:
        if spec.module != OWN_MODULE:
            problem = f"does not keep to regions; use {OWN_MODULE}, which reads LoRA and its relatives"
            raise InputError(f"--network_module {spec.module}", problem, job.where)
    if len(networks.specs) > len(job.parts):
        problem = f"the prompt has {len(job.parts)} parts (AND), each for one network; add parts or leave out networks"
        raise InputError(f"--network_module, {len(networks.specs)} of them", problem, job.where)


def _find_sources(options: argparse.Namespace) -> Sources:
    """Find and check the pictures that img2img starts from, their masks, and the pictures that guide."""
    pictures = []
    if options.image_path is not None:
        for path in find_pictures(options.image_path, "--image_path"):
            pictures.append(
                SourcePicture(path, *check_picture(path, "--image_path", any_size=options.allow_large_pictures))
            )
    masks = find_pictures(options.mask_path, "--mask_path") if options.mask_path is not None else []
    for mask in masks:
        check_picture(mask, "--mask_path", any_size=options.allow_large_pictures)
        _check_mask(mask, options.network_regional_mask_max_color_codes)
    guides = _find_guides(options, pictures)
    return Sources(tuple(pictures), tuple(masks), guides, max(1, len(options.control_net_models or ())))


def _check_mask(path: Path, color_codes: int | None) -> None:
    """Warn of a mask that is black, and refuse a map of colours that has none of them."""
    mask = read_picture(path, "--mask_path")
    if mask.convert("L").getextrema()[1] == 0:
        problem = "is black all over, so that nothing is repainted, and every region is the whole picture"
        logger.warning("--mask_path %s: %s", path, problem)
    if color_codes is not None:
        found = {color for _, color in mask.getcolors(mask.width * mask.height)}
        wanted = [region_color(part) for part in range(color_codes)]
        if found.isdisjoint(wanted):
            listed = ", ".join(map(str, wanted))
            problem = f"has none of the pure colours {listed}; draw regions in them, without soft edges, as PNG"
            raise InputError(f"--mask_path {path}", problem)


def _find_guides(options: argparse.Namespace, sources: Sequence[SourcePicture]) -> tuple[Path, ...]:
    """Find the guide pictures, and check those that are not among the source pictures, which are checked already."""
    guides = [path for given in options.guide_image_path or () for path in find_pictures(given, "--guide_image_path")]
    for path in set(guides) - {source.path for source in sources}:
        check_picture(path, "--guide_image_path", any_size=options.allow_large_pictures)
    if (nets := len(options.control_net_models or ())) and not guides:
        raise InputError("--control_net_models", "draws after a guide picture; give --guide_image_path too")
    if nets and len(guides) > 1 and len(guides) % nets:
        problem = f"{len(guides)} pictures for {nets} ControlNets; give one, or as many for each ControlNet"
        raise InputError("--guide_image_path", problem)
    return tuple(guides)


def _source_lines(options: argparse.Namespace, sources: Sources) -> list[SourceLine]:
    """The prompt lines of the run; without any, those in the metadata of the source pictures."""
    if options.interactive:
        return []
    if options.from_file is not None:
        return read_prompt_file(options.from_file)
    if options.prompt is not None:
        return [typed_line(options.prompt, "--prompt")]
    lines = []
    for number, picture in enumerate(sources.pictures):
        parsed = read_prompt(picture.path)
        lines.append(SourceLine(parsed.prompt, str(picture.path), parsed, number))
    return lines


def _check_clip_skip(clip_skip: int, model: ModelFiles) -> None:
    layers = model.text_encoder.config["num_hidden_layers"]
    if clip_skip > layers:
        raise InputError(
            f"--clip_skip {clip_skip}", f"this model's text encoder has {layers} layers; use 1 to {layers}"
        )


def _vae_batch_size(size: float | None, batch_size: int) -> int:
    """Pictures the VAE decodes at a time: all of a batch, a number of them, or (below 1) a share of it."""
    if size is None:
        return batch_size
    return max(1, int(batch_size * size)) if size < 1 else int(size)
