"""Seeds for pictures whose prompt line names none."""

import random
from collections.abc import Sequence

from library.values import FRESH_SEED

_RANDOM_SEED_LIMIT = 0x7FFFFFFF  # as sd-scripts draws them


class SeedSource:
    """Hands out the seeds of pictures whose prompt line names none.

    Args:
        seed: what `--seed` says; None draws anew each run.
        pictures: how many the run makes; a single one has `seed` itself. None where that is not known.
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


class SeedsAgain:
    """Hands out the seeds of another source, from the first one again after each `rewind`."""

    def __init__(self, source: SeedSource) -> None:
        self._source = source
        self._seeds: list[int] = []
        self._given = 0

    def rewind(self) -> None:
        """Begin again."""
        self._given = 0

    def next(self) -> int:
        """The next picture's seed."""
        if self._given == len(self._seeds):
            self._seeds.append(self._source.next())
        self._given += 1
        return self._seeds[self._given - 1]


def seed_of(said: Sequence[int] | None, image: int, seeds: SeedSource | SeedsAgain) -> int:
    """The seed of a line's image, from 0: what the line says, else a new one."""
    seed = said[min(image, len(said) - 1)] if said else FRESH_SEED
    return seeds.next() if seed == FRESH_SEED else seed


def random_seed() -> int:
    """A seed out of nothing."""
    return random.SystemRandom().randint(0, _RANDOM_SEED_LIMIT)
