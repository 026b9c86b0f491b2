"""The names that people have for samplers and schedules: this program's, second ones, and AUTOMATIC1111's web UI's.

The web UI's may hold a schedule, "DPM++ 2M Karras"; upper and lower case do not matter.
"""

import re
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from library.settings.other_names import is_only_near, meant_sampler, nearest, split_sampler
from library.settings.samplers import NOISE_LEVELS, OWN, SAMPLERS, SECOND_NAMES, SPACINGS

# A schedule's other names → its own. What the web UI chooses by itself ("Automatic") is told by the sampler's name.
_SECOND_SCHEDULES = {"sgm_uniform": "trailing", "uniform": "linspace", "automatic": OWN}
_SCHEDULES = {name: name for name in (OWN, *SPACINGS, *NOISE_LEVELS)} | _SECOND_SCHEDULES
# What the web UI called pairs when a sampler's name held the schedule
_A1111_PAIRS = {
    "karras": (
        *("lms", "dpm_2", "dpm_2_a", "dpmsolver++", "dpmsolver++_sde", "dpmsolver++_sde_heun", "dpmsolver++_3m_sde"),
    ),
    "exponential": ("dpmsolver++_sde", "dpmsolver++_sde_heun", "dpmsolver++_3m_sde"),
}
# Samplers of the web UI that are not here → the nearest
_NOT_HERE = {
    "restart": "heun",
    "dpm++ sde": "dpmsingle_sde",
    "dpm++ 2s a": "dpm_2_a",
    "dpm fast": "dpmsolver",
    "dpm adaptive": "dpmsolver++_3m",
    "ddim cfg++": "ddim",
    "euler cfg++": "euler",
    "euler a cfg++": "euler_a",
    "dpm++ 2m cfg++": "dpmsolver++",
}


@dataclass(frozen=True)
class NamedSampler:
    """What a name says: a sampler's first name, and the schedule where that is in the name, too."""

    name: str
    schedule: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.schedule}" if self.schedule else self.name


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


_SAMPLERS = {
    **{_plain(sampler.a1111_name): name for name, sampler in SAMPLERS.items()},
    **{_plain(second): name for second, name in SECOND_NAMES.items()},
    **{name: name for name in SAMPLERS},
}


def sampler_name(text: str) -> NamedSampler:
    """Convert any name of a sampler."""
    plain = _plain(text)
    if plain in _SAMPLERS:
        return NamedSampler(_SAMPLERS[plain])
    base, schedule = _split(plain)
    if schedule and base in _SAMPLERS:
        return NamedSampler(_SAMPLERS[base], schedule)
    if near := _NOT_HERE.get(base):
        raise ArgumentTypeError(f"the web UI's sampler of that name is not here; the nearest is {near}")
    pairs = [a1111_name(name, schedule) for schedule, names in _A1111_PAIRS.items() for name in names]
    shown = {_plain(name): name for name in (*pairs, *(s.a1111_name for s in SAMPLERS.values()))}
    shown |= {name: name for name in (*SAMPLERS, *SECOND_NAMES)}
    if ours := meant_sampler(text):
        raise ArgumentTypeError(f"no such sampler; the nearest here is {ours}")
    close = nearest(plain, shown)
    hint = f"did you mean {shown[close]}?" if close else f"known are {', '.join([*SAMPLERS, *SECOND_NAMES])}"
    raise ArgumentTypeError(f"no such sampler; {hint}")


def told_sampler(text: str) -> tuple[NamedSampler | None, bool]:
    """What another program's name of a sampler is here, and whether it is the same one or only the nearest."""
    text = re.sub(r"[ _]gpu(?=$|[ _])", "", text, flags=re.IGNORECASE)  # where its noise is drawn
    with suppress(ArgumentTypeError):
        return sampler_name(text), True
    base, schedule = _split(_plain(text))
    if (near := _NOT_HERE.get(base)) is not None:
        return NamedSampler(near, schedule), False
    if (meant := meant_sampler(text)) is None:
        base, schedule = split_sampler(text)
        with suppress(ArgumentTypeError):
            return NamedSampler(sampler_name(base).name, schedule.strip() or None), True
        return None, False
    name, _, schedule = meant.partition(" ")
    return NamedSampler(name, schedule or None), not is_only_near(text)


# ComfyUI's and Forge's schedules that are others' here, by how they space timesteps or noise levels
_SAME_SCHEDULES = {"normal": "linspace", "simple": "trailing", "ddim_uniform": "leading", "ddim": "leading"}
_SAME_SCHEDULES |= {"polyexponential": "exponential", "": OWN, "none": OWN}
_SAME_SCHEDULES |= {"lcm": OWN, "tcd": OWN}  # of distilled models


def told_schedule(text: str) -> str | None:
    """The first name here of another program's schedule; None where there is none like it."""
    plain = _plain(text).replace(" ", "_")
    return _SAME_SCHEDULES.get(plain) or _SCHEDULES.get(plain)


def _split(plain: str) -> tuple[str, str | None]:
    """The sampler's part of a name, and the schedule that it ends with."""
    for name, schedule in _SCHEDULES.items():
        base = plain.removesuffix(" " + name.replace("_", " "))
        if base != plain:
            return base, schedule
    return plain, None


def schedule_name(text: str) -> str:
    """Convert any name of a schedule; a second one stays, see `first_name`."""
    plain = _plain(text).replace(" ", "_")
    if plain not in _SCHEDULES:
        near = nearest(plain, _SCHEDULES)
        raise ArgumentTypeError(f"no such schedule; {f'did you mean {near}?' if near else schedule_names()}")
    return plain


def first_name(schedule: str) -> str:
    """A schedule's first name by what `schedule_name` gives."""
    return _SCHEDULES[schedule]


def schedule_names() -> str:
    """All of them, for people."""
    return ", ".join(_SCHEDULES)


def a1111_name(sampler: str, schedule: str = OWN) -> str:
    """What the web UI calls a sampler, with the schedule where its name held that."""
    name = SAMPLERS[sampler].a1111_name
    return f"{name} {schedule.capitalize()}" if sampler in _A1111_PAIRS.get(schedule, ()) else name


def sampler_lines() -> Iterator[str]:
    """Each sampler's name with its second ones, what the web UI calls it, and the schedules that it goes through."""
    for name, sampler in SAMPLERS.items():
        names = " ".join([name, *(second for second, first in SECOND_NAMES.items() if first == name)])
        schedules = [*sampler.schedules, *(["timesteps"] if sampler.timesteps else [])]
        yield f"{names} ({sampler.a1111_name}): {', '.join(schedules)}"
