"""What each picture is sampled with: the words of options and prompt lines brought together, and checked."""

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from library.errors import InputError
from library.files.prediction import Prediction
from library.plan.job import Job, JobSettings
from library.settings import noise_schedule
from library.settings.loss_guidance import GUIDED_SAMPLERS, NO_LOSS_GUIDANCE, LossGuidanceSettings
from library.settings.noise_schedule import NoiseSchedule
from library.settings.options import Options
from library.settings.sampler_names import first_name
from library.settings.samplers import NOISE_LEVELS, OWN, SAMPLERS, Sampler
from library.values import MAX_STEPS

logger = logging.getLogger(__name__)

_USUAL = Prediction("epsilon")


def settings_of(options: Options) -> dict[str, Any]:
    """The settings of jobs (`JobSettings`) that the options give.

    Raises:
        InputError: for options that contradict each other.
    """
    said = {"sampler": options.sampler, "timesteps": options.timesteps or ()}
    said |= {"schedule": options.schedule} if "schedule" in options.said else {}
    said |= {"steps": options.steps} if "steps" in options.said else {}
    usual = JobSettings(steps=options.steps, schedule=first_name(options.schedule))
    settings = {"steps": options.steps, "eta": options.eta, "s_churn": options.s_churn}
    return settings | _resolved(said, usual, usual, "", ("--schedule", "--steps"))


def from_options(options: Options, prediction: Prediction, guidance: LossGuidanceSettings) -> "Sampling":
    """What the options, the model and guidance by CLIP and VGG16 mean for the samplers of all pictures."""
    return Sampling(
        options.steps,
        options.schedule,
        prediction,
        needs_zero_snr=options.zero_terminal_snr,
        guidance=guidance,
        first_steps=options.highres_fix_steps,
    )


class Sampling:
    """Brings together what lines and options say of samplers, and refuses what does not go together.

    Args:
        steps: what `--steps` says; for a line that does without the command line's `--timesteps`.
        schedule: what `--schedule` says; for a line whose sampler's name holds none.
        prediction: of the model.
        needs_zero_snr: `--zero_terminal_snr` is given.
        guidance: by CLIP and VGG16, which looks at the picture that a step promises.
        first_steps: what `--highres_fix_steps` says.
    """

    def __init__(
        self,
        steps: int = 50,
        schedule: str = OWN,
        prediction: Prediction = _USUAL,
        *,
        needs_zero_snr: bool = False,
        guidance: LossGuidanceSettings = NO_LOSS_GUIDANCE,
        first_steps: int | None = None,
    ) -> None:
        self._usual = JobSettings(steps=steps, schedule=first_name(schedule))
        self.noise: NoiseSchedule = noise_schedule.of_model(prediction)
        self._stated = prediction.spacing
        self._needs_zero_snr, self._guidance, self._first_steps = needs_zero_snr, guidance, first_steps
        self._told: set[str] = set()

    def resolve(self, said: Mapping[str, Any], defaults: JobSettings, where: str) -> dict[str, Any]:
        """A line's settings, by `PromptOption.sets`, with what they mean for others.

        Raises:
            InputError: where they contradict each other.
        """
        return _resolved(said, defaults, self._usual, where, ("--schedule", "--s"))

    def check(self, job: Job) -> None:
        """Refuse steps and settings that a job's sampler cannot do, and warn of what it does badly.

        Raises:
            InputError: with the line's place.
        """
        self.check_sampler(job, job.where)
        sampler = SAMPLERS[job.sampler]
        fewest, most = sampler.steps
        if not fewest <= job.steps <= most:
            problem = f"the sampler {sampler.name} does {fewest} to {most} steps; use as many or another sampler"
            raise InputError(f"{job.steps} steps", problem, job.where)
        is_trailing = self.noise.spacing_for(sampler, job.schedule) == "trailing" and not job.timesteps
        if is_trailing and not _has_trailing(job.steps):
            fewer = next(filter(_has_trailing, range(job.steps, 0, -1)))
            problem = f"diffusers spaces one too many; use {fewer} steps, or another schedule than trailing"
            raise InputError(f"{job.steps} steps", problem, job.where)
        if job.guidance_scale > sampler.highest_scale:
            place = f"{job.where}: " if job.where else ""
            advice = f"the sampler {sampler.name} is made for a scale of 1 to {sampler.highest_scale:g}"
            logger.warning("%sguidance scale %g: %s", place, job.guidance_scale, advice)

    def check_sampler(self, settings: JobSettings, where: str = "") -> None:
        """Refuse what does not go with settings' sampler, whatever the picture.

        Raises:
            InputError: with the line's place.
        """
        sampler = SAMPLERS[settings.sampler]
        _check_schedule(sampler, settings, where)
        if settings.eta is not None and sampler.eta is None:
            advice = f"{_able(lambda s: s.eta is not None)}, or leave it out (in a line: --eta none)"
            problem = f"{sampler.name} has no share of noise to choose; {advice}"
            raise InputError(f"--eta {settings.eta:g}", problem, where)
        if settings.s_churn and not sampler.churns:
            advice = f"{_able(lambda s: s.churns)}, or leave it out (in a line: --s_churn 0)"
            problem = f"{sampler.name} has no noise stirred in; {advice}"
            raise InputError(f"--s_churn {settings.s_churn:g}", problem, where)
        if settings.timesteps and self._first_steps not in (None, len(settings.timesteps)):
            problem = f"both stages go through the {len(settings.timesteps)} --timesteps; leave it out"
            raise InputError(f"--highres_fix_steps {self._first_steps}", problem, where)
        self._check_zero_snr(sampler, settings, where)
        if self._guidance.uses_anything and sampler.name not in GUIDED_SAMPLERS:
            problem = f"cannot be guided by CLIP or VGG16; use one of {', '.join(GUIDED_SAMPLERS)} (k_lms)"
            raise InputError(f"--sampler {sampler.name}", problem, where)

    def _check_zero_snr(self, sampler: Sampler, settings: JobSettings, where: str) -> None:
        zero = self.noise.zero_snr_for(sampler)
        if self.noise.zero_snr and not zero:
            able = _able(lambda s: s.zero_snr)
            if self._needs_zero_snr:
                problem = f"{sampler.name} cannot begin at pure noise; {able}"
                raise InputError("--zero_terminal_snr", problem, where)
            problem = f"{sampler.name} cannot begin at pure noise as the model was trained to; better {able}"
            self._tell(logging.WARNING, f"--sampler: {problem}")
        if zero and self._guidance.uses_anything:
            # these samplers are refused beside the option
            advice = "leave --zero_terminal_snr out" if self._needs_zero_snr else "use --sampler lms or pndm"
            problem = f"finds nothing to look at in the pure noise of zero terminal SNR; {advice}"
            raise InputError("guidance by CLIP or VGG16", problem, where)
        if zero and settings.schedule in NOISE_LEVELS:
            problem = "spends most steps on pure noise with zero terminal SNR; better use trailing"
            self._tell(logging.WARNING, f"--schedule {settings.schedule}: {problem}")
        stated = self._stated
        is_own = settings.schedule == OWN and not settings.timesteps and not zero
        if stated and sampler.spacing and is_own and stated != sampler.spacing:
            # models of few steps need it, others hardly differ
            level = logging.WARNING if stated == "trailing" else logging.INFO
            advice = f"add --schedule {stated} to follow it"
            self._tell(
                level,
                f"the model's scheduler states {stated} timesteps, {sampler.name} has {sampler.spacing}; {advice}",
            )

    def _tell(self, level: int, message: str) -> None:
        """Say something once, not for each picture."""
        if message not in self._told:
            self._told.add(message)
            logger.log(level, "%s", message)


def _resolved(
    said: Mapping[str, Any], defaults: JobSettings, usual: JobSettings, where: str, names: tuple[str, str]
) -> dict[str, Any]:
    """What is said with a sampler's name taken apart; a schedule and steps that it or timesteps mean are added.

    Args:
        said: settings by name.
        defaults: what holds where nothing is said.
        usual: what holds where a sampler or `none` for timesteps is said.
        where: the line's place.
        names: of the options for schedule and steps.
    """
    settings = dict(said)
    if (schedule := settings.get("schedule")) is not None:
        settings["schedule"] = first_name(schedule)
    if (named := settings.get("sampler")) is not None:
        settings["sampler"], implied = named.name, named.schedule
        if implied and settings.setdefault("schedule", implied) != implied:
            problem = f"the sampler's name says {implied}; leave one of them out"
            raise InputError(f"{names[0]} {schedule}", problem, where)
        settings.setdefault("schedule", usual.schedule)
    given = settings.get("timesteps", defaults.timesteps)
    if given and settings.setdefault("steps", len(given)) != len(given):
        problem = f"--timesteps are {len(given)}; leave the steps out" + (
            ", or write --timesteps none" if where else ""
        )
        raise InputError(f"{names[1]} {settings['steps']}", problem, where)
    if not given and defaults.timesteps:
        settings.setdefault("steps", usual.steps)
    return settings


def _has_trailing(steps: int) -> bool:
    """Whether diffusers spaces so many trailing timesteps exactly: its `numpy.arange` ends by a rounded distance."""
    return math.ceil(MAX_STEPS / (MAX_STEPS / steps)) == steps


def _check_schedule(sampler: Sampler, settings: JobSettings, where: str) -> None:
    schedule = settings.schedule
    if settings.timesteps:
        subject = f"--timesteps {','.join(map(str, settings.timesteps))}"
        if not sampler.timesteps:
            advice = f"{_able(lambda s: s.timesteps)}, or leave them out (in a line: --timesteps none)"
            problem = f"{sampler.name} does not take any; {advice}"
            raise InputError(subject, problem, where)
        if schedule != OWN:
            raise InputError(subject, f"are a schedule, and so is {schedule}; leave one of them out", where)
    if schedule not in sampler.schedules:
        has = "a schedule of its own" if len(sampler.schedules) == 1 else f"only {', '.join(sampler.schedules)}"
        problem = f"{sampler.name} has {has}; use such a one, or one of {_names(lambda s: schedule in s.schedules)}"
        raise InputError(f"--schedule {schedule}", problem, where)
    if schedule == "beta" and importlib.util.find_spec("scipy") is None:
        raise InputError("--schedule beta", "needs the package scipy; install it (pip install scipy)", where)


def _names(can: Callable[[Sampler], bool]) -> str:
    return ", ".join(name for name, sampler in SAMPLERS.items() if can(sampler))


def _able(can: Callable[[Sampler], bool]) -> str:
    return f"use one of {_names(can)}"
