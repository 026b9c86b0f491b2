"""From options to a plan, reading every prompt line and every header."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial

from library.errors import InputError
from library.files.model_files import ModelFiles, find_model
from library.files.model_inputs import PLAIN
from library.files.textual_inversion import find_embeddings
from library.files.weight_types import check_model
from library.plan import earlier_runs, engine, model_inputs, redrawing, sampling, sweep
from library.plan.canvas import MAX_REGIONS
from library.plan.file_names import FileNames, check_folder, guide_name, sheet_name
from library.plan.job import Job, JobSettings
from library.plan.job_checks import check_networks
from library.plan.job_maker import JobMaker, NameFile
from library.plan.parts import make_record, plan_parts
from library.plan.prompt_syntax import WEB_UI
from library.plan.run_checks import check_use, warn_of_pictures
from library.plan.run_plan import Keyboard, RunPlan, TextPlan
from library.plan.run_record import RunRecord
from library.plan.seeds import SeedSource, random_seed
from library.plan.sources import SourceLine, Sources, find_sources, run_negative, source_lines
from library.plan.sweep import Sweep
from library.plan.textual_inversion import warn_of_unused
from library.plan.tokens import MOST_CHUNKS, WEB_UI_MOVED_TOKENS
from library.plan.wildcards import Wildcards
from library.settings import (
    cfg_interval,
    computing,
    control_net,
    deep_shrink,
    fleet,
    gradual_latent,
    highres,
    loss_guidance,
    masks,
    output,
    repeats,
    sizes,
    tiling,
    upscaler,
)
from library.settings.loss_guidance import LossGuidanceSettings
from library.settings.masks import MaskSettings
from library.settings.options import Options
from library.settings.preprocessing import Preprocess
from networks.files import NetworkPlan, plan_networks
from networks.tags import TaggedNetworks

logger = logging.getLogger(__name__)


def make_plan(options: Options, shared: Mapping[str, object] | None = None) -> RunPlan:
    """Resolve what the user said.

    Args:
        options: what the user said.
        shared: the plan of the process that this one works beside (see `RunPlan.to_share`).

    Raises:
        InputError: for the first thing that cannot work.
    """
    options, lines_told = redrawing.redrawn(options)
    options.check()
    enlarger = upscaler.from_options(options)
    two_stages, interval = highres.from_options(options, enlarger), cfg_interval.from_options(options)
    guidance, out = loss_guidance.from_options(options), output.from_options(options)
    redrawn, tiles, swept = masks.from_options(options), tiling.from_options(options), sweep.from_options(options)
    machines = fleet.from_options(options)
    sources = find_sources(options, redrawn)
    lines = lines_told or source_lines(options, sources)
    check_folder(out.folder, "--outdir")
    earlier = _earlier_run(options, lines, shared)
    begun = earlier.record if earlier else None
    counts = _as_begun(repeats.from_options(options), begun)
    model = _find_model(options, two_stages, guidance)
    networks = plan_networks(options, model)
    tagged = TaggedNetworks(options.network_dir, model)
    seed = options.seed if options.seed is not None else random_seed()
    maker = JobMaker(
        *(_job_defaults(options, model, networks), counts.images_per_prompt, model.family, sources, two_stages),
        check=partial(_check_job, options.control_net_preps or (), networks, model, redrawn),
        loss_guidance=guidance,
        sampling=sampling.from_options(options, model.prediction, guidance),
        unet_config=model.unet.config,
        syntax=options.prompt_syntax,
        wildcards=_wildcards(options),
        tagged=tagged,
        masks=redrawn,
        tiling=tiles,
        sweep=swept,
    )
    name_file = _file_names(options, out, begun, model.name, two_stages=two_stages is not None).next
    if options.interactive:  # other runs have lines, which may say otherwise
        maker.sampling.check_sampler(maker.defaults)
    jobs, parts = plan_parts(lines, maker, seed, name_file, counts, out.folder, begun)
    networks = tagged.added_to(networks)
    text = _text_plan(options, model, networks)  # files of networks may hold embeddings
    control_nets = control_net.from_options(options, model.family, model.unet)
    computed_by = engine.from_options(options, networks, control_nets, guidance)
    if lines:
        check_use(options, interval, sources, jobs)
        warn_of_unused(text.embeddings, jobs)
        warn_of_pictures(jobs, model, tiles, counts)
        computed_by.warn(jobs)
    return RunPlan(
        options=options,
        model=model,
        text=text,
        noise=maker.sampling.noise,
        cfg_interval=interval,
        highres=two_stages,
        upscaler=enlarger,
        networks=networks,
        loss_guidance=guidance,
        record=make_record(options, model, sources.files, parts, begun, [*maker.wildcards.files, *tagged.files]),
        loss_guidance_files=loss_guidance.find_models(options, guidance),
        control_nets=control_nets,
        masks=redrawn,
        tiling=tiles,
        engine=computed_by,
        computing=computing.from_options(options, one_at_a_time=_follows_another(guidance, sources, swept, machines)),
        fleet=machines,
        output=out,
        repeats=counts,
        sweep=swept,
        defaults=maker.defaults,
        jobs=tuple(jobs),
        done=earlier_runs.finished(earlier, out.folder, jobs) if earlier else {},
        resumed=earlier is not None,
        keyboard=_keyboard(maker, seed, counts, name_file) if options.interactive else None,
    )


def _keyboard(maker: JobMaker, seed: int, counts: repeats.Repeats, name_file: NameFile) -> Keyboard:
    """What makes jobs of the lines that are typed in."""
    return Keyboard(maker, SeedSource(seed, None, same_in_iteration=counts.same_seed_in_iteration), name_file)


def _earlier_run(
    options: Options, lines: Sequence[SourceLine], shared: Mapping[str, object] | None
) -> earlier_runs.KnownRun | None:
    """The run that this one goes on with: that of the process beside it, or the one that `--resume` finds."""
    if shared:
        return earlier_runs.shared_run(shared)
    return earlier_runs.find_run(options, lines) if options.resume else None


def _as_begun(counts: repeats.Repeats, begun: RunRecord | None) -> repeats.Repeats:
    """How often prompts are drawn, in a run that is gone on with: version 0.1.0 wrote down one picture a prompt."""
    if begun is None or counts.images_per_prompt is not None:
        return counts
    return replace(counts, images_per_prompt=begun.options.get("images_per_prompt"))


def _follows_another(
    guidance: LossGuidanceSettings, sources: Sources, swept: Sweep, machines: fleet.Fleet | None
) -> bool:
    """Whether each picture is guided by the one before it.

    Raises:
        InputError: when that one is another combination of a sweep, or drawn by another worker.
    """
    follows = guidance.uses_goal_picture and not sources.guides
    if follows and machines:
        problem = (
            "each picture would be guided by the one before it, that another worker draws; give --guide_image_path"
        )
        raise InputError("--ray", f"{problem}, or leave it out")
    if follows and swept.axes:
        problem = "each picture would be guided by the combination before it; give --guide_image_path"
        raise InputError(f"--sweep {swept.axes[0]}", problem)
    if follows:
        logger.warning("no --guide_image_path: each picture is guided by the one before it, one at a time")
    return follows


def _check_job(
    preps: Sequence[Preprocess | None], networks: NetworkPlan, model: ModelFiles, redrawn: MaskSettings, job: Job
) -> None:
    """Refuse what the run's model, networks and guides cannot do for a job."""
    check_networks(networks, model, job)
    model_inputs.check_job(model, redrawn, job)
    if not job.is_masked and any(how is not None and how.by.by_mask for how in preps):
        problem = "needs the picture's mask; give --image_path and --mask_path, and no prompt with AND"
        raise InputError("--control_net_preps inpaint", problem, job.where)


def _find_model(options: Options, two_stages: highres.HighresFix | None, guidance: LossGuidanceSettings) -> ModelFiles:
    """Find the model, check it and what it is asked for, and tell what is doubtful about it."""
    model = find_model(
        options.ckpt,
        v2=options.v2,
        v_parameterization=options.v_parameterization,
        zero_terminal_snr=options.zero_terminal_snr,
        vae=options.vae,
    )
    check_model(model)
    _tell(model.prediction.notes, model.prediction.warnings)
    if model.inputs is not PLAIN:
        logger.info("the model is %s (a U-Net with %d input channels)", model.inputs.name, model.inputs.channels)
    if options.zero_empty_negative and not model.family.told_sizes:
        problem = f"is for models that were trained so, as those of SDXL were; leave it out with {model.family.name}"
        raise InputError("--zero_empty_negative", problem)
    layers = min(text.config["num_hidden_layers"] for text in model.texts)
    if (options.clip_skip or 1) > layers:
        problem = f"this model's text encoder has {layers} layers; use 1 to {layers}"
        raise InputError(f"--clip_skip {options.clip_skip}", problem)
    highres.check_family(two_stages, model.family)
    model_inputs.check_run(options, model, guidance)
    return model


def _tell(notes: Iterable[str], warnings: Iterable[str]) -> None:
    for note in notes:
        logger.info("%s", note)
    for warning in warnings:
        logger.warning("%s", warning)


def _text_plan(options: Options, model: ModelFiles, networks: NetworkPlan) -> TextPlan:
    """How prompts are read by this model."""
    files, xti_files = options.textual_inversion_embeddings or [], options.XTI_embeddings or []
    embeddings = find_embeddings(files, xti_files, model, [spec.weights for spec in networks.specs])
    return TextPlan(
        model=model,
        embeddings=embeddings,
        clip_skip=options.clip_skip or model.family.clip_skip,
        normalization=options.emb_normalize_mode,
        zero_empty_negative=options.zero_empty_negative,
        max_chunks=_max_chunks(options),
        moved_tokens=WEB_UI_MOVED_TOKENS if options.prompt_syntax == WEB_UI else 0,
        tokenizer_cache_dir=options.tokenizer_cache_dir,
    )


def _wildcards(options: Options) -> Wildcards:
    """The wildcards that lines may name."""
    if options.wildcard_dir is None:
        return Wildcards()
    from library.files.wildcards import WildcardFolder  # which imports a reader of YAML

    return Wildcards(WildcardFolder(options.wildcard_dir))


def _max_chunks(options: Options) -> int:
    """How long prompts may be; the web UI, whose syntax it may be, cuts none off."""
    if options.prompt_syntax == WEB_UI and "max_embeddings_multiples" not in options.said:
        return MOST_CHUNKS
    return options.max_embeddings_multiples


def _job_defaults(options: Options, model: ModelFiles, networks: NetworkPlan) -> JobSettings:
    """What holds for pictures whose prompt line says nothing else."""
    return JobSettings(
        negative_prompt=run_negative(options.negative_prompt, options.prompt_syntax),
        width=options.W,
        height=options.H,
        guidance_scale=options.scale,
        negative_scale=options.negative_scale,
        gradual_latent=gradual_latent.from_options(options),
        deep_shrink=deep_shrink.from_options(options),
        network_multipliers=networks.multipliers,
        sizes=sizes.from_options(options),
        upscale=options.upscale or 1.0,
        **sampling.settings_of(options),
        **model_inputs.settings_of(options, model),
    )


def _file_names(
    options: Options, out: output.OutputSettings, begun: RunRecord | None, model: str, *, two_stages: bool
) -> FileNames:
    """The names of the run's files, past those of the run that it goes on with."""
    guides = len(options.control_net_models or ()) if options.control_net_save_guides else 0
    return FileNames(
        out.folder,
        sequential=out.sequential_names,
        original=out.original_names,
        pattern=out.name_pattern,
        model=model,
        now=datetime.now(),
        two_stages=two_stages,
        suffix=out.suffix,
        taken=[name for part in begun.parts for name in part.files] if begun else (),
        beside=[guide_name("", guides, MAX_REGIONS)] * bool(guides) + [sheet_name("")] * out.sheets,
    )
