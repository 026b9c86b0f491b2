#!/usr/bin/env python3
"""Draw pictures with Stable Diffusion 1.x and 2.x: from the shell, from a file of prompts, or in a loop."""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import logging
import re
import signal
import sys
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from library import console, values
from library.errors import InputError, Interrupted, ProgramError
from library.files.picture_files import DEFAULT_QUALITY, FORMATS
from library.files.pictures import load_mask, load_source
from library.machine import devices, malloc
from library.machine.compiling import compile_fault, compile_unet, keep_compiled
from library.plan.config import Said, as_said, keep_settings, with_config
from library.plan.file_names import make_folder
from library.plan.jobs import Job, group_into_batches
from library.plan.plan_view import picture_facts, show_plan, summary, to_json
from library.plan.planning import RunPlan, make_plan
from library.plan.prompts import PROMPT_OPTIONS
from library.results.gallery import show_results
from library.results.output import FileHash, PictureWriter, RunFacts
from library.run.interactive import run_interactive
from library.run.manifest import Manifest, recover
from library.run.processes import Others, Team, outlive_others
from library.run.report import Tally, save_failed
from library.run.runs import run_jobs
from library.settings import deep_shrink, gradual_latent
from library.settings.control_net import preprocessing
from library.settings.deep_shrink import Shrinker
from library.settings.highres import HighresFix, UpscalerSpec, stages, upscaler_arguments
from library.settings.samplers import SAMPLERS, SECOND_NAMES, Noise, draw_noise, make_scheduler
from library.version import VERSION

if TYPE_CHECKING:  # torch and what needs it are imported once every option and file has been checked
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, SchedulerMixin
    from PIL.Image import Image
    from transformers import CLIPTextModel

    from library.draw.control_net import ControlNets
    from library.draw.decoding import Decoding
    from library.draw.loss_guidance import Judges
    from library.draw.regions import Regions
    from library.draw.text_encoding import PromptEncoder
    from library.models.models import Models
    from networks.attach import Networks
    from tools.latent_upscaler import LatentUpscaler as Upscaler

    MakeBar = Callable[[Iterable], Iterable]  # shows a bar while a batch's steps are gone through
    # Before a step: the joined prediction and the latents, both (B, C, h, w), and the step's place → both, changed
    BeforeStep = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
    AfterStep = Callable[[torch.Tensor, int], torch.Tensor]  # after a step: the latents and the step's place → latents

logger = logging.getLogger("library.pipeline")

# ---------------------------------------------------------------------------------------------------------------------
# Command line


class OptionParser(argparse.ArgumentParser):
    """Argparse with one-line errors and converters that say which value they refused."""

    def error(self, message: str) -> NoReturn:
        """Write `error: --option value: what is wrong` and leave with status 2."""
        message = re.sub(r"^argument [^:]+: (?=--)", "", message)
        console.error(re.sub(r"^argument (?:\S+/)*(--\S+): ", r"\1: ", message))
        sys.exit(InputError.exit_status)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse all arguments; an unknown one is refused with the nearest known one."""
        options, unknown = self.parse_known_args(argv)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            nearest = get_close_matches(unknown[0].partition("=")[0], known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help; a text with spaces needs quotes"
            self.error(f"{unknown[0]}: no such option; {hint}")
        return options


def picture_format(text: str) -> str:
    """Convert the name of a format of picture files."""
    name = {"jpeg": "jpg"}.get(text.lower(), text.lower())
    if name not in FORMATS:
        raise argparse.ArgumentTypeError(f"no such format; known are {', '.join(FORMATS)}")
    return name


class ListSamplers(argparse.Action):
    """Writes each sampler's name with its second ones and leaves."""

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> NoReturn:
        """Write one sampler a line."""
        for name in SAMPLERS:
            console.result(" ".join([name, *(second for second, first in SECOND_NAMES.items() if first == name)]))
        parser.exit()


def checked(option: str, convert: Callable[[str], object]) -> Callable[[str], object]:
    """An argparse type that names the option and the value in its errors."""

    def convert_option(text: str) -> object:
        try:
            return convert(text)
        except argparse.ArgumentTypeError as problem:
            raise argparse.ArgumentTypeError(f"{option} {text}: {problem}") from None

    return convert_option


def sampler_name(text: str) -> str:
    """Convert a sampler's first or second name to its first."""
    name = SECOND_NAMES.get(text, text)
    if name not in SAMPLERS:
        known = [*SAMPLERS, *SECOND_NAMES]
        nearest = get_close_matches(text, known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"no such sampler; {hint}")
    return name


def vae_batch_size(text: str) -> float:
    """Convert a number of pictures, or a share of the batch below 1."""
    value = values.number(0, above=True)(text)
    if value >= 1 and value != int(value):
        raise argparse.ArgumentTypeError("out of range; write a whole number, or a share of the batch below 1")
    return value


_EXAMPLES = """examples:
  one picture:            gen_img_diffusers.py --ckpt model.safetensors --prompt "a red cat --n blurry --d 1"
  a file of prompts:      gen_img_diffusers.py --ckpt model.safetensors --bf16 --batch_size 4 --from_file prompts.txt
  what it would make:     gen_img_diffusers.py --ckpt model.safetensors --from_file prompts.txt --dry_run
  after an interruption:  gen_img_diffusers.py --ckpt model.safetensors --bf16 --from_file prompts.txt --resume
  from a picture:         gen_img_diffusers.py --ckpt model.safetensors --image_path sketch.png --prompt "a castle"
  prompt after prompt:    gen_img_diffusers.py --ckpt model.safetensors --interactive
  options from a file:    gen_img_diffusers.py --config settings.toml --seed 7"""


def make_parser() -> OptionParser:
    """All options, in groups."""
    prompt_options = "\n".join(f"  --{o.name} {o.metavar:16} {o.help}" for o in PROMPT_OPTIONS.values())
    parser = OptionParser(
        prog="gen_img_diffusers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"options inside a prompt line, which hold for that line:\n{prompt_options}\n\n{_EXAMPLES}",
        allow_abbrev=False,
        add_help=False,
    )
    for title, add_options in _OPTION_GROUPS.items():
        add_options(parser.add_argument_group(title))
    return parser


def _add(group: argparse._ArgumentGroup, *names: str, convert: Callable[[str], object], **settings: object) -> None:
    group.add_argument(*names, type=checked(names[0], convert), **settings)


def _model_options(group: argparse._ArgumentGroup) -> None:
    _add(
        group,
        "--ckpt",
        convert=values.not_empty,
        required=True,
        metavar="MODEL",
        help="checkpoint file, Diffusers folder, Hugging Face id, or a glob that matches one file",
    )
    group.add_argument("--v2", action="store_true", help="the model is Stable Diffusion 2.x")
    group.add_argument("--v_parameterization", action="store_true", help="the model predicts v, not noise")
    _add(
        group,
        "--vae",
        convert=values.not_empty,
        metavar="VAE",
        help="VAE to use in place of the model's own (file, folder or id)",
    )
    _add(group, "--clip_skip", convert=values.whole_number(1), metavar="N", default=1,
         help="take the text encoder's N-th last layer (default 1, the last)")  # fmt: skip
    _add(group, "--max_embeddings_multiples", convert=values.whole_number(1, 100), metavar="N", default=1,
         help="longest prompt, in chunks of 75 tokens (default 1)")  # fmt: skip
    group.add_argument("--tokenizer_cache_dir", type=Path, metavar="DIR",
                       help="folder to take the tokenizer from; the shipped one is put there first")  # fmt: skip


def _source_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", metavar="TEXT", help="prompt line, with its options")
    group.add_argument("--from_file", metavar="FILE", help="file with one prompt line a line; - is standard input")
    group.add_argument("--interactive", action="store_true", help="ask for prompt lines and show the pictures")
    group.add_argument("--no_preview", action="store_true", help="show no windows in interactive use")
    group.add_argument("--shuffle_prompts", action="store_true", help="mix the lines anew in each iteration")


def _picture_options(group: argparse._ArgumentGroup) -> None:
    _add(group, "--W", convert=values.size_px, metavar="PIXELS", help="width (default 512)")
    _add(group, "--H", convert=values.size_px, metavar="PIXELS", help="height (default 512)")
    _add(group, "--steps", convert=values.steps, metavar="N", default=50, help="sampling steps (default 50)")
    _add(group, "--scale", convert=values.guidance_scale, metavar="SCALE", default=7.5,
         help="guidance scale; up to 1 is without guidance (default 7.5)")  # fmt: skip
    _add(group, "--negative_scale", convert=values.number_or_none, metavar="SCALE",
         help="guidance scale of the negative prompt alone")  # fmt: skip
    _add(group, "--guidance_start", convert=values.share, metavar="SHARE", default=0.0,
         help="approximate, faster: guide after this share of the steps only (default 0)")  # fmt: skip
    _add(group, "--guidance_end", convert=values.share, metavar="SHARE", default=1.0,
         help="approximate, faster: guide up to this share of the steps only (default 1)")  # fmt: skip
    _add(group, "--sampler", convert=sampler_name, metavar="NAME", default="ddim",
         help=f"{', '.join([*SAMPLERS, *SECOND_NAMES])} (default ddim)")  # fmt: skip
    _add(group, "--seed", convert=values.seed, metavar="SEED",
         help="the picture's seed; of several pictures, the seed their seeds are drawn from")  # fmt: skip
    group.add_argument("--iter_same_seed", action="store_true", help="one seed for all pictures of an iteration")
    _add(group, "--images_per_prompt", convert=values.whole_number(1), metavar="N", default=1,
         help="pictures for each prompt (default 1)")  # fmt: skip
    _add(group, "--n_iter", convert=values.whole_number(1), metavar="N", default=1,
         help="how often all prompts are gone through (default 1)")  # fmt: skip


def _output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--outdir", type=Path, metavar="DIR", default=Path("outputs"), help="default: outputs")
    group.add_argument("--sequential_file_name", action="store_true", help="name pictures im_000001.png and so on")
    group.add_argument("--use_original_file_name", action="store_true", help="name pictures like their source picture")
    _add(group, "--format", convert=picture_format, default="png", metavar="FORMAT",
         help=f"{', '.join(FORMATS)} (default png)")  # fmt: skip
    _add(group, "--quality", convert=values.whole_number(1, 100), metavar="N",
         help=f"of WebP and JPEG, 1 to 100 (default {DEFAULT_QUALITY})")  # fmt: skip
    group.add_argument("--grid", action="store_true", help="make contact sheets too: one a prompt, or with "
                       "--iter_same_seed prompts by seeds")  # fmt: skip
    group.add_argument("--html", action="store_true", help="make index.html too: all pictures with their settings")


def _run_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--config", metavar="FILE", help="TOML file of options (steps = 20); those given here win")
    group.add_argument("--resume", action="store_true", help="go on with the run that this command began in --outdir")
    group.add_argument("--dry_run", action="store_true", help="check everything, show what would be made, make nothing")
    group.add_argument("--json", action="store_true",
                       help="write a JSON object for each picture to standard output, not its path alone")  # fmt: skip
    shown = group.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    shown.add_argument("--verbose", action="store_true", help="show more of what is done")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group.add_argument("--list_samplers", action=ListSamplers, nargs=0, help="write the samplers' names and leave")
    group.add_argument("--version", action="version", version=f"%(prog)s {VERSION}", help="write the version and leave")
    group.add_argument("-h", "--help", action="help", help="write this text and leave")


def _network_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--network_module", nargs="+", metavar="MODULE",
                       help="module of each network; networks.lora reads LoRA and its relatives LoCon, DyLoRA, LoHa, "
                       "LoKr, DoRA, IA3, OFT, full and norm differences, and tells them apart by itself")  # fmt: skip
    group.add_argument("--network_weights", nargs="+", metavar="FILE", help="weight file of each network")
    _add(group, "--network_mul", convert=values.multiplier, nargs="+", metavar="M",
         help="multiplier of each network (default 1)")  # fmt: skip
    group.add_argument("--network_args", nargs="+", metavar="KEY=VALUE;KEY=VALUE", help="arguments for each module")
    group.add_argument("--network_merge", action="store_true", help="add all networks to the weights for good")
    _add(group, "--network_merge_n_models", convert=values.whole_number(1), metavar="N",
         help="add only the first N networks to the weights")  # fmt: skip
    group.add_argument("--network_pre_calc", action="store_true",
                       help="put the networks into the weights anew whenever multipliers change")  # fmt: skip
    group.add_argument("--network_show_meta", action="store_true", help="show the metadata of the networks' files")
    group.add_argument("--textual_inversion_embeddings", nargs="+", metavar="FILE",
                       help="embeddings; the name of each, without its ending, is a word for prompts")  # fmt: skip
    group.add_argument("--XTI_embeddings", nargs="+", metavar="FILE",
                       help="embeddings with vectors for each of 16 layers (Extended Textual Inversion)")  # fmt: skip


def _img2img_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image_path", "--img_path", metavar="PATH", help="picture to start from, or a folder of them")
    group.add_argument("--mask_path", "--mask_image", metavar="PATH",
                       help="mask, or a folder of them: white is repainted; for a prompt with AND, a map of the "
                       "parts' regions in its red, green and blue channel")  # fmt: skip
    _add(group, "--network_regional_mask_max_color_codes", convert=values.whole_number(1, 7), metavar="N",
         help="read N regions from the map's pure colours instead: red, green, yellow, blue, magenta, cyan, "
         "white")  # fmt: skip
    _add(group, "--strength", convert=values.strength, metavar="STRENGTH", default=0.8,
         help="share of the steps that is run: how far the picture changes (default 0.8)")  # fmt: skip
    group.add_argument("--allow_large_pictures", action="store_true",
                       help="take pictures of more than 16384 pixels a side, too; they need much memory")  # fmt: skip
    group.add_argument("--keep_unmasked", action="store_true",
                       help="outside the mask, keep the source's own pixels, not the VAE's copy of them")  # fmt: skip


def _highres_options(group: argparse._ArgumentGroup) -> None:
    _add(group, "--highres_fix_scale", convert=deep_shrink.ratio, metavar="SCALE",
         help="draw a picture of SCALE times the size first, then draw over its enlargement")  # fmt: skip
    _add(group, "--highres_fix_steps", convert=values.steps, metavar="N", help="steps of the first stage (default 28)")
    group.add_argument("--highres_fix_save_1st", action="store_true", help="save the first stage's pictures too")
    group.add_argument("--highres_fix_latents_upscaling", action="store_true",
                       help="enlarge the latents (bilinear) instead of the picture (LANCZOS)")  # fmt: skip
    _add(group, "--highres_fix_upscaler", convert=values.not_empty, metavar="MODULE",
         help="enlarge with this Python module, for instance tools.latent_upscaler")  # fmt: skip
    _add(group, "--highres_fix_upscaler_args", convert=upscaler_arguments, metavar="KEY=VALUE;...",
         help="arguments of the upscaler, for instance weights=upscaler.safetensors")  # fmt: skip


def _gradual_latent_options(group: argparse._ArgumentGroup) -> None:
    _add(group, "--gradual_latent_timesteps", convert=values.whole_number(1, 1000), metavar="TIMESTEP",
         help="draw with euler_a on small latents that grow from this timestep on; 750 is a good start")  # fmt: skip
    _add(group, "--gradual_latent_ratio", convert=gradual_latent.ratio, metavar="RATIO",
         help="size the latents begin with (default 0.5)")  # fmt: skip
    _add(group, "--gradual_latent_ratio_step", convert=gradual_latent.ratio, metavar="STEP",
         help="what each growth adds (default 0.125)")  # fmt: skip
    _add(group, "--gradual_latent_every_n_steps", "--gradual_latent_ratio_every_n_steps", metavar="N",
         convert=gradual_latent.every_n_steps, help="steps from one growth to the next (default 3)")  # fmt: skip
    _add(group, "--gradual_latent_s_noise", convert=gradual_latent.s_noise, metavar="FACTOR",
         help="factor of the noise that growing steps add (default 1)")  # fmt: skip
    _add(group, "--gradual_latent_unsharp_params", convert=gradual_latent.unsharp, metavar="K,SIGMA,STRENGTH[,TARGET]",
         help="sharpen what was resized, e.g. 3,0.5,0.5; with target 0, the step's input")  # fmt: skip


def _deep_shrink_options(group: argparse._ArgumentGroup) -> None:
    _add(group, "--ds_depth_1", convert=deep_shrink.depth_or_none, metavar="DEPTH",
         help="shrink what enters this down block of the U-Net, 0 to 3, in early steps")  # fmt: skip
    _add(group, "--ds_timesteps_1", convert=deep_shrink.timesteps, metavar="TIMESTEP",
         help="down to this timestep (default 650)")  # fmt: skip
    _add(group, "--ds_depth_2", convert=deep_shrink.depth_or_none, metavar="DEPTH",
         help="after that, shrink what enters this down block")  # fmt: skip
    _add(group, "--ds_timesteps_2", convert=deep_shrink.timesteps, metavar="TIMESTEP",
         help="down to this timestep (default 650)")  # fmt: skip
    _add(group, "--ds_ratio", convert=deep_shrink.ratio, metavar="RATIO", help="size they are shrunk to (default 0.5)")


def _control_net_options(group: argparse._ArgumentGroup) -> None:
    _add(group, "--control_net_models", convert=values.not_empty, nargs="+", metavar="MODEL",
         help="ControlNets (file, Diffusers folder or id); several take turns, one at each step")  # fmt: skip
    _add(group, "--control_net_preps", convert=preprocessing, nargs="+", metavar="PREP",
         help="none (default), canny or canny_LOW_HIGH, for each")  # fmt: skip
    _add(group, "--control_net_weights", convert=values.number(-values.MAX_SCALE, values.MAX_SCALE), nargs="+",
         metavar="WEIGHT", help="strength of each (default 1)")  # fmt: skip
    _add(group, "--control_net_starts", convert=values.share, nargs="+", metavar="SHARE",
         help="share of the steps after which each begins (default 0)")  # fmt: skip
    _add(group, "--control_net_ratios", convert=values.share, nargs="+", metavar="SHARE",
         help="share of the steps after which each ends (default 1)")  # fmt: skip
    group.add_argument("--control_net_together", action="store_true",
                       help="use all ControlNets at every step and add them up")  # fmt: skip
    group.add_argument("--highres_fix_disable_control_net", action="store_true",
                       help="no ControlNet in Highres. fix's second stage")  # fmt: skip
    group.add_argument("--control_net_save_guides", action="store_true",
                       help="save the preprocessed guide beside each picture")  # fmt: skip


def _guidance_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--guide_image_path", nargs="+", metavar="PATH",
                       help="picture that guides, or pictures and folders of them, taken in turn")  # fmt: skip
    _add(group, "--clip_guidance_scale", convert=values.loss_scale, metavar="SCALE", default=0,
         help="draw towards what CLIP reads in the prompt, or in a prompt line's --c; 100 is a start")  # fmt: skip
    _add(group, "--clip_image_guidance_scale", convert=values.loss_scale, metavar="SCALE", default=0,
         help="draw towards what CLIP sees in the guide picture; 100 is a start")  # fmt: skip
    _add(group, "--vgg16_guidance_scale", convert=values.loss_scale, metavar="SCALE", default=0,
         help="draw towards VGG16's features of the guide picture; 100 is a start")  # fmt: skip
    _add(group, "--vgg16_guidance_layer", convert=values.whole_number(1, 30), metavar="N",
         help="layer of VGG16 whose features are compared, 1 to 30 (default 20)")  # fmt: skip
    _add(group, "--clip_model", convert=values.not_empty, metavar="MODEL",
         help="CLIP model: folder or Hugging Face id (default laion/CLIP-ViT-B-32-laion2B-s34B-b79K)")  # fmt: skip
    _add(group, "--vgg16_model", convert=values.not_empty, metavar="FILE",
         help="VGG16's weights in torchvision's layout (default: torchvision's for ImageNet)")  # fmt: skip


def _speed_options(group: argparse._ArgumentGroup) -> None:
    _add(group, "--batch_size", convert=values.whole_number(1), metavar="N", default=1,
         help="pictures drawn at a time (default 1)")  # fmt: skip
    _add(group, "--vae_batch_size", convert=vae_batch_size, metavar="N",
         help="pictures decoded at a time; below 1, a share of the batch (default: the batch)")  # fmt: skip
    _add(group, "--vae_slices", convert=values.whole_number(1), metavar="N",
         help="run the VAE in N slices: the same picture with less memory")  # fmt: skip
    group.add_argument("--fp16", action="store_true", help="compute in float16")
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    group.add_argument("--xformers", action="store_true", help="use xFormers' attention where it runs")
    group.add_argument("--diffusers_xformers", action="store_true", help="the same as --xformers")
    group.add_argument("--sdpa", action="store_true", help="use PyTorch's attention (the default)")
    group.add_argument("--lowvram", action="store_true",
                       help="keep text encoder and VAE off the GPU while they are not used")  # fmt: skip
    group.add_argument("--compile", action="store_true",
                       help="compile the U-Net: minutes at the start, faster steps after; for long runs")  # fmt: skip
    group.add_argument("--opt_channels_last", action="store_true",
                       help="put the channels last in memory (done on CPUs anyway)")  # fmt: skip


_OPTION_GROUPS = {
    "model": _model_options,
    "prompts": _source_options,
    "picture": _picture_options,
    "output": _output_options,
    "the run": _run_options,
    "img2img, inpainting and regions": _img2img_options,
    "Highres. fix": _highres_options,
    "Gradual Latent": _gradual_latent_options,
    "Deep Shrink": _deep_shrink_options,
    "networks and embeddings": _network_options,
    "ControlNet": _control_net_options,
    "guidance by CLIP and VGG16": _guidance_options,
    "memory and speed": _speed_options,
}

# ---------------------------------------------------------------------------------------------------------------------
# Pipeline

KEPT_SOURCES = 64  # source pictures whose latents are kept for later batches


class Inpainting:
    """Puts the source picture back outside the mask, after each step at the noise level of the next one."""

    def __init__(
        self,
        scheduler: SchedulerMixin,
        timesteps: torch.Tensor,
        originals: torch.Tensor,
        noise: torch.Tensor,
        masks: torch.Tensor,
    ) -> None:
        self._scheduler, self._timesteps = scheduler, timesteps
        self._originals, self._noise, self._masks = originals, noise, masks

    def __call__(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """Latents (B, C, h, w) after step `index`; after the last one the picture is put back clean."""
        import torch.nn.functional as F

        outside = self._originals
        following = self._timesteps[index + 1 : index + 2]
        if len(following):
            outside = self._scheduler.add_noise(outside, self._noise, following.expand(len(outside)))
        masks = self._masks
        if latents.shape != outside.shape:  # Gradual Latent has not reached the full size yet
            size = latents.shape[-2:]
            outside = F.interpolate(outside, size=size, mode="bicubic", align_corners=False)
            masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        return latents * masks + outside * (1 - masks)


def pixels_to_tensor(picture: Image) -> torch.Tensor:
    """An RGB or grey picture as (1, channels, height, width) float32 from 0 to 1."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels.reshape(1, picture.height, picture.width, -1).permute(0, 3, 1, 2)


def keep_unmasked(picture: np.ndarray, job: Job) -> np.ndarray:
    """The picture (height, width, 3) inside the job's mask, the source's own pixels outside it."""
    import numpy as np
    from PIL import Image

    size = (job.width, job.height)
    source, mask = load_source(job.source, size), load_mask(job.mask, size)
    return np.asarray(Image.composite(Image.fromarray(picture), source, mask))


def batch_key(job: Job, highres: HighresFix | None, encoder: PromptEncoder) -> tuple[Hashable, ...]:
    """What jobs have to agree in to share a batch: the shapes of their stages and the length of their texts."""
    return (*(stage.batch_key for stage in stages(job, highres)), encoder.chunks(*job.texts))


class Pipeline:
    """Draws batches of jobs: prompts to embeddings, noise to latents, latents to pixels."""

    def __init__(
        self,
        models: Models,
        networks: Networks,
        control_nets: ControlNets,
        plan: RunPlan,
        upscaler: Upscaler | None = None,
        judges: Judges | None = None,
    ) -> None:
        from library.draw.text_encoding import PromptEncoder

        self.unet, self.vae, self.text_encoder = models.unet, models.vae, models.text_encoder
        self.networks, self.control_nets = networks, control_nets
        self.encoder = PromptEncoder(
            models.tokenizer, models.text_encoder, plan.clip_skip, plan.max_chunks, plan.embeddings, networks.use
        )
        self.sampler = plan.sampler
        self.guidance_interval = plan.guidance_interval
        self.prediction_type = plan.model.prediction_type
        self.vae_batch_size = plan.vae_batch_size
        self.low_vram = plan.low_vram
        self.keep_unmasked = plan.keep_unmasked
        self.region_color_codes = plan.region_color_codes
        self.highres, self.upscaler = plan.highres, upscaler
        self.judges = judges
        self._encoded: dict[tuple[Path, tuple[int, int]], torch.Tensor] = {}  # least lately used first
        self.cell_px = 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels a latent cell stands for, each way

    def batch_key(self, job: Job) -> tuple[Hashable, ...]:
        """Jobs with equal keys can be drawn together without any of them changing."""
        return batch_key(job, self.highres, self.encoder)

    @property
    def works_ahead(self) -> bool:
        """Whether the next batch may be begun before this one's pictures are there, and the device gains by it."""
        return self.unet.device.type == "cuda" and self.judges is None

    def draw(self, jobs: Sequence[Job], make_bar: MakeBar) -> list[tuple[Job, np.ndarray | None]]:
        """Draw a batch of jobs; as `begin`, and waits for the pictures."""
        return self.begin(jobs, make_bar)()

    def begin(self, jobs: Sequence[Job], make_bar: MakeBar) -> Callable[[], list[tuple[Job, np.ndarray | None]]]:
        """Draw a batch of jobs with equal `batch_key`, showing a bar of so many evaluations.

        Returns:
            What waits for the device and gives each job with its picture (height, width, 3) uint8, or None where the
            model gave no finite numbers; before them, where they are to be saved, those of Highres. fix's first stage
            (their jobs' `stage` is 1).
        """
        import torch

        first_stage: list[tuple[Job, np.ndarray | None]] = []
        originals = None  # latents (B, C, h, w) of the pictures that are drawn over
        # guidance takes gradients, which tensors made in inference mode have no part in
        with torch.no_grad() if self.judges else torch.inference_mode():
            *earlier, last = zip(*(stages(job, self.highres) for job in jobs))
            for stage, following in zip(earlier, [*earlier[1:], last]):
                latents = self._denoise(stage, originals, make_bar)
                pictures = _pictures(self._decode(latents)) if self.highres.needs_pictures else []
                originals = self._enlarge(latents, pictures, following)
                first_stage += zip(stage, pictures)
            if jobs[0].source is not None:
                originals = self._encode_sources(jobs)
            decoded = self._decode(self._denoise(last, originals, make_bar))
        return lambda: [
            *(first_stage if self.highres and self.highres.save_first else ()),
            *zip(jobs, self._finish(jobs, decoded)),
        ]

    def _finish(self, jobs: Sequence[Job], decoded: Sequence[Decoding]) -> list[np.ndarray | None]:
        """The batch's pictures, once they are decoded."""
        pictures = _pictures(decoded)
        if self.keep_unmasked and jobs[0].mask is not None:
            pictures = [
                picture if picture is None else keep_unmasked(picture, job) for picture, job in zip(pictures, jobs)
            ]
        if self.judges:
            self.judges.remember(jobs, pictures)
        return pictures

    def _denoise(self, jobs: Sequence[Job], originals: torch.Tensor | None, make_bar: MakeBar) -> torch.Tensor:
        """Latents (B, C, height / 8, width / 8), float32, denoised from noise alone or from noisy `originals`."""
        from library.draw.denoiser import Denoiser, Guidance
        from library.draw.regions import make_regions

        device, dtype = self.unet.device, self.unet.dtype
        guidance = Guidance(jobs, device)
        chunks = self.encoder.chunks(*guidance.texts)
        with self._on_device(self.text_encoder):
            text = self.encoder.encode(guidance.texts, chunks, guidance.text_multipliers).to(dtype)
        self.networks.use(jobs[0].network_multipliers)
        regions = make_regions(jobs, self.region_color_codes, device)
        text = replace(text, regions=regions)
        scheduler, timesteps = self._schedule(jobs[0])
        noise = draw_noise([job.seed for job in jobs], self._latent_shape(jobs[0]), self.sampler, jobs[0])
        step_arguments = {"generator": noise.generators} if self.sampler.draws_noise else {}
        latents, before_step, after_step = self._start(jobs, originals, scheduler, timesteps, noise)
        if self.judges:
            prompts = [self.encoder.encode([job.prompt], chunks, [job.network_multipliers]).to(dtype) for job in jobs]
            before_step.append(self.judges.guide(jobs, prompts, scheduler, timesteps))
        shrinker = Shrinker(jobs[0].deep_shrink, timesteps.tolist())
        guided = self.guidance_interval.guided(len(timesteps), scheduler.order)
        steering = self.control_nets.steer(jobs, len(timesteps))
        with shrinker.attached(self.unet, *self.control_nets.models), self._in_regions(regions):
            denoiser = Denoiser(self.unet, text, guidance, guided, shrinker, steering)
            for index, timestep in enumerate(make_bar(timesteps)):
                sample = scheduler.scale_model_input(latents, timestep).to(dtype)
                prediction = denoiser(sample, timestep, index)
                for hook in before_step:
                    prediction, latents = hook(prediction, latents, index)
                latents = scheduler.step(prediction, timestep, latents, **step_arguments).prev_sample
                for hook in after_step:
                    latents = hook(latents, index)
        return latents

    def _on_device(self, model: CLIPTextModel | AutoencoderKL) -> AbstractContextManager:
        """A block in which a model is on the U-Net's device; with --lowvram only then."""
        return devices.on_device(model, self.unet.device, leave=self.low_vram)

    @contextmanager
    def _in_regions(self, regions: Regions | None) -> Iterator[None]:
        """A block in which the parts of prompts, and the networks that are for them, keep to their regions."""
        with ExitStack() as stack:
            if regions is not None:
                stack.enter_context(regions.attached(self.unet, *self.control_nets.models))
                stack.enter_context(self.networks.acting_in(regions))
            yield

    def _latent_shape(self, job: Job) -> tuple[int, int, int]:
        return self.unet.config.in_channels, job.height // self.cell_px, job.width // self.cell_px

    def _schedule(self, job: Job) -> tuple[SchedulerMixin, torch.Tensor]:
        """A scheduler, and the timesteps it is run for: with a picture to start from the last `steps_run` steps.

        They stay on the CPU, where schedulers look numbers up by them: a step then waits for no other device.
        """
        growing = job.gradual_latent.timesteps is not None
        scheduler = make_scheduler(self.sampler, self.prediction_type, growing=growing)
        scheduler.set_timesteps(job.steps)
        first = (job.steps - job.steps_run) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        timesteps = scheduler.timesteps[first:]
        if growing:
            sizes = job.gradual_latent.growth(timesteps.tolist(), *self._latent_shape(job)[1:])
            scheduler.plan(job.gradual_latent, {first + place: size for place, size in sizes.items()})
        return scheduler, timesteps

    def _start(
        self,
        jobs: Sequence[Job],
        originals: torch.Tensor | None,
        scheduler: SchedulerMixin,
        timesteps: torch.Tensor,
        noise: Noise,
    ) -> tuple[torch.Tensor, list[BeforeStep], list[AfterStep]]:
        """The latents that denoising starts from, and what is done before and after each step."""
        device = self.unet.device
        after_step: list[AfterStep] = []
        if originals is None:
            latents = noise.start.to(device) * scheduler.init_noise_sigma
        else:
            source_noise = noise.source.to(device)
            latents = scheduler.add_noise(originals, source_noise, timesteps[:1].expand(len(jobs)))
            if jobs[0].mask is not None:
                masks = self._latent_masks(jobs)
                after_step.append(Inpainting(scheduler, timesteps, originals, source_noise, masks))
        if jobs[0].gradual_latent.timesteps is not None:
            from library.draw.gradual_latent import shrink_start

            latents = shrink_start(latents, jobs[0].gradual_latent)
        return latents, [], after_step

    def _enlarge(
        self, latents: torch.Tensor, pictures: Sequence[np.ndarray | None], stage: Sequence[Job]
    ) -> torch.Tensor:
        """What Highres. fix's next stage draws over: latents (B, C, h, w) float32 of that stage's size."""
        import torch
        import torch.nn.functional as F
        from PIL import Image

        size = (stage[0].width, stage[0].height)
        if self.highres.enlarge_latents:
            return F.interpolate(latents, size=self._latent_shape(stage[0])[1:], mode="bilinear", align_corners=False)
        small = [  # a picture that failed stays failed; black takes its place among its neighbours
            Image.new("RGB", size) if picture is None else Image.fromarray(picture) for picture in pictures
        ]
        if self.upscaler is None:
            large = [picture.resize(size, Image.Resampling.LANCZOS) for picture in small]
            return torch.stack([self._encode_picture(picture) for picture in large])
        with self._on_device(self.vae):
            enlarged = self.upscaler.upscale(
                self.vae,
                lowreso_images=small,
                lowreso_latents=None,
                dtype=self.vae.dtype,
                width=size[0],
                height=size[1],
                batch_size=len(small),
                vae_batch_size=self.vae_batch_size,
            )
        return enlarged.to(latents)

    def _encode_sources(self, jobs: Sequence[Job]) -> torch.Tensor:
        """The jobs' source pictures as latents (B, C, h, w) float32."""
        import torch

        return torch.stack([self._encode_source(job.source, (job.width, job.height)) for job in jobs])

    def _encode_source(self, path: Path, size_px: tuple[int, int]) -> torch.Tensor:
        """The latent mean of a picture, scaled: (C, h, w) float32. Pictures used lately are kept."""
        kept = self._encoded.pop((path, size_px), None)
        if kept is None:
            kept = self._encode_picture(load_source(path, size_px))
        self._encoded[path, size_px] = kept
        if len(self._encoded) > KEPT_SOURCES:
            del self._encoded[next(iter(self._encoded))]
        return kept

    def _encode_picture(self, picture: Image) -> torch.Tensor:
        """The latent mean of a picture, scaled: (C, h, w) float32."""
        with self._on_device(self.vae):
            pixels = pixels_to_tensor(picture).to(self.vae.device, self.vae.dtype)
            mean = self.vae.encode(pixels * 2 - 1).latent_dist.mean
        return mean[0].float() * self.vae.config.scaling_factor

    def _latent_masks(self, jobs: Sequence[Job]) -> torch.Tensor:
        """The jobs' masks at the size of the latents, (B, 1, h, w); 1 is repainted."""
        import torch

        _, height, width = self._latent_shape(jobs[0])
        return torch.cat([pixels_to_tensor(load_mask(job.mask, (width, height))) for job in jobs]).to(self.unet.device)

    def _decode(self, latents: torch.Tensor) -> list[Decoding]:
        """Begin to decode latents (B, C, h, w), `vae_batch_size` at a time."""
        from library.draw.decoding import Decoding

        malloc.give_back()  # the U-Net's memory is in pieces of other sizes
        with self._on_device(self.vae):
            return [Decoding(self.vae, part) for part in latents.split(self.vae_batch_size)]


def _pictures(decoded: Sequence[Decoding]) -> list[np.ndarray | None]:
    return [picture for part in decoded for picture in part.pictures()]


@devices.no_collection()
@malloc.blocks_from_system()
def load_pipeline(plan: RunPlan, process: int = 0) -> Pipeline:
    """Choose the device, load the models and set them up as planned."""
    if plan.compile:
        keep_compiled()
    from library.models.weight_reading import read_ahead

    device = devices.choose_device(process)
    dtype = devices.choose_dtype(device, fp16=plan.fp16, bf16=plan.bf16)
    logger.debug("drawing on %s in %s", device, dtype)
    channels_last = plan.channels_last or device.type == "cpu"
    with devices.single_threaded():
        files = read_ahead(plan.model, device, dtype, channels_last=channels_last)
        # these take longer to import than the weights take to be read meanwhile
        import diffusers
        import torch
        import transformers

        from library.models.models import load_models

        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
        models = load_models(files, device, dtype, plan.tokenizer_cache_dir)
    from library.draw.attention import use_kernel
    from library.draw.control_net import ControlNets, load_control_net
    from library.machine.packed_layers import can_pack, pack_layers
    from library.machine.vae_slices import slice_resnets
    from networks.attach import Networks
    from networks.files import read_state

    gradients = plan.guidance.uses_anything
    kernel = devices.choose_attention(device, dtype, xformers=plan.xformers, gradients=gradients)
    upscaler = plan.highres and plan.highres.upscaler and make_upscaler(plan.highres.upscaler, device, dtype)
    network_weights = [read_state(spec.weights) for spec in plan.networks.specs]
    nets = [load_control_net(spec, models.unet) for spec in plan.control_nets]
    control_nets = ControlNets(nets, together=plan.control_nets_together, save_guides=plan.save_guides)
    for model in (models.unet, *control_nets.models):
        use_kernel(model, kernel)
    if channels_last:
        for model in control_nets.models:  # U-Net and VAE were read so
            model.to(memory_format=torch.channels_last)
    if plan.vae_slices:
        slice_resnets(models.vae, plan.vae_slices)
    networks = Networks(plan.networks, network_weights, models)
    rewritten, eager = networks.rewritten_layers(), [models.unet, *control_nets.models]
    if plan.compile:
        compile_unet(eager.pop(0), device, constant=not (rewritten or networks.write_into_weights))
    if can_pack(device, dtype) and not (gradients or networks.write_into_weights):
        for model in eager:
            pack_layers(model, keep=rewritten)
    if plan.low_vram and device.type == "cpu":
        logger.warning("--lowvram: there is no GPU here, it changes nothing")
    judges = None
    if gradients:
        from library.draw.loss_guidance import load_judges

        judges = load_judges(plan.guidance, plan.guidance_files, models)
    return Pipeline(models, networks, control_nets, plan, upscaler, judges)


@console.others_at_work()
def make_upscaler(spec: UpscalerSpec, device: torch.device, dtype: torch.dtype) -> Upscaler:
    """Make Highres. fix's upscaler by its module's `create_upscaler`.

    Raises:
        InputError: when the module has none, or refuses its arguments.
    """
    try:
        create = importlib.import_module(spec.module).create_upscaler
    except Exception as problem:  # whatever the module raises
        raise InputError(spec.subject, f"is no upscaler ({problem}); use tools.latent_upscaler") from None
    try:
        inspect.signature(create).bind(**dict(spec.arguments))
    except TypeError as problem:
        raise InputError("--highres_fix_upscaler_args", f"{spec.module} refuses them: {problem}") from None
    upscaler = create(**dict(spec.arguments))
    upscaler.to(device=device, dtype=dtype)
    return upscaler


# ---------------------------------------------------------------------------------------------------------------------
# Runs

EXIT_SOME_FAILED = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    console.make_streams_safe()
    options, said = parse_options(sys.argv[1:] if argv is None else argv)
    team = Team.from_environment()
    outlive_others(team)
    with console.messages(message_level(options, team)):
        try:
            devices.check_versions()
            return run(options, said, team)
        except ProgramError as problem:
            if options.debug:
                traceback.print_exc()
            for each in getattr(problem, "problems", [problem]):
                console.error(each)
            return problem.exit_status
        except KeyboardInterrupt as interruption:
            console.error("interrupted; the pictures named above are complete")
            return getattr(interruption, "exit_status", Interrupted(signal.SIGINT).exit_status)
        except Exception as problem:
            if options.debug:
                traceback.print_exc()
            if fault := compile_fault(problem):
                console.error(fault)
                return fault.exit_status
            reason = f"{type(problem).__name__}: {problem}".replace("\n", " ")
            console.error(f"a fault of this program, {reason}; --debug shows where")
            return ProgramError.exit_status
        finally:
            team.leave()


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, Said]:
    """The options, converted and as they were said; leaves with status 2 where one cannot be used."""
    parser = make_parser()
    try:
        argv = with_config(argv, parser)
    except InputError as problem:
        parser.error(str(problem))
    return parser.parse(argv), as_said(argv, parser)


def message_level(options: argparse.Namespace, team: Team) -> int:
    """From which level on this process shows its messages; the first of several speaks for all."""
    if not team.is_first:
        return logging.ERROR
    return logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO


def run(options: argparse.Namespace, said: Said, team: Team) -> int:
    """Plan and do what the user said; returns the exit status."""
    if not team.is_first and (shared := team.receive_plan()) is None:
        return 0  # the first process says why
    if options.interactive and team.size > 1:
        raise InputError("--interactive", "is for one process; start the program by itself")
    plan = make_plan(options, None if team.is_first else shared)
    if plan.dry_run:
        return show(plan)
    make_folder(plan.outdir, "--outdir")
    model_hash = FileHash(plan.model.path)
    facts = RunFacts(
        *(plan.sampler, plan.model.name, plan.clip_skip, model_hash, plan.highres),
        *(plan.networks, plan.guidance, plan.control_nets, plan.guidance_interval),
    )
    if plan.keyboard is not None:
        with PictureWriter(facts, announce, quality=plan.quality) as writer:
            run_interactive(plan, load_pipeline(plan), writer, plan.keyboard)
        return 0
    return make_pictures(plan, facts, said, team)


def show(plan: RunPlan) -> int:
    """Show the plan in place of carrying it out; of the model only the tokenizer is loaded."""
    from library.draw.text_encoding import PromptEncoder
    from library.models.models import empty_text_encoder, load_tokenizer

    tokenizer, empty = load_tokenizer(plan.model, plan.tokenizer_cache_dir), empty_text_encoder(plan.model.text_encoder)
    encoder = PromptEncoder(tokenizer, empty, plan.clip_skip, plan.max_chunks, plan.embeddings)
    batches = group_into_batches(plan.to_do, plan.batch_size, lambda job: batch_key(job, plan.highres, encoder))
    for line in show_plan(plan, batches):
        console.result(line)
    console.say(summary(plan, batches))
    return 0


def make_pictures(plan: RunPlan, facts: RunFacts, said: Said, team: Team) -> int:
    """Make the planned pictures that are not there yet, and say what came of it."""
    with Manifest(plan.outdir, plan.record) as manifest:
        if plan.resumed and team.is_first:
            plan = replace(plan, done=recover(plan, manifest, facts))
        team.send_plan(plan)
        team.tell("manifest", (manifest.file.name, manifest.pictures_before))
        tally, others = Tally(plan), Others(team, plan.outdir)

        def saved(job: Job, file: Path) -> None:
            tally.count_made(job)
            announce(job, file, plan.json)

        pipeline = load_pipeline(plan, team.local_rank) if plan.to_do else None
        try:
            console.say(summary(plan))
            if pipeline is not None:
                if team.is_first:
                    keep_settings(plan.outdir, said)
                with PictureWriter(facts, saved, manifest, plan.quality, plan.resumed) as writer:
                    run_jobs(plan, pipeline, writer, tally, team, others)
            if team.is_first:
                tally.list_missing(others.jobs_made())
                for file in show_results(plan, facts, said):
                    console.say(f"written: {file}")
        finally:
            tally.made_elsewhere = len(others.jobs_made())
            if team.is_first:
                tell(tally, plan)
    return EXIT_SOME_FAILED if tally.failed else 0


def tell(tally: Tally, plan: RunPlan) -> None:
    """Say what a run came to, and where the lines of its failed pictures are."""
    console.say(tally.summary())
    if tally.failed and (file := save_failed(plan.outdir, tally.failed, plan.defaults)):
        console.say(f"the failed pictures' lines: {file}")


def announce(job: Job, file: Path, as_json: bool = False) -> None:
    """Say on standard output where a picture is."""
    console.result(to_json(picture_facts(job) | {"file": str(file)}) if as_json else str(file))


if __name__ == "__main__":
    status = main()
    gc.freeze()  # leaving would search a million objects for garbage; the system takes all memory back anyway
    sys.exit(status)
