"""What models read beside the noisy latents: a U-Net's first convolution tells it by its number of channels."""

from dataclasses import dataclass

LATENT_CHANNELS = 4  # of the VAEs of all families


@dataclass(frozen=True)
class ModelInputs:
    """What a kind of models reads.

    Args:
        kind: its name for programs.
        name: for people, with an article.
        channels: of the U-Net's input.
    """

    kind: str
    name: str
    channels: int


PLAIN = ModelInputs("plain", "a text-to-image model", LATENT_CHANNELS)
# the latents, then a mask, then the latents of the picture without what is under it (Rombach et al. 2022,
# https://arxiv.org/abs/2112.10752, section 4.5)
INPAINTING = ModelInputs("inpainting", "an inpainting model", 2 * LATENT_CHANNELS + 1)
# the latents, then those of the picture that is changed (Brooks et al. 2023, https://arxiv.org/abs/2211.09800)
EDITING = ModelInputs("editing", "an edit model (InstructPix2Pix)", 2 * LATENT_CHANNELS)
DRAWN = (PLAIN, INPAINTING, EDITING)  # those that this program draws with
OTHERS = {5: "a depth model", 7: "an upscaler"}


def inputs_of(channels: object) -> ModelInputs | None:
    """The kind of models whose U-Net has so many input channels; None for one that this program does not draw with."""
    return next((inputs for inputs in DRAWN if inputs.channels == channels), None)
