"""Guidance by the loss of CLIP or VGG16: its settings."""

from dataclasses import dataclass

from library.errors import InputError
from library.files.loss_guidance import USUAL_CLIP, VGG16_LAYERS, VGG16_SHRINK, LossGuidanceFiles, find_clip, find_vgg16
from library.settings.options import Options

USUAL_LAYER = 20  # of VGG16: conv4_2 with its ReLU
GUIDED_SAMPLERS = ("ddim", "pndm", "lms")


@dataclass(frozen=True)
class LossGuidanceSettings:
    """What a run's pictures are drawn towards, and how strongly; a scale of 0 is without."""

    clip_scale: float = 0.0
    clip_image_scale: float = 0.0
    vgg16_scale: float = 0.0
    vgg16_layer: int = USUAL_LAYER

    @property
    def uses_clip(self) -> bool:
        """Whether CLIP is needed."""
        return self.clip_scale > 0 or self.clip_image_scale > 0

    @property
    def uses_vgg16(self) -> bool:
        """Whether VGG16 is needed."""
        return self.vgg16_scale > 0

    @property
    def uses_anything(self) -> bool:
        """Whether there is any guidance."""
        return self.uses_clip or self.uses_vgg16

    @property
    def uses_goal_picture(self) -> bool:
        """Whether there has to be a picture that it is drawn towards, a goal."""
        return self.clip_image_scale > 0 or self.vgg16_scale > 0

    @property
    def smallest_side_px(self) -> int:
        """The smallest width or height whose features are not pooled to nothing."""
        poolings = VGG16_LAYERS[: self.vgg16_layer + 1].count("pooling")
        return VGG16_SHRINK * 2**poolings if self.uses_vgg16 else 0


NO_LOSS_GUIDANCE = LossGuidanceSettings()


def from_options(options: Options) -> LossGuidanceSettings:
    """What the options say of it.

    Raises:
        InputError: for an option without the guidance that it is for, and what does not go together with it.
    """
    settings = LossGuidanceSettings(
        clip_scale=options.clip_guidance_scale,
        clip_image_scale=options.clip_image_guidance_scale,
        vgg16_scale=options.vgg16_guidance_scale,
        vgg16_layer=options.vgg16_guidance_layer or USUAL_LAYER,
    )
    if options.clip_model is not None and not settings.uses_clip:
        problem = "nothing uses it; give --clip_guidance_scale or --clip_image_guidance_scale too, or leave it out"
        raise InputError(f"--clip_model {options.clip_model}", problem)
    for name, value in (
        ("vgg16_model", options.vgg16_model),
        ("vgg16_guidance_layer", options.vgg16_guidance_layer),
    ):
        if value is not None and not settings.uses_vgg16:
            raise InputError(f"--{name} {value}", "nothing uses it; give --vgg16_guidance_scale too, or leave it out")
    if not settings.uses_anything:
        return settings
    for name, given in (("--compile", options.compile), ("--lowvram", options.lowvram)):
        if given:
            raise InputError(name, "does not go together with guidance by CLIP or VGG16; leave one out")
    return settings


def find_models(options: Options, settings: LossGuidanceSettings) -> LossGuidanceFiles:
    """Find and check the models that the settings need, fetching those that are not given and not here yet.

    Raises:
        InputError: when one is not to be had, or is something else.
    """
    vgg16 = find_vgg16(options.vgg16_model) if settings.uses_vgg16 else None
    if not settings.uses_clip:
        return LossGuidanceFiles(vgg16=vgg16)
    return LossGuidanceFiles(*find_clip(options.clip_model or USUAL_CLIP), vgg16)
