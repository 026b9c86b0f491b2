"""What is noise in a batch's latents: the U-Net run for each branch of classifier-free guidance, and these joined."""

from collections.abc import Callable, Sequence

import torch
from diffusers import UNet2DConditionModel

from library.draw.attention import keep_text
from library.draw.control_net import Steering
from library.draw.text_conditions import TextConditions
from library.plan.job import Job


class Cfg:
    """Classifier-free guidance (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598) for a batch of jobs.

    A batch is expanded to one branch for each text of `Job.texts`, branch by branch; the branches' predictions are
    joined with each picture's own scale.

    Args:
        jobs: of the batch.
        device: of the predictions.
        rescale: how far a joined prediction takes on the standard deviation of the prompt's, 0 to 1 (Lin et al. 2023,
            https://arxiv.org/abs/2305.08891, section 3.4).
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device, rescale: float = 0.0) -> None:
        self.branches = jobs[0].branches
        self._rescale = rescale
        self.texts = [text for branch in zip(*(job.texts for job in jobs)) for text in branch]
        self.text_multipliers = [m for branch in zip(*(job.text_multipliers for job in jobs)) for m in branch]

        def column(numbers: Sequence[float]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.float32, device=device).view(-1, 1, 1, 1)

        self._scale = column([job.guidance_scale for job in jobs])
        self._negative_scale = column([job.negative_scale or 0.0 for job in jobs])
        self._join = {1: self._only_prompt, 2: self._from_negative, 3: self._from_empty}[self.branches]
        before = len(jobs) if self.branches > 1 else 0
        # the prompt's branch: of the texts, and of the U-Net's rows
        self.prompt_texts = slice(before, before + len(jobs) * len(jobs[0].parts))
        self.prompt_rows = slice(before, before + len(jobs))
        last_parts = range(self.prompt_texts.stop - len(jobs), self.prompt_texts.stop)
        # for each of the U-Net's rows the text whose pooled vector it is told: of a prompt in parts, its last one's
        self.text_of_row = [*range(before), *last_parts, *range(self.prompt_texts.stop, len(self.texts))]
        prompts = range(*self.prompt_texts.indices(len(self.texts)))
        # texts that say nothing in the branches that guidance leads away from
        self.empty_texts = [n for n, text in enumerate(self.texts) if n not in prompts and not text.strip()]
        # what each of the U-Net's rows is told of its picture
        self.sizes = [
            job.sizes.numbers(job.width, job.height, negative=branch != min(1, self.branches - 1))
            for branch in range(self.branches)
            for job in jobs
        ]

    def prompt_of(self, picture: int) -> tuple[slice, slice]:
        """Where a picture's prompt of a single part stands: among the texts, and among the U-Net's rows."""
        texts, rows = self.prompt_texts.start + picture, self.prompt_rows.start + picture
        return slice(texts, texts + 1), slice(rows, rows + 1)

    def expand(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) → (branches * B, C, h, w)"""
        return latents.repeat(self.branches, 1, 1, 1)

    def join(self, prediction: torch.Tensor) -> torch.Tensor:
        """(branches * B, C, h, w) → (B, C, h, w)"""
        joined = self._join(*prediction.chunk(self.branches))
        if not self._rescale or self.branches == 1:
            return joined
        wanted, found = (x.std(dim=(1, 2, 3), keepdim=True) for x in (prediction[self.prompt_rows], joined))
        return joined * (self._rescale * wanted / found + (1 - self._rescale))

    def _only_prompt(self, prompt: torch.Tensor) -> torch.Tensor:
        return prompt

    def _from_negative(self, negative: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return negative + self._scale * (prompt - negative)

    def _from_empty(self, negative: torch.Tensor, prompt: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        return empty + self._scale * (prompt - empty) - self._negative_scale * (negative - empty)


class Denoiser:
    """Predicts what is noise in a batch's latents: the U-Net with the batch's text, steered by ControlNets.

    Args:
        unet: predicts.
        text: of all branches.
        cfg: makes the branches and joins them.
        guided: for each evaluation whether it does; the prompt's branch alone is evaluated where not.
        followers: what else is told which step begins, by its place.
        steering: the ControlNets.

    Networks that change how the U-Net sees text have to be attached already.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text: TextConditions,
        cfg: Cfg,
        guided: Sequence[bool],
        followers: Sequence[Callable[[int], None]],
        steering: Steering,
    ) -> None:
        self._unet, self._followers, self._steering = unet, followers, steering
        self._cfg, self._guided = cfg, guided
        models = (unet, *steering.models)
        self._text = keep_text(text, *models)
        self._prompt_text = self._text
        if not all(guided):
            self._prompt_text = keep_text(text.rows(cfg.prompt_texts, cfg.prompt_rows), *models)

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, index: int) -> torch.Tensor:
        """(B, C, h, w), scaled as the scheduler wants it → the joined prediction, likewise, float32"""
        for begin_step in self._followers:
            begin_step(index)
        if not self._guided[index]:
            return self._predict(sample, timestep, self._prompt_text, index)
        prediction = self._predict(self._cfg.expand(sample), timestep, self._text, index)
        return self._cfg.join(prediction)

    def _predict(self, rows: torch.Tensor, timestep: torch.Tensor, text: TextConditions, index: int) -> torch.Tensor:
        timestep = timestep.to(rows.device, non_blocking=True)
        residuals = self._steering.residuals(rows, timestep, text, index)
        prediction = self._unet(rows, timestep, **text.unet_arguments(), **residuals).sample
        return prediction.to(torch.float32, copy=True)  # a compiled U-Net may write over what it returned
