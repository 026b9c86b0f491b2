"""Jobs as prompt lines again."""

from dataclasses import astuple, is_dataclass
from operator import attrgetter

from library.plan.job import Job, JobSettings
from library.plan.prompt_lines import PROMPT_OPTIONS
from library.plan.prompt_syntax import WEB_UI, with_hashes_escaped
from networks.strengths import Strength


def prompt_line(job: Job, defaults: JobSettings, size_px: int) -> str:
    """A prompt line that makes a job's picture again.

    Args:
        job: the picture.
        defaults: of the command line that the line is to be under.
        size_px: of a picture's sides where neither that nor a source picture tells.
    """
    texts = [job.prompt]
    for option in PROMPT_OPTIONS.values():
        if option.sets == "seeds":
            texts.append(f"--{option.name} {job.seed}")
            continue
        value, implied = (attrgetter(option.sets)(settings) for settings in (job, defaults))
        if option.sets in ("width", "height"):
            implied = None if job.source else implied or size_px
        # a sampler or timesteps in the line mean a schedule and steps of their own
        other = {"schedule": "sampler", "steps": "timesteps"}.get(option.sets)
        if value != implied or (other and getattr(job, other) != getattr(defaults, other)):
            texts.append(f"--{option.name} {as_typed(value)}")
    line = " ".join(texts)
    if job.prompt_syntax == WEB_UI:
        line = with_hashes_escaped(line)
    return f" {line}" if line.startswith("#") else line  # not a comment


def as_typed(value: object) -> str:
    """A setting as an option's value in a prompt line."""
    if value is None or value == ():
        return "none"
    if isinstance(value, Strength):
        return str(value) if value.number is None else str(value.number)
    if is_dataclass(value) and not isinstance(value, type):
        value = astuple(value)
    if isinstance(value, tuple):
        return ",".join(map(as_typed, value))
    return str(int(value)) if isinstance(value, bool) else str(value)
