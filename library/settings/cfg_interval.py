"""Classifier-free guidance in a part of the steps alone: the others leave the negative prompt out, at half the cost.

An approximation, after Kynkäänniemi et al. 2024 (https://arxiv.org/abs/2404.07724), who find that guidance does harm in
the noisiest steps and nothing in the last ones.
"""

from dataclasses import dataclass

from library.errors import InputError
from library.settings.options import Options


@dataclass(frozen=True)
class CfgInterval:
    """The steps that classifier-free guidance works in: from one share of those that are run up to another, 0 to 1.

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


WHOLE_RUN = CfgInterval()


def from_options(options: Options) -> CfgInterval:
    """What the options say of it."""
    return CfgInterval(options.guidance_start, options.guidance_end)
