"""How many pictures a prompt line gives, and how often all lines are gone through."""

from dataclasses import dataclass

from library.settings.options import Options


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """What the user said of it."""

    images_per_prompt: int | None = None  # where it is not given, one, or one for each seed of a line
    iterations: int = 1  # how often all lines are gone through
    shuffle: bool = False  # mix the lines anew in each iteration
    same_seed_in_iteration: bool = False


def from_options(options: Options) -> Repeats:
    """What the options say of it."""
    return Repeats(
        images_per_prompt=options.images_per_prompt,
        iterations=options.n_iter,
        shuffle=options.shuffle_prompts,
        same_seed_in_iteration=options.iter_same_seed,
    )
