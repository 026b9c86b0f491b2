"""From options and prompt lines to a plan: one job for each picture, and the batches they run in. Knows no torch."""

import argparse
import logging
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from library.errors import InputError
from library.model_files import ModelFiles, find_model
from library.output import FileNames, check_folder
from library.prompts import DynamicPrompt, PromptLine, parse_dynamic_prompt, parse_prompt_line
from library.samplers import SAMPLERS, Sampler

logger = logging.getLogger(__name__)

MAX_JOBS = 1_000_000  # in one run; far beyond a night's work, far below what fills the memory
_RANDOM_SEED_LIMIT = 0x7FFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What the command line sets for all pictures and a prompt line may set for its own."""

    negative_prompt: str = ""
    width: int = 512  # pixels
    height: int = 512  # pixels
    steps: int = 50
    guidance_scale: float = 7.5
    negative_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(JobSettings):
    """One picture: all that its making depends on, and where it goes."""

    prompt: str
    seed: int
    raw_prompt: str  # the line as it was written
    where: str  # file and line of it
    file: Path

    @property
    def branches(self) -> int:
        """How many predictions guidance joins at each step: prompt, negative prompt, empty prompt."""
        if self.guidance_scale <= 1:
            return 1
        return 2 if self.negative_scale is None else 3

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the branches, in the order they are put into a batch."""
        return {
            1: (self.prompt,),
            2: (self.negative_prompt, self.prompt),
            3: (self.negative_prompt, self.prompt, ""),
        }[self.branches]

    @property
    def batch_key(self) -> tuple[int, ...]:
        """Jobs with equal keys can share a batch, if their texts have equally many chunks."""
        return self.width, self.height, self.steps, self.branches


# ---------------------------------------------------------------------------------------------------------------------
# Prompt sources


@dataclass(frozen=True, slots=True)
class SourceLine:
    """One raw prompt line and its place, for messages ("" for one from the command line)."""

    text: str
    where: str = ""


def read_prompt_file(path: str) -> list[SourceLine]:
    """Read a prompt file, or standard input for `-`: one prompt a line, blank lines and `#` comments skipped.

    Raises:
        InputError: when it cannot be read, is not UTF-8, holds a NUL, or holds no prompt.
    """
    subject, name = f"--from_file {path}", "standard input" if path == "-" else path
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as problem:
        raise InputError(subject, f"cannot be read: {problem.strerror}; check the path") from None
    text = _decode(raw, subject)
    lines = []
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
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
        before = raw[: problem.start]
        line = before.count(b"\n") + 1
        column = problem.start - (before.rfind(b"\n") + 1) + 1
        byte = raw[problem.start]
        raise InputError(
            subject, f"line {line}, byte {column}: 0x{byte:02X} is not UTF-8; save the file as UTF-8"
        ) from None
    if (place := text.find("\0")) >= 0:
        raise InputError(
            subject, f"line {text.count(chr(10), 0, place) + 1}: holds a NUL character; save it as plain text"
        )
    return text


def prompt_from_argument(text: str) -> SourceLine:
    """The `--prompt` argument as a line; line breaks within it, as in wrapped command lines, are spaces."""
    return SourceLine(re.sub(r"\s*[\r\n]+\s*", " ", text).strip())


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


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


class JobMaker:
    """Turns prompt lines into jobs.

    Args:
        defaults: the command line's settings.
        images_per_prompt: pictures for a line that does not enumerate its variants.
        seeds: seeds for lines that name none.
        name_file: gives the next picture's file, from its seed.
    """

    def __init__(
        self,
        defaults: JobSettings,
        images_per_prompt: int,
        seeds: SeedSource,
        name_file: Callable[[int], Path],
    ) -> None:
        self.defaults = defaults
        self.images_per_prompt = images_per_prompt
        self.seeds = seeds
        self.name_file = name_file

    def jobs(self, line: SourceLine) -> Iterator[Job]:
        """The jobs of one prompt line.

        Raises:
            InputError: for a fault in the line, with its place.
        """
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
        job = Job(
            **asdict(replace(self.defaults, **overrides)),
            prompt=parsed.prompt,
            seed=seed,
            raw_prompt=line.text,
            where=line.where,
            file=self.name_file(seed),
        )
        if job.negative_scale is not None and job.branches == 1:
            logger.warning(
                "%s", f"{line.where + ': ' if line.where else ''}the negative scale does nothing at guidance scale 1"
            )
        return job


def count_pictures(lines: Sequence[SourceLine], images_per_prompt: int, iterations: int) -> int:
    """How many pictures a run makes.

    Raises:
        InputError: for a fault in a line's dynamic prompt, and for more than `MAX_JOBS`.
    """
    dynamics = [parse_dynamic_prompt(line.text, line.where) for line in lines]
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
        for line in order:
            jobs += maker.jobs(line)
    return jobs


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


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything a run will do, resolved and checked, before any model is loaded."""

    model: ModelFiles
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
    vae_slices: int | None
    outdir: Path
    images_per_prompt: int
    iterations: int
    jobs: tuple[Job, ...]
    keyboard: JobMaker | None  # makes the jobs when prompts come from the keyboard
    preview: bool


def make_plan(options: argparse.Namespace) -> RunPlan:
    """Resolve what the user said, reading every prompt line and every header.

    Raises:
        InputError: for the first thing that cannot work.
    """
    _check_combinations(options)
    lines = _source_lines(options)
    check_folder(options.outdir, "--outdir")
    pictures = count_pictures(lines, options.images_per_prompt, options.n_iter) if lines else None
    defaults = JobSettings(
        width=options.W,
        height=options.H,
        steps=options.steps,
        guidance_scale=options.scale,
        negative_scale=options.negative_scale,
    )
    seeds = SeedSource(options.seed, pictures, same_in_iteration=options.iter_same_seed)
    names = FileNames(options.outdir, sequential=options.sequential_file_name, now=datetime.now())
    maker = JobMaker(defaults, options.images_per_prompt, seeds, names.next)
    shuffle = random.Random(options.seed) if options.shuffle_prompts else None
    jobs = plan_jobs(lines, maker, options.n_iter, shuffle) if lines else []
    model = find_model(options.ckpt, v2=options.v2, v_parameterization=options.v_parameterization, vae=options.vae)
    for warning in model.warnings:
        logger.warning("%s", warning)
    _check_clip_skip(options.clip_skip, model)
    return RunPlan(
        model=model,
        tokenizer_cache_dir=options.tokenizer_cache_dir,
        clip_skip=options.clip_skip,
        max_chunks=options.max_embeddings_multiples,
        sampler=SAMPLERS[options.sampler],
        fp16=options.fp16,
        bf16=options.bf16,
        xformers=options.xformers or options.diffusers_xformers,
        channels_last=options.opt_channels_last,
        batch_size=options.batch_size,
        vae_batch_size=_vae_batch_size(options.vae_batch_size, options.batch_size),
        vae_slices=options.vae_slices,
        outdir=options.outdir,
        images_per_prompt=options.images_per_prompt,
        iterations=options.n_iter,
        jobs=tuple(jobs),
        keyboard=maker if options.interactive else None,
        preview=options.interactive and not options.no_preview,
    )


def _check_combinations(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    sources = [
        f"--{name}" for name in ("prompt", "from_file", "interactive") if getattr(options, name) not in (None, False)
    ]
    if len(sources) > 1:
        raise InputError(" and ".join(sources), "are two sources of prompts; give one")
    if not sources:
        raise InputError("--prompt", "is missing; give --prompt TEXT, --from_file FILE or --interactive")
    if options.fp16 and options.bf16:
        raise InputError("--fp16 and --bf16", "are two precisions; give one")


def _source_lines(options: argparse.Namespace) -> list[SourceLine]:
    if options.from_file is not None:
        return read_prompt_file(options.from_file)
    return [prompt_from_argument(options.prompt)] if options.prompt is not None else []


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
