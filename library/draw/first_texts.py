"""The texts of a run whose pictures all ask for the same ones, encoded before there is a U-Net.

The text encoders then need no memory beside it: they are gone when the last of its weights are read.
"""

from collections.abc import Sequence

import torch

from library.draw.denoiser import Cfg
from library.draw.text_encoding import KEPT_CHUNKS, PromptEncoder, make_encoder
from library.models.models import TextEncoder
from library.plan.run_plan import RunPlan
from library.plan.stages import stages


def encode_first(plan: RunPlan, texts: Sequence[TextEncoder], device: torch.device) -> PromptEncoder:
    """Encode the texts of a run that has `RunPlan.texts_first` as its pictures do, and let the text encoders go."""
    encoder = make_encoder(plan.text, texts)
    for stage in stages(plan.to_do[0], plan.highres):
        said = Cfg([stage], device).said_in(stage.steps_run)
        chunks = encoder.tokens.chunks(*dict.fromkeys(text for each in said for text in each.texts))
        for each in dict.fromkeys(said):
            encoder.encode(each.texts, chunks, each.multipliers)
    if encoder.keeps_all(plan.wordings(KEPT_CHUNKS)):
        encoder.let_go()
    return encoder
