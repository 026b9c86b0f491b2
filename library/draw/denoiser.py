"""What is noise in a batch's latents: the U-Net run for each branch of classifier-free guidance, and these joined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from library.draw.attention import keep_text
from library.draw.control_net import Steering
from library.draw.model_inputs import Beside
from library.draw.text_conditions import TextConditions
from library.draw.tiles import Tile, join, model_tiles
from library.draw.unet_call import UnetCall, direct, timestep_on
from library.machine.devices import sent
from library.plan.job import Job
from library.settings.tiling import WHOLE, Tiling
from networks.strengths import Strength


@dataclass(frozen=True)
class Said:
    """What the branches of a batch say at a step: texts, and the networks' multipliers that each is encoded with."""

    texts: tuple[str, ...]
    multipliers: tuple[tuple[Strength, ...], ...]


class Cfg:
    """Classifier-free guidance (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598) for a batch of jobs.

    A batch is expanded to one branch for each text of `Job.texts_at`, branch by branch; the branches' predictions are
    joined with each picture's own scale. Parts of a prompt that compose have a branch each (Liu et al. 2022,
    https://arxiv.org/abs/2206.01714, equation 11); parts with regions share one.

    Args:
        jobs: of the batch.
        device: of the predictions.
        rescale: how far a joined prediction takes on the standard deviation of the prompt's, 0 to 1 (Lin et al. 2023,
            https://arxiv.org/abs/2305.08891, section 3.4).
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device, rescale: float = 0.0) -> None:
        first = jobs[0]
        self._jobs = jobs
        self.branches, self.composes = first.branches, first.composes
        self._rescale = rescale

        def column(numbers: Sequence[float]) -> torch.Tensor:
            return sent(torch.tensor(numbers, dtype=torch.float32), device).view(-1, 1, 1, 1)

        self._has_negative, self._has_empty = first.has_negative, first.has_empty
        self._scale = column([job.guidance_scale for job in jobs])
        self._negative_scale = column([job.negative_scale or 0.0 for job in jobs])
        self._drops_picture = first.drops_picture
        self._image_scale = column([job.image_guidance or 0.0 for job in jobs])
        parts = len(first.parts)
        self._weights = [column([job.parts[part].weight for job in jobs]) for part in range(parts)]
        before, texts = len(jobs) * first.has_negative, len(jobs) * len(first.texts_at(0))
        # the prompt's branches: of the texts, and of the U-Net's rows
        self.prompt_texts = slice(before, before + len(jobs) * parts)
        self.prompt_rows = slice(before, before + len(jobs) * (parts if self.composes else 1))
        last_parts = range(self.prompt_texts.stop - len(jobs), self.prompt_texts.stop)
        prompts = range(*self.prompt_texts.indices(texts))
        # for each of the U-Net's rows the text whose pooled vector it is told: of parts that share one, the last one's
        self.text_of_row = [
            *(*range(before), *(prompts if self.composes else last_parts)),
            *range(self.prompt_texts.stop, texts),
        ]
        # what each of the U-Net's rows is told of its picture
        rows = range(len(self.text_of_row))
        self.sizes = [
            job.sizes.numbers(job.width, job.height, negative=row not in rows[self.prompt_rows])
            for row, job in zip(rows, [*jobs] * self.branches)
        ]

    def said(self, step: int) -> Said:
        """What the branches say at a step, from 0."""
        texts, multipliers = (
            tuple(each for branch in zip(*of_jobs) for each in branch)
            for of_jobs in (
                [job.texts_at(step) for job in self._jobs],
                [job.text_multipliers for job in self._jobs],
            )
        )
        return Said(texts, multipliers)

    def said_in(self, steps: int) -> list[Said]:
        """What the branches say at each of so many steps."""
        if all(len(job.telling_steps) == 1 for job in self._jobs):  # mostly no text changes
            return [self.said(0)] * steps
        return [self.said(step) for step in range(steps)]

    def empty_texts(self, said: Said) -> list[int]:
        """The places of texts that say nothing in the branches that guidance leads away from."""
        prompts = range(len(said.texts))[self.prompt_texts]
        return [n for n, text in enumerate(said.texts) if n not in prompts and not text.strip()]

    def prompt_of(self, picture: int) -> tuple[slice, slice]:
        """Where a picture's prompt of a single part stands: among the texts, and among the U-Net's rows."""
        texts, rows = self.prompt_texts.start + picture, self.prompt_rows.start + picture
        return slice(texts, texts + 1), slice(rows, rows + 1)

    def expand(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) → (branches * B, C, h, w)"""
        return latents.repeat(self.branches, 1, 1, 1)

    def expand_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """What stands beside the latents (B, c, h, w), for each branch; zeros for the one that sees no picture."""
        rows = self.expand(inputs)
        if self._drops_picture:
            rows[-len(inputs) :] = 0
        return rows

    def join(self, prediction: torch.Tensor) -> torch.Tensor:
        """(branches * B, C, h, w) → (B, C, h, w)"""
        joined = self._joined(prediction, self._scale, self._negative_scale)
        if not self._rescale or not self._has_negative:
            return joined
        prompt = self.join_prompts(prediction) if self.composes else prediction[self.prompt_rows]
        wanted, found = (x.std(dim=(1, 2, 3), keepdim=True) for x in (prompt, joined))
        return joined * (self._rescale * wanted / found + (1 - self._rescale))

    def join_prompts(self, prediction: torch.Tensor) -> torch.Tensor:
        """What composed parts say without guidance: as `join`, at a scale of 1."""
        return self._joined(prediction, torch.ones_like(self._scale), torch.zeros_like(self._scale))

    def _joined(self, prediction: torch.Tensor, scale: torch.Tensor, negative_scale: torch.Tensor) -> torch.Tensor:
        branches = prediction.chunk(self.branches)
        if not self._has_negative:
            return branches[0]
        negative, *prompts = branches
        base = prompts.pop() if self._has_empty else negative
        joined = base
        if self._drops_picture:  # Brooks et al. 2023 (https://arxiv.org/abs/2211.09800), equation 3
            without_picture = prompts.pop()
            joined = without_picture + self._image_scale * (negative - without_picture)
        for prompt, weight in zip(prompts, self._weights if self.composes else [1.0]):
            joined = joined + weight * scale * (prompt - base)
        return joined - negative_scale * (negative - base) if self._has_empty else joined


class Denoiser:
    """Predicts what is noise in a batch's latents: the U-Net with the batch's text, steered by ControlNets.

    Args:
        unet: predicts.
        texts: for each evaluation the text of all branches; the same object while it does not change.
        cfg: makes the branches and joins them.
        guided: for each evaluation whether it does; the prompt's branch alone is evaluated where not.
        followers: what else is told which step begins, by its place, before the text of the step is looked at.
        steering: the ControlNets.
        beside: what the U-Net reads beside the latents, if anything.
        tiling: the tiles that the U-Net sees one by one.
        placed: what is told which tile comes next, before the U-Net is called for it.
        call_unet: how it is called; directly when not given.

    Networks that change how the U-Net sees the first text have to be attached already.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        texts: Sequence[TextConditions],
        cfg: Cfg,
        guided: Sequence[bool],
        followers: Sequence[Callable[[int], None]],
        steering: Steering,
        beside: Beside | None = None,
        tiling: Tiling = WHOLE,
        placed: Sequence[Callable[[Tile], None]] = (),
        call_unet: UnetCall | None = None,
    ) -> None:
        self._call_unet, self._followers, self._steering = call_unet or direct(unet), followers, steering
        self._cfg, self._guided, self._texts, self._beside = cfg, guided, texts, beside
        self._tiling, self._placed = tiling, placed
        self._models = (unet, *steering.models)
        self._take(texts[0])

    def _take(self, text: TextConditions) -> None:
        """Keep what cross-attention makes of a text."""
        cfg, self._taken = self._cfg, text
        self._text = self._prompt_text = keep_text(text, *self._models)
        if not (cfg.composes or all(self._guided)):
            self._prompt_text = keep_text(self._text.rows(cfg.prompt_texts, cfg.prompt_rows), *self._models)

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, index: int) -> torch.Tensor:
        """(B, C, h, w), scaled as the scheduler wants it → the joined prediction, likewise, float32"""
        for begin_step in self._followers:
            begin_step(index)
        if self._texts[index] is not self._taken:
            self._take(self._texts[index])
        if not self._guided[index] and not self._cfg.composes:
            return self._predict(self._rows(sample, all_branches=False), timestep, self._prompt_text, index)
        prediction = self._predict(self._rows(sample, all_branches=True), timestep, self._text, index)
        return self._cfg.join(prediction) if self._guided[index] else self._cfg.join_prompts(prediction)

    def _rows(self, sample: torch.Tensor, *, all_branches: bool) -> torch.Tensor:
        """The U-Net's input: the latents and what stands beside them, for all branches or the prompt's alone."""
        rows = self._cfg.expand(sample) if all_branches else sample
        if self._beside is None:
            return rows
        height, width = sample.shape[-2:]
        beside = self._beside.at((height, width)).to(rows.dtype)
        return torch.cat([rows, self._cfg.expand_inputs(beside) if all_branches else beside], dim=1)

    def _predict(self, rows: torch.Tensor, timestep: torch.Tensor, text: TextConditions, index: int) -> torch.Tensor:
        timestep = timestep_on(rows.device, timestep)
        tiles = model_tiles(self._tiling, (rows.shape[-2], rows.shape[-1]))
        predictions = (self._predict_tile(tile, tile.cut(rows), timestep, text, index) for tile in tiles)
        return next(predictions) if len(tiles) == 1 else join(tiles, predictions)

    def _predict_tile(
        self, tile: Tile, rows: torch.Tensor, timestep: torch.Tensor, text: TextConditions, index: int
    ) -> torch.Tensor:
        for place in self._placed:
            place(tile)
        residuals = self._steering.residuals(rows, timestep, text, index, tile)
        prediction = self._call_unet(rows, timestep, text, residuals)
        return prediction.to(torch.float32, copy=True)
