"""Guidance in a part of the steps alone: the others leave the negative prompt out, which halves their cost.

An approximation, after Kynkäänniemi et al. 2024 (https://arxiv.org/abs/2404.07724), who find that guidance does harm in
the noisiest steps and nothing in the last ones. Knows no torch.
"""

from dataclasses import dataclass

from library.errors import InputError


@dataclass(frozen=True)
class GuidanceInterval:
    """The steps that guidance works in: from one share of the steps that are run up to another, both from 0 to 1.

    Raises:
        InputError: when it ends before it begins.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.start > self.end:
            problem = f"guidance ends before that, at {self.end:g}; give a --guidance_end of {self.start:g} or more"
            raise InputError(f"--guidance_start {self.start:g}", problem)

    def guided(self, evaluations: int, order: int) -> list[bool]:
        """Whether guidance works, for each of the evaluations of the model.

        Args:
            evaluations: how many are run.
            order: how many of them make a step, the last of which may have fewer.
        """
        steps = -(-evaluations // order)
        return [self.start <= place // order / steps < self.end for place in range(evaluations)]


WHOLE_RUN = GuidanceInterval()
