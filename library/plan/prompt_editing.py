"""Prompt editing as AUTOMATIC1111's web UI has it: a prompt whose text changes from step to step.

`[from:to:when]`, `[to:when]` and `[from::when]` change once; `[a|b|c]` goes round, one variant a step. They nest,
within brackets of emphasis too. What is none of these is text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from library.plan.emphasis import MAX_NESTING

_KEPT_PROMPTS = 4096
_TOKEN = re.compile(r"(?:[^\\\[\]():|]|\\.)+|\\|[\[\]():|]", re.DOTALL)
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


@dataclass(frozen=True)
class Moment:
    """A step of a run, where prompts are asked what they say.

    Args:
        step: from 1.
        steps: how many are run.
        before: how many the stages before this one had: the first stage of Highres. fix.
    """

    step: int
    steps: int
    before: int = 0


@dataclass(frozen=True)
class EditedPrompt:
    """A prompt whose text may change: texts, and what changes between them."""

    pieces: tuple["str | Change | Alternation", ...]

    @property
    def changes(self) -> bool:
        """Whether its text is not the same at all steps."""
        return not all(isinstance(piece, str) for piece in self.pieces)

    def at(self, moment: Moment) -> str:
        """The text at a step."""
        return "".join(piece if isinstance(piece, str) else piece.at(moment) for piece in self.pieces)


@dataclass(frozen=True)
class Change:
    """`[before:after:when]`: `when`, as it is written, is a share of the steps with a point, else a number of them."""

    before: EditedPrompt
    after: EditedPrompt
    when: str

    def at(self, moment: Moment) -> str:
        """The text at a step."""
        return (self.before if moment.step <= self._last(moment) else self.after).at(moment)

    def _last(self, moment: Moment) -> float:
        """The last step of what is before: shares above 1 and steps beyond the stage before address a second stage."""
        number = float(self.when)
        if "." not in self.when:
            return number - moment.before
        share = number - 1 if moment.before else number
        return int(max(-1.0, min(share, 1.0)) * moment.steps)


@dataclass(frozen=True)
class Alternation:
    """`[a|b|c]`: the variants in turn, one a step."""

    variants: tuple[EditedPrompt, ...]

    def at(self, moment: Moment) -> str:
        """The text at a step."""
        return self.variants[(moment.step - 1) % len(self.variants)].at(moment)


# ---------------------------------------------------------------------------------------------------------------------
# Parsing

_Piece = str | Change | Alternation


@dataclass
class _Group:
    """What an open bracket holds so far: pieces, and in `marks` the places of those that are its own `:` and `|`."""

    opener: str
    pieces: list[_Piece] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    whole: bool = True  # no bracket in it lacks its other half


@lru_cache(maxsize=_KEPT_PROMPTS)
def parse_editing(text: str) -> EditedPrompt:
    """Find what changes in a prompt, in one pass; brackets that are neither are text."""
    groups = [_Group("")]
    for token in _TOKEN.findall(text):
        if token in ("[", "(") and len(groups) <= MAX_NESTING:
            groups.append(_Group(token))
        elif token in ("]", ")"):
            _close(groups, token)
        else:
            if token in (":", "|"):
                groups[-1].marks.append(len(groups[-1].pieces))
            groups[-1].pieces.append(token)
    while len(groups) > 1:
        _spill(groups)
    return EditedPrompt(_joined(groups[0].pieces))


def _close(groups: list[_Group], closer: str) -> None:
    """Close the innermost group, if it is of this kind; a square bracket ends the round ones that are open in it."""
    if closer == "]" and any(group.opener == "[" for group in groups):
        while groups[-1].opener == "(":
            _spill(groups)
    if groups[-1].opener != {"]": "[", ")": "("}[closer]:
        groups[-1].pieces.append(closer)
        groups[-1].whole = False
        return
    group = groups.pop()
    changing = _changing(group) if closer == "]" and group.whole else None
    if changing is not None:
        groups[-1].pieces.append(changing)
    else:
        groups[-1].pieces += [group.opener, *group.pieces, closer]
        groups[-1].whole &= group.whole


def _spill(groups: list[_Group]) -> None:
    """Make a bracket that is never closed, and what it holds, text of the one around it."""
    group = groups.pop()
    groups[-1].pieces += [group.opener, *group.pieces]
    groups[-1].whole = False


def _changing(group: _Group) -> Change | Alternation | None:
    """What a square bracket changes; None where it is no editing."""
    colons, bars = ([place for place in group.marks if group.pieces[place] == mark] for mark in ":|")
    if not colons:
        return Alternation(tuple(_split(group.pieces, bars))) if bars else None
    when = "".join(piece for piece in group.pieces[colons[-1] + 1 :] if isinstance(piece, str))
    number = _NUMBER.fullmatch(when)
    if number is None or len(colons) > 2 or not _all_text(group.pieces[colons[-1] + 1 :]):
        return None
    *before, after = _split(group.pieces[: colons[-1]], colons[:-1])
    return Change(before[0] if before else EditedPrompt(()), after, number[1])


def _all_text(pieces: Sequence[_Piece]) -> bool:
    return all(isinstance(piece, str) for piece in pieces)


def _split(pieces: Sequence[_Piece], places: Sequence[int]) -> Iterator[EditedPrompt]:
    """The pieces between these places."""
    for start, end in zip([0, *(place + 1 for place in places)], [*places, len(pieces)]):
        yield EditedPrompt(_joined(pieces[start:end]))


def _joined(pieces: Sequence[_Piece]) -> tuple[_Piece, ...]:
    """The pieces with neighbouring texts as one."""
    joined: list[_Piece] = []
    texts: list[str] = []
    for piece in [*pieces, None]:
        if isinstance(piece, str):
            texts.append(piece)
            continue
        if texts:
            joined.append("".join(texts))
            texts = []
        if piece is not None:
            joined.append(piece)
    return tuple(joined)
