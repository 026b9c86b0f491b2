"""What a contact sheet says below its pictures: their seeds, and in what else they differ."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import takewhile
from pathlib import Path

from library.plan.job import Job
from library.results.made_picture import MadePicture

# What pictures of a run have of their own without being drawn with other settings
_OWN = ("seed", "raw_prompt", "where", "file", "file_name", "follows", "cell")
# What goes along with another setting, with which it is one
_ALONG_WITH = {"schedule": "sampler", "height": "width", "steps": "timesteps"}
_AS_IT_IS = ("Networks",)  # settings that need no name before them
_NOT_SHOWN = ("Seed", "Schedule type", "Timestep spacing", "Model hash")  # shown anyway, or told by others


def differ_in_one_thing(groups: Iterable[Iterable[MadePicture]]) -> bool:
    """Whether pictures of several lines have one prompt, and differ in one setting at most beside their seeds."""
    jobs = [picture.job for group in groups for picture in group]
    names = {each.name for each in fields(Job)} - {*_OWN}
    differing = {name for name in names if len({getattr(job, name) for job in jobs}) > 1}
    return "prompt" not in differing and len({_ALONG_WITH.get(name, name) for name in differing}) <= 1


def captions(pictures: Sequence[MadePicture]) -> dict[Path, list[str]]:
    """The captions of pictures by their files: the seed, and what differs between them, a line each."""
    found = {picture.file: [f"seed {picture.job.seed}"] for picture in pictures}
    for mark, texts in (
        ("", [picture.job.prompt for picture in pictures]),
        ("− ", [picture.job.negative_prompt for picture in pictures]),
    ):
        if len(set(texts)) > 1:
            for picture, words in zip(pictures, _differing_words(texts)):
                found[picture.file].append(f"{mark}{words}")
    names = dict.fromkeys(name for picture in pictures for name in picture.settings if name not in _NOT_SHOWN)
    for name in names:
        values = [picture.settings.get(name) for picture in pictures]
        if len(set(values)) > 1:
            for picture, value in zip(pictures, values):
                text = f"no {name.lower()}" if value is None else value if name in _AS_IT_IS else f"{name} {value}"
                found[picture.file].append(text)
    return found


def _differing_words(texts: Sequence[str]) -> list[str]:
    """Texts without the words that all of them begin and end with, for which … stands."""
    words = [text.split() for text in texts]
    begin = _shared(words)
    words = [each[begin:] for each in words]
    end = _shared([each[::-1] for each in words])
    words = [each[: len(each) - end] for each in words]
    return [" ".join(["…"] * bool(begin) + each + ["…"] * bool(end)) for each in words]


def _shared(lists: Sequence[Sequence[str]]) -> int:
    """How many words at their beginnings are the same in all lists."""
    return len(list(takewhile(lambda words: len(set(words)) == 1, zip(*lists, strict=False))))
