#!/usr/bin/env python3
"""Draw pictures with Stable Diffusion 1.x, 2.x and XL: from the shell, from a file of prompts, or in a loop."""

from __future__ import annotations

import gc
import logging
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library import console, values
from library.errors import InputError, Interrupted, ProgramError
from library.files.control_net import CONTROL_TYPES
from library.files.model_inputs import INPAINTING, PLAIN
from library.files.picture_files import DEFAULT_QUALITY, FORMATS
from library.machine import devices, malloc
from library.machine.compiling import compile_fault, keep_compiled
from library.plan.config import keep_settings, with_config
from library.plan.file_names import make_folder
from library.plan.job import Job
from library.plan.picture_facts import picture_facts, to_json
from library.plan.plan_view import show_plan, summary
from library.plan.planning import make_plan
from library.plan.prompt_lines import PROMPT_OPTIONS
from library.plan.prompt_syntax import SD_SCRIPTS, SYNTAXES, prompt_syntax
from library.plan.run_plan import RunPlan
from library.plan.stages import stages
from library.plan.sweep import axis
from library.plan.tokens import MOST_CHUNKS
from library.results.gallery import show_results
from library.results.metadata import RunFacts, run_facts
from library.results.writer import PictureWriter
from library.run.interactive import run_interactive
from library.run.manifest import Manifest, recover
from library.run.processes import Team
from library.run.report import Tally, save_failed
from library.run.runs import BatchDrawer, Draw, Drawn, Interruptions, run_jobs
from library.settings import completion, deep_shrink, fleet, gradual_latent, masks, samplers, sizes, tiling
from library.settings.computing import CUDA_GRAPHS, ENGINES, TORCH, vae_batch_size
from library.settings.control_net import control_type
from library.settings.emphasis import ORIGINAL, normalization
from library.settings.file_names import FIELDS, name_pattern
from library.settings.options import (
    CHOICE,
    COMMAND_LINE,
    COMPUTING,
    PICTURE,
    RUN,
    TELLING,
    Needs,
    OptionGroup,
    OptionParser,
    Options,
)
from library.settings.output import picture_format
from library.settings.preprocessing import PREPROCESSORS, preprocessing, written
from library.settings.sampler_names import NamedSampler, sampler_lines, sampler_name, schedule_name, schedule_names
from library.settings.samplers import SAMPLERS, SECOND_NAMES
from library.settings.upscaler import factor, upscaler_arguments
from library.version import VERSION
from networks.strengths import parse_strength

if TYPE_CHECKING:  # torch and what needs it are imported once every option and file has been checked
    import numpy as np
    import torch
    from diffusers import SchedulerMixin
    from torch import nn

    from library.draw.control_net import ControlNets
    from library.draw.decoding import Decoding
    from library.draw.denoiser import Cfg, Said
    from library.draw.latent_preview import LatentPreview
    from library.draw.lllite import LLLites
    from library.draw.loss_guidance import Judges
    from library.draw.model_inputs import Beside
    from library.draw.regions import Regions
    from library.draw.samplers import Noise
    from library.draw.sources import Start
    from library.draw.text_conditions import TextConditions
    from library.draw.text_encoding import PromptEncoder
    from library.draw.unet_call import UnetCall
    from library.machine.openvino_engine import OpenVinoUnet
    from library.models.kept_weights import ModelKeeper
    from library.models.models import Models
    from library.models.upscaler import Upscaler
    from networks.attach import Networks
    from networks.strengths import Strength

    MakeBar = Callable[[Iterable], Iterable]  # shows a bar while a batch's steps are gone through
    # Before a step: the joined prediction and the latents, both (B, C, h, w), and the step's place → both, changed
    BeforeStep = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
    AfterStep = Callable[[torch.Tensor, int], torch.Tensor]  # after a step: the latents and the step's place → latents

# ---------------------------------------------------------------------------------------------------------------------
# Command line

_EXAMPLES = """examples:
  one picture:            gen_img_diffusers.py --ckpt model.safetensors --prompt "a red cat --n blurry --d 1"
  a file of prompts:      gen_img_diffusers.py --ckpt model.safetensors --bf16 --batch_size 4 --from_file prompts.txt
  what it would make:     gen_img_diffusers.py --ckpt model.safetensors --from_file prompts.txt --dry_run
  after an interruption:  gen_img_diffusers.py --ckpt model.safetensors --bf16 --from_file prompts.txt --resume
  settings compared:      gen_img_diffusers.py --ckpt model.safetensors --prompt "a cat" --sweep scale=4,7,12 --grid
  from a picture:         gen_img_diffusers.py --ckpt model.safetensors --image_path sketch.png --prompt "a castle"
  pictures again:         gen_img_diffusers.py --ckpt model.safetensors --from_pictures outputs --steps 40
  prompt after prompt:    gen_img_diffusers.py --ckpt model.safetensors --interactive
  options from a file:    gen_img_diffusers.py --config settings.toml --seed 7"""

# What -h shows: enough for a first picture, for others like it, and for one from a picture
_FIRST = (
    *("ckpt", "prompt", "from_file", "interactive", "negative_prompt", "W", "H", "steps", "scale", "sampler", "seed"),
    *("images_per_prompt", "image_path", "strength", "network_weights", "network_mul", "outdir"),
    *("batch_size", "bf16", "resume", "dry_run"),
)

_IMG2IMG = Needs(("image_path",), "is for img2img; give --image_path too, or leave it out")
_MASKED = Needs(
    ("mask_path", "mask_from_alpha", "extend"),
    "is for masks; give --mask_path, --mask_from_alpha or --extend too, or leave it out",
)
_MASK = Needs(("mask_path", "mask_from_alpha"), "needs a mask; give --mask_path or --mask_from_alpha too")
_PICTURES = Needs(
    ("image_path", "mask_path", "guide_image_path", "from_pictures"),
    "sorts pictures; give --image_path, --mask_path or --guide_image_path too, or leave it out",
)
_HIGHRES = Needs(("highres_fix_scale",), "is for Highres. fix; give --highres_fix_scale too, or leave it out")
_NETWORKS = Needs(("network_weights",), "is for networks; give --network_weights too, or leave it out")
_ANY_NETWORKS = Needs(("network_weights", "network_dir"), _NETWORKS.problem)
_CONTROL_NET = Needs(("control_net_models",), "is for ControlNet; give --control_net_models too, or leave it out")
_CONTROL = Needs(
    ("control_net_models", "control_net_lllite_models"),
    "is for ControlNet; give --control_net_models or --control_net_lllite_models too, or leave it out",
)
_GUIDED = Needs(
    ("control_net_models", "control_net_lllite_models", "clip_image_guidance_scale", "vgg16_guidance_scale"),
    "nothing uses it; give --control_net_models, --clip_image_guidance_scale or --vgg16_guidance_scale too, "
    "or leave it out",
)
# what takes the U-Net to pieces: compiled, or run once more for gradients
_NOT_WITH_LLLITE = ("compile", "clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale")
_TILES = Needs(("tile",), "is for tiles; give --tile too, or leave it out")
# what would be compiled for each tile, or sees the picture as a whole
_NOT_WITH_TILES = ("compile", "clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale")
_INTERACTIVE = Needs(("interactive",), "is for the loop's window; give --interactive too, or leave it out")
_LOOP = ("interactive",)  # where one line is known at a time
_REGION_MAP = Needs(("mask_path",), "reads a map of regions; give --mask_path too")
_ENLARGING = Needs(
    ("highres_fix_scale", "upscale"), "is for Highres. fix; give --highres_fix_scale or --upscale too, or leave it out"
)
_UPSCALER = Needs(("highres_fix_upscaler",), "has no upscaler; give --highres_fix_upscaler too")


def make_parser() -> OptionParser:
    """All options, in groups."""
    prompt_options = "\n".join(f"{f'--{o.name} {o.metavar}':21} {o.help}" for o in PROMPT_OPTIONS.values())
    parser = OptionParser(
        prog="gen_img_diffusers.py",
        usage="%(prog)s --ckpt MODEL (--prompt TEXT | --from_file FILE | --interactive) [options]",
        description=f"{__doc__}\n\n{_EXAMPLES}",
    )
    for title, add_options in _OPTION_GROUPS.items():
        add_options(parser.add_options(title))
        if add_options is _source_options:
            parser.add_argument_group("options of a prompt line", prompt_options)
    return parser


def _model_options(group: OptionGroup) -> None:
    group.add("--ckpt", use=COMPUTING, metavar="MODEL", convert=values.not_empty, required=True,
              help="checkpoint file, Diffusers folder, Hugging Face id, or a glob that matches one file")  # fmt: skip
    group.switch("--v2", use=PICTURE, help="the model is Stable Diffusion 2.x")
    group.switch("--v_parameterization", use=PICTURE, help="the model predicts v, not noise")
    group.switch("--zero_terminal_snr", use=PICTURE, help="pictures begin at pure noise, as some v models want it")
    group.add("--vae", use=PICTURE, metavar="VAE", convert=values.not_empty, names_files=True,
              help="VAE to use in place of the model's own (file, folder or id)")  # fmt: skip
    group.add("--clip_skip", use=PICTURE, metavar="N", convert=values.whole_number(1),
              help="take the text encoders' N-th last layer (default 1, the last; XL: 2)")  # fmt: skip
    group.add("--emb_normalize_mode", use=PICTURE, metavar="MODE", convert=normalization, default=ORIGINAL,
              help="mean that a text keeps when its weights are applied: original (default), abs or none")  # fmt: skip
    group.switch("--zero_empty_negative", use=PICTURE,
                 help="XL: zeros for an empty negative prompt, not what text encoders make of it")  # fmt: skip
    group.add("--max_embeddings_multiples", use=PICTURE, metavar="N", convert=values.whole_number(1, MOST_CHUNKS),
              default=1,
              help="longest prompt, in chunks of 75 tokens (default 1; --prompt_syntax webui: as needed)")  # fmt: skip
    group.add("--tokenizer_cache_dir", use=COMPUTING, metavar="DIR", convert=Path,
              help="folder to take the tokenizer from; the shipped one is put there first")  # fmt: skip


def _source_options(group: OptionGroup) -> None:
    sources = "sources of prompts"
    group.add("--prompt", use=RUN, metavar="TEXT", alternative=sources, help="prompt line, with its options")
    group.add("--negative_prompt", use=PICTURE, metavar="TEXT",
              help="negative prompt of all lines without a --n of their own; groups and wildcards count")  # fmt: skip
    group.add("--from_file", use=RUN, metavar="FILE", alternative=sources,
              help="file with one prompt line a line (- is standard input), or rows in .jsonl or .csv")  # fmt: skip
    group.add("--from_pictures", use=RUN, many=True, metavar="PATH", convert=values.not_empty, alternative=sources,
              help="draw pictures again as their metadata tells, of this program and of others: files, folders, "
              "globs; options given here win")  # fmt: skip
    group.switch("--interactive", use=RUN, alternative=sources, help="ask for prompt lines and show the pictures")
    group.switch("--no_preview", use=RUN, help="show no windows in interactive use")
    group.add("--preview_every", use=RUN, metavar="N", convert=values.whole_number(1), needs=_INTERACTIVE,
              not_with=("no_preview",), help="show pictures as they come, at every N-th step")  # fmt: skip
    group.add("--prompt_syntax", use=PICTURE, metavar="NAME", convert=prompt_syntax, default=SD_SCRIPTS,
              words=SYNTAXES,
              help="sd-scripts (default), or webui: [a:b:0.5], [a|b], AND with weights, <lora:name:0.8>")  # fmt: skip
    group.add("--wildcard_dir", use=CHOICE, metavar="DIR", convert=Path,
              help="folder of .txt and .yaml lists, of which __name__ in a prompt takes an entry")  # fmt: skip
    group.add("--sweep", use=CHOICE, many=True, again=True, metavar="NAME=VALUE,...", convert=axis,
              help="draw each prompt with each of these values: scale=4,7.5,12, seed=1-4, network_mul=0,0.5,1 or "
              "prompt=old:new|new; several of them in all combinations, with the same seeds")  # fmt: skip
    group.switch("--shuffle_prompts", use=CHOICE, help="mix the lines anew in each iteration")


def _picture_options(group: OptionGroup) -> None:
    group.add("--W", use=PICTURE, metavar="PIXELS", convert=values.size_px, help="width (default 512, XL: 1024)")
    group.add("--H", use=PICTURE, metavar="PIXELS", convert=values.size_px, help="height (default 512, XL: 1024)")
    group.add("--steps", use=PICTURE, metavar="N", convert=values.steps, default=50, help="sampling steps (default 50)")
    group.add("--scale", use=PICTURE, metavar="SCALE", convert=values.guidance_scale, default=7.5,
              help="guidance scale; up to 1 is without guidance (default 7.5)")  # fmt: skip
    group.add("--sampler", use=PICTURE, metavar="NAME", convert=sampler_name, default=NamedSampler("ddim"),
              words=(*SAMPLERS, *SECOND_NAMES),
              help=f"{', '.join([*SAMPLERS, *SECOND_NAMES])}; "
              "or a name of the web UI, 'DPM++ 2M Karras' (default ddim)")  # fmt: skip
    group.add("--seed", use=CHOICE, metavar="SEED", convert=values.seed_or_fresh,
              help="the picture's seed, or what those of several are drawn from (-1, default: a new one)")  # fmt: skip
    group.switch("--iter_same_seed", use=CHOICE, help="one seed for all pictures of an iteration")
    group.add("--images_per_prompt", use=CHOICE, metavar="N", convert=values.whole_number(1),
              help="pictures for each prompt (default 1; of a line with --d 1,2,3 one for each seed)")  # fmt: skip
    group.add("--n_iter", use=CHOICE, metavar="N", convert=values.whole_number(1), default=1,
              help="how often all prompts are gone through (default 1)")  # fmt: skip
    group.add("--schedule", use=PICTURE, metavar="NAME", convert=schedule_name, default="own",
              words=schedule_names().split(", "),
              help=f"how noise falls from step to step: {schedule_names()} (default own, the sampler's)")  # fmt: skip
    group.add("--timesteps", use=PICTURE, metavar="T,T,...", convert=samplers.timesteps,
              help="the timesteps themselves, one for each step: 999,749,499,249")  # fmt: skip
    group.add("--eta", use=PICTURE, metavar="SHARE", convert=samplers.eta,
              help="ddim, tcd: share of noise in what a step changes, 0 to 1 (default 0 and 0.3)")  # fmt: skip
    group.add("--s_churn", use=PICTURE, metavar="AMOUNT", convert=samplers.s_churn, default=0.0,
              help="euler: noise that is stirred in, over all steps (default 0)")  # fmt: skip
    group.add("--negative_scale", use=PICTURE, metavar="SCALE", convert=values.number_or_none,
              help="guidance scale of the negative prompt alone")  # fmt: skip
    group.add("--image_guidance", use=PICTURE, metavar="SCALE", convert=values.image_guidance,
              help="edit models: how closely to keep to the picture, 1 or more (default 1.5)")  # fmt: skip
    group.add("--guidance_start", use=PICTURE, metavar="SHARE", convert=values.share, default=0.0,
              help="approximate, faster: guide after this share of the steps only (default 0)")  # fmt: skip
    group.add("--guidance_end", use=PICTURE, metavar="SHARE", convert=values.share, default=1.0,
              help="approximate, faster: guide up to this share of the steps only (default 1)")  # fmt: skip
    group.add("--guidance_rescale", use=PICTURE, metavar="PHI", convert=values.share, default=0.0,
              help="pull what guidance overdoes back, 0 to 1; 0.7 for models with zero terminal SNR")  # fmt: skip


def _size_options(group: OptionGroup) -> None:
    for name, help in (
        ("original_width", "width of the original that the model is told (default: the picture's)"),
        ("original_height", "its height (default: the picture's)"),
        ("original_width_negative", "its width for the negative prompt (default: as for the prompt)"),
        ("original_height_negative", "its height for the negative prompt (default: as for the prompt)"),
        ("crop_top", "where the original was cropped, from its top (default 0)"),
        ("crop_left", "where the original was cropped, from its left (default 0)"),
    ):
        group.add(f"--{name}", use=PICTURE, metavar="PIXELS", convert=sizes.pixels, help=help)


def _output_options(group: OptionGroup) -> None:
    names = "ways to name files"
    group.add("--outdir", use=RUN, metavar="DIR", convert=Path, default=Path("outputs"), help="default: outputs")
    group.switch("--sequential_file_name", use=CHOICE, alternative=names,
                 help="name pictures im_000001.png and so on")  # fmt: skip
    group.switch("--use_original_file_name", use=CHOICE, alternative=names, needs=_IMG2IMG,
                 help="name pictures like their source picture")  # fmt: skip
    group.add("--file_name", use=CHOICE, metavar="PATTERN", convert=name_pattern, alternative=names,
              help=f"name pictures so, with {{seed}} and its like for {', '.join(FIELDS)}")  # fmt: skip
    group.add("--format", use=PICTURE, metavar="FORMAT", convert=picture_format, default="png",
              words=FORMATS, help=f"{', '.join(FORMATS)} (default png)")  # fmt: skip
    group.add("--quality", use=PICTURE, metavar="N", convert=values.whole_number(1, 100),
              help=f"of WebP and JPEG, 1 to 100 (default {DEFAULT_QUALITY})")  # fmt: skip
    group.switch("--grid", use=RUN, not_with=_LOOP,
                 help="make contact sheets too: one a prompt, or with --iter_same_seed prompts by seeds")  # fmt: skip
    group.switch("--html", use=RUN, not_with=_LOOP, help="make index.html too: all pictures with their settings")


def _run_options(group: OptionGroup) -> None:
    group.add("--config", use=COMMAND_LINE, metavar="FILE",
              help="TOML file of options (steps = 20); those given here win")  # fmt: skip
    group.switch("--resume", use=TELLING, not_with=_LOOP, help="go on with the run that this command began in --outdir")
    group.switch(
        "--dry_run", use=TELLING, not_with=_LOOP, help="check everything, show what would be made, make nothing"
    )
    group.switch("--json", use=TELLING, not_with=_LOOP,
                 help="write a JSON object for each picture to standard output, not its path alone")  # fmt: skip
    shown = group.only_one()
    shown.switch("--quiet", use=TELLING, help="show warnings and errors only")
    shown.switch("--verbose", use=TELLING, help="show more of what is done")
    group.switch("--debug", use=TELLING, help="show the traceback of an error")
    group.show_help(_FIRST)
    group.show_and_leave(
        "--list_samplers", lines=lambda *_: sampler_lines(), help="write the samplers' names and leave"
    )
    group.show_and_leave("--completion", lines=completion.script, metavar="SHELL", words=completion.SHELLS,
                         convert=values.one_of(completion.SHELLS),
                         help="write what completes options in bash, zsh or fish and leave")  # fmt: skip
    version = f"gen_img_diffusers.py {VERSION}"
    group.show_and_leave("--version", lines=lambda *_: iter([version]), help="write the version and leave")


def _network_options(group: OptionGroup) -> None:
    group.add("--network_module", use=PICTURE, many=True, metavar="MODULE",
              help="module of each network (default networks.lora, which reads LoRA and its relatives LoCon, DyLoRA, "
              "LoHa, LoKr, DoRA, IA3, OFT, full and norm differences, and tells them apart by itself)")  # fmt: skip
    group.add("--network_weights", use=PICTURE, many=True, metavar="FILE", names_files=True,
              help="weight file of each network")  # fmt: skip
    group.add("--network_mul", use=PICTURE, many=True, metavar="M", convert=parse_strength, needs=_NETWORKS,
              help="strength of each network (default 1): U, U/T for U-Net and text encoder, then blocks, "
              "then steps, as in 0.8/0.4[MIDD]@0.2-0.7")  # fmt: skip
    group.add("--network_args", use=PICTURE, many=True, metavar="KEY=VALUE;KEY=VALUE", needs=_NETWORKS,
              help="arguments for each module")  # fmt: skip
    group.switch("--network_merge", use=PICTURE, needs=_NETWORKS, help="add all networks to the weights for good")
    group.add("--network_merge_n_models", use=PICTURE, metavar="N", convert=values.whole_number(1), needs=_NETWORKS,
              help="add only the first N networks to the weights")  # fmt: skip
    group.add("--network_dir", use=PICTURE, metavar="DIR", convert=values.not_empty,
              help="folder of the networks that tags in prompts name, <lora:NAME:0.8>, with all below it")  # fmt: skip
    group.switch("--network_pre_calc", use=PICTURE, needs=_ANY_NETWORKS,
                 help="put the networks into the weights anew whenever multipliers change")  # fmt: skip
    group.switch("--network_show_meta", use=COMPUTING, needs=_NETWORKS,
                 help="show the metadata of the networks' files")  # fmt: skip
    group.add("--textual_inversion_embeddings", use=PICTURE, many=True, metavar="FILE", names_files=True,
              help="embeddings; the name of each, without its ending, is a word for prompts")  # fmt: skip
    group.add("--XTI_embeddings", use=PICTURE, many=True, metavar="FILE", names_files=True,
              help="embeddings with vectors for each of 16 layers (Extended Textual Inversion)")  # fmt: skip


def _img2img_options(group: OptionGroup) -> None:
    masked_by = "ways of giving masks"
    group.add("--image_path", "--img_path", use=CHOICE, metavar="PATH", convert=values.not_empty, names_files=True,
              help="picture to start from, or a folder, glob ('pics/*.png') or list (.txt) of them")  # fmt: skip
    group.add("--mask_path", "--mask_image", use=CHOICE, metavar="PATH", convert=values.not_empty, names_files=True,
              alternative=masked_by,
              help="mask, or a folder, glob or list of them: white is repainted; for a prompt with AND, a map of the "
              "parts' regions in its red, green and blue channel")  # fmt: skip
    group.switch("--natural_order", use=CHOICE, needs=_PICTURES,
                 help="sort folders and globs of pictures with 2 before 10, not as strings")  # fmt: skip
    group.add("--network_regional_mask_max_color_codes", use=PICTURE, metavar="N", convert=values.whole_number(1, 7),
              needs=_REGION_MAP, help="read N regions from the map's pure colours instead: red, green, yellow, blue, "
              "magenta, cyan, white")  # fmt: skip
    group.add("--strength", use=PICTURE, metavar="STRENGTH", convert=values.strength, default=0.8,
              help="share of the steps that is run: how far the picture changes (default 0.8)")  # fmt: skip
    group.switch("--allow_large_pictures", use=PICTURE,
                 help="take pictures of more than 16384 pixels a side, too; they need much memory")  # fmt: skip
    group.switch("--keep_unmasked", use=PICTURE, needs=_IMG2IMG,
                 help="outside the mask, keep the source's own pixels, not the VAE's copy of them")  # fmt: skip
    group.switch("--mask_from_alpha", use=PICTURE, needs=_IMG2IMG, alternative=masked_by,
                 help="repaint what is transparent in the source picture")  # fmt: skip
    group.switch("--mask_invert", use=PICTURE, needs=(_IMG2IMG, _MASK), help="repaint what the mask leaves")
    group.add("--mask_blur", use=PICTURE, metavar="PIXELS", convert=values.number(0, 1024), default=0,
              needs=(_IMG2IMG, _MASKED), help="soften the mask's edges (default 0)")  # fmt: skip
    group.add("--fill", use=PICTURE, metavar="NAME", convert=values.one_of(masks.FILLS), default=masks.FILLS[0],
              needs=(_IMG2IMG, _MASKED), words=masks.FILLS,
              help="what is under the mask at first: original (default), noise, blur or black")  # fmt: skip
    group.add("--inpaint_area", use=PICTURE, metavar="AREA", convert=values.one_of(masks.AREAS),
              default=masks.AREAS[0], needs=(_IMG2IMG, _MASKED), words=masks.AREAS,
              help="draw the whole picture (default), or mask: its box alone, at --W and --H, and put it back "
              "in its place")  # fmt: skip
    group.add("--inpaint_padding", use=PICTURE, metavar="PIXELS", convert=values.whole_number(0, values.MAX_SIZE_PX),
              default=masks.DEFAULT_PADDING_PX,
              help=f"how much around the box is drawn as well (default {masks.DEFAULT_PADDING_PX})")  # fmt: skip
    group.add("--inpaint_regions", use=PICTURE, metavar="HOW", convert=values.one_of(masks.REGIONS),
              default=masks.REGIONS[0], words=masks.REGIONS,
              help="draw what the mask marks together (default), or each separate region of it in turn")  # fmt: skip
    group.add("--extend", use=PICTURE, metavar="LEFT,TOP,RIGHT,BOTTOM", convert=masks.margins, needs=_IMG2IMG,
              help="grow the picture by so many pixels on each side, and paint them")  # fmt: skip


def _highres_options(group: OptionGroup) -> None:
    enlarging = "ways of enlarging"
    group.add("--highres_fix_scale", use=PICTURE, metavar="SCALE", convert=deep_shrink.ratio,
              help="draw a picture of SCALE times the size first, then draw over its enlargement")  # fmt: skip
    group.add("--highres_fix_steps", use=PICTURE, metavar="N", convert=values.steps, needs=_HIGHRES,
              help="steps of the first stage (default 28)")  # fmt: skip
    group.switch("--highres_fix_save_1st", use=PICTURE, needs=_HIGHRES, help="save the first stage's pictures too")
    group.switch("--highres_fix_latents_upscaling", use=PICTURE, needs=_HIGHRES, alternative=enlarging,
                 help="enlarge the latents (bilinear) instead of the picture (LANCZOS)")  # fmt: skip
    group.add("--highres_fix_upscaler", use=PICTURE, metavar="MODULE", convert=values.not_empty, needs=_ENLARGING,
              alternative=enlarging,
              help="enlarge with this Python module, here and by --upscale: tools.esrgan for models of pictures, "
              "tools.latent_upscaler for one of latents")  # fmt: skip
    group.add("--highres_fix_upscaler_args", use=PICTURE, metavar="KEY=VALUE;...", convert=upscaler_arguments,
              needs=(_ENLARGING, _UPSCALER),
              help="arguments of the upscaler, for instance weights=upscaler.safetensors")  # fmt: skip
    group.add("--upscale", use=PICTURE, metavar="FACTOR", convert=factor,
              help="enlarge the finished pictures, without diffusion: by LANCZOS, or by a --highres_fix_upscaler "
              "that gives pictures")  # fmt: skip


def _tile_options(group: OptionGroup) -> None:
    group.add("--tile", use=PICTURE, metavar="PIXELS", convert=tiling.size_px, not_with=_NOT_WITH_TILES,
              help="draw what is larger in overlapping tiles of this side: 512, XL: 1024")  # fmt: skip
    group.add("--tile_overlap", use=PICTURE, metavar="PIXELS", convert=tiling.overlap_px, needs=_TILES,
              help="how far tiles overlap at least (default: a quarter of a tile)")  # fmt: skip


def _gradual_latent_options(group: OptionGroup) -> None:
    group.add("--gradual_latent_timesteps", use=PICTURE, metavar="TIMESTEP", convert=values.whole_number(1, 1000),
              help="draw with euler_a on small latents that grow from this timestep on; 750 is a good "
              "start")  # fmt: skip
    group.add("--gradual_latent_ratio", use=PICTURE, metavar="RATIO", convert=gradual_latent.ratio,
              help="size the latents begin with (default 0.5)")  # fmt: skip
    group.add("--gradual_latent_ratio_step", use=PICTURE, metavar="STEP", convert=gradual_latent.ratio,
              help="what each growth adds (default 0.125)")  # fmt: skip
    group.add("--gradual_latent_every_n_steps", "--gradual_latent_ratio_every_n_steps", use=PICTURE, metavar="N",
              convert=gradual_latent.every_n_steps, help="steps from one growth to the next (default 3)")  # fmt: skip
    group.add("--gradual_latent_s_noise", use=PICTURE, metavar="FACTOR", convert=gradual_latent.s_noise,
              help="factor of the noise that growing steps add (default 1)")  # fmt: skip
    group.add("--gradual_latent_unsharp_params", use=PICTURE, metavar="K,SIGMA,STRENGTH[,TARGET]",
              convert=gradual_latent.unsharp,
              help="sharpen what was resized, e.g. 3,0.5,0.5; with target 0, the step's input")  # fmt: skip


def _deep_shrink_options(group: OptionGroup) -> None:
    group.add("--ds_depth_1", use=PICTURE, metavar="DEPTH", convert=deep_shrink.depth_or_none,
              help="shrink what enters this down block of the U-Net, 0 to 3, in early steps; XL: this input block, "
              "0 to 8")  # fmt: skip
    group.add("--ds_timesteps_1", use=PICTURE, metavar="TIMESTEP", convert=deep_shrink.timesteps,
              help="down to this timestep (default 650)")  # fmt: skip
    group.add("--ds_depth_2", use=PICTURE, metavar="DEPTH", convert=deep_shrink.depth_or_none,
              help="after that, shrink what enters this one")  # fmt: skip
    group.add("--ds_timesteps_2", use=PICTURE, metavar="TIMESTEP", convert=deep_shrink.timesteps,
              help="down to this timestep (default 650)")  # fmt: skip
    group.add("--ds_ratio", use=PICTURE, metavar="RATIO", convert=deep_shrink.ratio,
              help="size they are shrunk to (default 0.5)")  # fmt: skip


def _control_net_options(group: OptionGroup) -> None:
    kinds = "kinds of ControlNets"
    group.add("--control_net_models", use=PICTURE, many=True, metavar="MODEL", convert=values.not_empty,
              names_files=True, alternative=kinds,
              help="ControlNets (file, Diffusers folder or id); several take turns, one at each step")  # fmt: skip
    group.add("--control_net_lllite_models", use=PICTURE, many=True, metavar="FILE", convert=values.not_empty,
              names_files=True, alternative=kinds, not_with=_NOT_WITH_LLLITE,
              help="XL: ControlNet-LLLites; several work together, each with a guide of its own")  # fmt: skip
    group.add("--control_net_types", use=PICTURE, many=True, metavar="KIND", convert=control_type, needs=_CONTROL_NET,
              words=CONTROL_TYPES,
              help=f"kind of each guide for a ControlNet Union: {', '.join(CONTROL_TYPES)}")  # fmt: skip
    group.add("--control_net_preps", use=PICTURE, many=True, metavar="PREP", convert=preprocessing, needs=_CONTROL,
              words=PREPROCESSORS,
              help=f"for each none (default), {', '.join(map(written, PREPROCESSORS))}")  # fmt: skip
    group.add("--control_net_weights", use=PICTURE, many=True, metavar="WEIGHT", needs=_CONTROL,
              convert=values.number(-values.MAX_SCALE, values.MAX_SCALE),
              help="strength of each (default 1)")  # fmt: skip
    group.add("--control_net_starts", use=PICTURE, many=True, metavar="SHARE", convert=values.share,
              needs=_CONTROL, help="share of the steps after which each begins (default 0)")  # fmt: skip
    group.add("--control_net_ratios", use=PICTURE, many=True, metavar="SHARE", convert=values.share,
              needs=_CONTROL, help="share of the steps after which each ends (default 1)")  # fmt: skip
    group.switch("--control_net_together", use=PICTURE, needs=_CONTROL_NET,
                 help="use all ControlNets at every step and add them up")  # fmt: skip
    group.switch("--highres_fix_disable_control_net", use=PICTURE, needs=(_HIGHRES, _CONTROL),
                 help="no ControlNet in Highres. fix's second stage")  # fmt: skip
    group.switch("--control_net_save_guides", use=COMPUTING, needs=_CONTROL,
                 help="save the preprocessed guide beside each picture")  # fmt: skip


def _guidance_options(group: OptionGroup) -> None:
    group.add("--guide_image_path", use=PICTURE, many=True, metavar="PATH", needs=_GUIDED, names_files=True,
              help="picture that guides, or pictures, folders, globs and lists of them, taken in turn")  # fmt: skip
    group.add("--clip_guidance_scale", use=PICTURE, metavar="SCALE", convert=values.loss_scale, default=0,
              help="draw towards what CLIP reads in the prompt, or in a prompt line's --c; 100 is a start")  # fmt: skip
    group.add("--clip_image_guidance_scale", use=PICTURE, metavar="SCALE", convert=values.loss_scale, default=0,
              help="draw towards what CLIP sees in the guide picture; 100 is a start")  # fmt: skip
    group.add("--vgg16_guidance_scale", use=PICTURE, metavar="SCALE", convert=values.loss_scale, default=0,
              help="draw towards VGG16's features of the guide picture; 100 is a start")  # fmt: skip
    group.add("--vgg16_guidance_layer", use=PICTURE, metavar="N", convert=values.whole_number(1, 30),
              help="layer of VGG16 whose features are compared, 1 to 30 (default 20)")  # fmt: skip
    group.add("--clip_model", use=PICTURE, metavar="MODEL", convert=values.not_empty, names_files=True,
              help="CLIP model: folder or Hugging Face id (default laion/CLIP-ViT-B-32-laion2B-s34B-b79K)")  # fmt: skip
    group.add("--vgg16_model", use=PICTURE, metavar="FILE", convert=values.not_empty, names_files=True,
              help="VGG16's weights in torchvision's layout (default: torchvision's for ImageNet)")  # fmt: skip


def _speed_options(group: OptionGroup) -> None:
    precisions = "precisions"
    group.add("--batch_size", use=RUN, metavar="N", convert=values.whole_number(1), default=1,
              help="pictures drawn at a time (default 1)")  # fmt: skip
    group.add("--vae_batch_size", use=RUN, metavar="N", convert=vae_batch_size,
              help="pictures decoded at a time; below 1, a share of the batch (default: the batch)")  # fmt: skip
    group.add("--vae_slices", use=COMPUTING, metavar="N", convert=values.whole_number(1),
              help="run the VAE in N slices: the same picture with less memory")  # fmt: skip
    group.switch("--fp16", use=PICTURE, alternative=precisions, help="compute in float16")
    group.switch("--bf16", use=PICTURE, alternative=precisions, help="compute in bfloat16")
    group.switch("--no_half_vae", use=PICTURE, help="run the VAE in float32")
    group.switch("--xformers", use=COMPUTING, help="use xFormers' attention where it runs")
    group.switch("--diffusers_xformers", use=COMPUTING, help="the same as --xformers")
    group.switch("--sdpa", use=COMPUTING, help="use PyTorch's attention (the default)")
    group.switch("--lowvram", use=COMPUTING, help="keep text encoder and VAE off the GPU while they are not used")
    group.add("--engine", use=COMPUTING, metavar="NAME", convert=values.one_of(ENGINES), default=TORCH, words=ENGINES,
              help="what computes on a CPU: torch (default), or openvino, which is faster "
              "(requirements-openvino.txt)")  # fmt: skip
    group.switch("--compile", use=COMPUTING,
                 help="compile the U-Net: minutes at the start, faster steps after; for long runs")  # fmt: skip
    group.add("--cuda_graphs", use=COMPUTING, metavar="WHEN", convert=values.one_of(CUDA_GRAPHS), default="auto",
              not_with=("compile",),
              help="on GPUs of NVIDIA, record a step once and start it as a whole: auto (default), after some pictures "
              "of one size where memory is left; on, at once; off")  # fmt: skip
    group.switch("--opt_channels_last", use=COMPUTING,
                 help="put the channels last in memory (done on CPUs anyway)")  # fmt: skip


def _fleet_options(group: OptionGroup) -> None:
    needs = Needs(("ray",), "is for Ray's workers; give --ray, too")
    group.add("--ray", use=RUN, metavar="ADDRESS", convert=fleet.address, alone=fleet.HERE, not_with=_LOOP,
              help="have workers of Ray draw (requirements-ray.txt): of this machine (local, the default), of the "
              "cluster that it belongs to (auto), HOST:PORT or ray://HOST:PORT")  # fmt: skip
    group.add("--ray_workers", use=RUN, metavar="N", convert=fleet.worker_count, needs=needs,
              help="how many workers, or MIN,MAX; default: one for each GPU of the cluster, without GPUs one for each "
              "--ray_cpus cores")  # fmt: skip
    group.add("--ray_cpus", use=RUN, metavar="N", convert=values.whole_number(1), needs=needs,
              help="processor cores of a worker without a GPU (default 2; --ray_workers N shares all out)")  # fmt: skip
    group.switch("--ray_ship", use=RUN, needs=needs,
                 help="send a node the input files that it lacks: models, networks, pictures")  # fmt: skip


_OPTION_GROUPS = {  # what people use first comes first
    "model": _model_options,
    "prompts": _source_options,
    "picture": _picture_options,
    "output": _output_options,
    "the run": _run_options,
    "memory and speed": _speed_options,
    "img2img, inpainting and regions": _img2img_options,
    "networks and embeddings": _network_options,
    "ControlNet": _control_net_options,
    "Highres. fix and enlarging": _highres_options,
    "several machines": _fleet_options,
    "tiles": _tile_options,
    "guidance by CLIP and VGG16": _guidance_options,
    sizes.GROUP: _size_options,
    "Gradual Latent": _gradual_latent_options,
    "Deep Shrink": _deep_shrink_options,
}

# ---------------------------------------------------------------------------------------------------------------------
# Pipeline


class Pipeline:
    """Draws batches of jobs: prompts to embeddings, noise to latents, latents to pixels."""

    def __init__(
        self,
        models: Models,
        networks: Networks,
        control_nets: ControlNets,
        lllites: LLLites,
        plan: RunPlan,
        upscaler: Upscaler | None = None,
        judges: Judges | None = None,
        by_openvino: OpenVinoUnet | None = None,
        encoder: PromptEncoder | None = None,
    ) -> None:
        from library.draw.sources import SourceLatents
        from library.draw.text_encoding import KEPT_CHUNKS, make_encoder
        from library.draw.unet_call import direct, steady_call
        from library.models.upscaler import Lanczos

        self.unet, self.vae, self.texts = models.unet, models.vae, models.texts
        self.networks, self.control_nets, self.lllites = networks, control_nets, lllites
        # one that has been asked for all already needs no networks
        self.encoder = encoder or make_encoder(plan.text, models.texts, networks.use)
        # networks folded into weights go on changing the text encoders'; texts of a loop or a fleet are to come
        lasting = plan.networks.pre_calculated or not plan.jobs
        # those that text encoders are kept for; None for any
        self.wordings = None if lasting else plan.wordings(KEPT_CHUNKS)
        self.zero_empty_negative = plan.text.zero_empty_negative
        self.family, self.inputs = plan.model.family, plan.model.inputs
        self.noise = plan.noise
        self.cfg_interval, self.guidance_rescale = plan.cfg_interval, plan.guidance_rescale
        self.vae_batch_size = plan.computing.vae_batch_size
        self.low_vram = plan.computing.low_vram
        self.masks = plan.masks
        self.highres, self.upscaler = plan.highres, upscaler or Lanczos()
        self.judges = judges
        self.preview: LatentPreview | None = None
        self.tiling = plan.tiling
        self.sources = SourceLatents(models.vae, plan.tiling)
        # where the U-Net stays, and its type; to ask it goes through all of its modules each time
        self.device, self.dtype = self.unet.device, self.unet.dtype
        self.direct_call = direct(self.unet)
        # where nothing hangs on it that does otherwise from step to step
        self.steady_call = self.direct_call
        if not (judges or lllites):
            told = self.unet, plan.computing, lambda: networks.version
            self.steady_call = steady_call(*told, in_threads=networks.are_own)
        self.engine, self.by_openvino = plan.engine, by_openvino
        self.in_loop, self.told = plan.keyboard is not None, set[str]()  # why pictures were left to PyTorch
        self.last: Job | None = None  # the picture that is denoised last of all, where that is known
        self.cell_px = 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels a latent cell stands for, each way

    def watch(self, every: int, show: Callable[[np.ndarray], None]) -> None:
        """From now on show what a batch's pictures look like by then, at every so many steps; see `LatentPreview`."""
        from library.draw.latent_preview import LatentPreview

        with self._on_device(self.vae):
            self.preview = LatentPreview(self.vae, every, show)

    @property
    def works_ahead(self) -> bool:
        """Whether the next batch may be begun before this one's pictures are there, and the device gains by it."""
        return self.device.type == "cuda" and self.judges is None

    def draw(self, jobs: Sequence[Job], make_bar: MakeBar) -> list[tuple[Job, np.ndarray | None]]:
        """Draw a batch of jobs; as `begin`, and waits for the pictures."""
        return self.begin(jobs, make_bar)()

    def begin(self, jobs: Sequence[Job], make_bar: MakeBar) -> Callable[[], list[tuple[Job, np.ndarray | None]]]:
        """Draw a batch of jobs with equal `RunPlan.batch_key`, showing a bar of so many evaluations.

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
                needs_pictures = self.highres is not None and self.highres.needs_pictures
                pictures = _pictures(self._decode(latents)) if needs_pictures else []
                originals = self._enlarge(latents, pictures, following)
                first_stage += zip(stage, pictures)
            if jobs[0].source is not None:
                finish = self._redraw(jobs, make_bar)
            else:
                latents = self._denoise(last, originals, make_bar)
                finish = partial(_pictures, self._decode(latents, ends=self._ends_with(jobs)))
        return lambda: [
            *(first_stage if self.highres and self.highres.save_first else ()),
            *zip(jobs, self._finished(jobs, finish())),
        ]

    def _redraw(self, jobs: Sequence[Job], make_bar: MakeBar) -> Callable[[], list[np.ndarray | None]]:
        """Draw over source pictures, box after box where there are some; returns what waits for the pictures."""
        from PIL import Image

        from library.draw.sources import Start

        before: list[np.ndarray | None] = [None] * len(jobs)
        lost = [False] * len(jobs)  # a picture that failed stays failed
        for turn in range(turns := max(1, len(jobs[0].boxes))):
            at_turn = [replace(job, turn=turn) for job in jobs]
            views = [view for job in at_turn if (view := job.view(self.masks))]
            starts = [
                Start(view, None if picture is None else Image.fromarray(picture))
                for view, picture in zip(views, before)
            ]
            latents = self._denoise(at_turn, None, make_bar, starts)
            decoded = self._decode(latents, ends=turn + 1 == turns and self._ends_with(jobs))
            finish = partial(_put_back, starts, decoded, lost)
            if turn + 1 < turns:
                before = finish()
                lost = [picture is None for picture in before]
        return finish

    def _finished(self, jobs: Sequence[Job], pictures: list[np.ndarray | None]) -> list[np.ndarray | None]:
        """The batch's pictures as they are saved, which guidance may lead the next ones to."""
        if jobs[0].upscale != 1:
            of_jobs = zip(pictures, jobs)
            pictures = [picture if picture is None else self._upscale(picture, job) for picture, job in of_jobs]
        if self.judges:
            self.judges.remember(jobs, pictures)
        return pictures

    def _upscale(self, picture: np.ndarray, job: Job) -> np.ndarray:
        """A finished picture, enlarged without diffusion."""
        import numpy as np
        from PIL import Image

        from library.models.upscaler import PictureUpscaler

        assert isinstance(self.upscaler, PictureUpscaler)  # others are refused before
        (large,) = self.upscaler.enlarge([Image.fromarray(picture)], *job.file_size)
        return np.asarray(large)

    def _denoise(
        self,
        jobs: Sequence[Job],
        originals: torch.Tensor | None,
        make_bar: MakeBar,
        starts: Sequence[Start] | None = None,
    ) -> torch.Tensor:
        """Latents (B, C, height / 8, width / 8), float32, denoised from noise alone or from noisy pictures.

        Args:
            jobs: to draw.
            originals: latents, likewise, of Highres. fix's first stage, enlarged, that are drawn over.
            make_bar: shows a bar.
            starts: the source pictures that are drawn over.
        """
        from library.draw.deep_shrink import Shrinker
        from library.draw.denoiser import Cfg, Denoiser
        from library.draw.guides import save_guides
        from library.draw.regions import make_regions
        from library.draw.samplers import draw_noise, steps_of

        device = self.device
        cfg = Cfg(jobs, device, self.guidance_rescale)
        regions = make_regions(jobs, self.masks.color_codes, device)
        text_of_step = self._texts(jobs, cfg, regions)
        self.networks.use(jobs[0].strengths_at(0))
        scheduler, timesteps = self._schedule(jobs[0])
        steps = steps_of(scheduler, timesteps)
        noise = draw_noise([job.seed for job in jobs], self._latent_shape(jobs[0]), jobs[0])
        step_arguments = noise.step_arguments
        texts = [text_of_step[step] for step in steps]
        latents, before_step, after_step = self._start(jobs, originals, starts, scheduler, timesteps, noise)
        if self.judges:
            prompts = [[text.rows(*cfg.prompt_of(place)) for place in range(len(jobs))] for text in texts]
            before_step.append(self.judges.guide(jobs, prompts, scheduler, timesteps))
        if self.preview:
            before_step.append(self.preview.follow(scheduler, timesteps))
        shrinker = Shrinker(jobs[0].deep_shrink, self.family.shrink_points(self.unet.config), timesteps.tolist())
        guided = self.cfg_interval.guided(len(timesteps), scheduler.order)
        if self.control_nets.settings.save_guides:
            save_guides(jobs, self.control_nets.settings.specs, self.masks)
        steering = self.control_nets.steer(jobs, len(timesteps), self.tiling)
        strengths = [jobs[0].strengths_at(step) for step in steps]
        followers = (shrinker.begin_step, self.lllites.begin_step, lambda index: self.networks.use(strengths[index]))
        placed = (self.lllites.begin_tile, *([regions.begin_tile] if regions is not None else []))
        with (
            shrinker.attached(self.unet, *self.control_nets.models),
            self.lllites.attached(self.unet, jobs, len(timesteps), self.tiling),
            self._in_regions(regions),
        ):
            beside = self._beside(jobs, starts)
            call_unet = self._call_unet(jobs[0], regions)
            denoiser = Denoiser(
                *(self.unet, texts, cfg, guided, followers, steering, beside, self.tiling, placed, call_unet)
            )
            for index, timestep in enumerate(make_bar(timesteps)):
                sample = scheduler.scale_model_input(latents, timestep).to(self.dtype)
                prediction = denoiser(sample, timestep, index)
                for hook in before_step:
                    prediction, latents = hook(prediction, latents, index)
                latents = scheduler.step(prediction, timestep, latents, **step_arguments).prev_sample
                for hook in after_step:
                    latents = hook(latents, index)
        return latents

    def _call_unet(self, job: Job, regions: Regions | None) -> UnetCall:
        """How the U-Net is called: by another engine, or as is fast where nothing on it changes from step to step."""
        from library.draw.unet_call import by_openvino

        if self.in_loop:
            self.engine.warn_of(job, self.told)
        if self.by_openvino is not None and not self.engine.by_torch(job):
            return by_openvino(self.by_openvino, lambda: self.networks.version)
        steady = regions is None and job.deep_shrink.depth_1 is None
        return self.steady_call if steady else self.direct_call

    def _beside(self, jobs: Sequence[Job], starts: Sequence[Start] | None) -> Beside | None:
        """What the U-Net reads beside the latents, if anything."""
        from library.draw.model_inputs import read_beside

        if self.inputs is PLAIN:
            return None
        with self._on_device(self.vae):
            return read_beside(self.inputs, self.sources, starts, jobs, self._latent_shape(jobs[0])[1:])

    def _texts(self, jobs: Sequence[Job], cfg: Cfg, regions: Regions | None) -> list[TextConditions]:
        """What the U-Net is told at each step: the same object from step to step while nothing changes."""
        # networks that act in some steps alone change what cross-attention makes of a text
        said_at = cfg.said_in(jobs[0].steps_run)
        steps = [(said, jobs[0].strengths_at(step)) for step, said in enumerate(said_at)]
        chunks = self.encoder.tokens.chunks(*dict.fromkeys(text for said, _ in steps for text in said.texts))
        told_sizes = cfg.sizes if self.family.told_sizes else None
        texts: dict[tuple[Said, tuple[Strength, ...]], TextConditions] = {}
        with ExitStack() as stack:
            for encoder in self.texts:
                stack.enter_context(self._on_device(encoder.model))
            for said, strengths in dict.fromkeys(steps):
                text = self.encoder.encode(said.texts, chunks, said.multipliers).to(self.dtype)
                if self.zero_empty_negative:
                    text = text.without(cfg.empty_texts(said))
                texts[said, strengths] = replace(text.for_unet(cfg.text_of_row, told_sizes), regions=regions)
        self._let_text_encoders_go()
        return [texts[step] for step in steps]

    def _let_text_encoders_go(self) -> None:
        """Free the text encoders' memory once the run's pictures ask for nothing that is not encoded already."""
        if self.texts and self.encoder.keeps_all(self.wordings):
            self.networks.leave_text_encoders()  # which would fold changed multipliers into weights that are gone
            self.encoder.let_go()
            self.texts = ()

    def _on_device(self, model: nn.Module) -> AbstractContextManager:
        """A block in which a model is on the U-Net's device; with --lowvram only then."""
        return devices.on_device(model, self.device) if self.low_vram else nullcontext()

    @contextmanager
    def _in_regions(self, regions: Regions | None) -> Iterator[None]:
        """A block in which the parts of prompts, and the networks that are for them, keep to their regions."""
        with ExitStack() as stack:
            if regions is not None:
                stack.enter_context(regions.attached(self.unet, *self.control_nets.models))
                stack.enter_context(self.networks.acting_in(regions))
            yield

    def _latent_shape(self, job: Job) -> tuple[int, int, int]:
        return self.vae.config.latent_channels, job.height // self.cell_px, job.width // self.cell_px

    def _schedule(self, job: Job) -> tuple[SchedulerMixin, torch.Tensor]:
        """A scheduler, and the timesteps it is run for: with a picture to start from the last `steps_run` steps.

        They stay on the CPU, where schedulers look numbers up by them: a step then waits for no other device.
        """
        from library.draw.gradual_latent import GrowingEulerAncestral
        from library.draw.samplers import begin_schedule, run_from

        scheduler = begin_schedule(job, self.noise)
        left_out = job.steps - job.steps_run
        timesteps = run_from(scheduler, left_out)
        if isinstance(scheduler, GrowingEulerAncestral):
            sizes = job.gradual_latent.growth(timesteps.tolist(), *self._latent_shape(job)[1:])
            scheduler.plan(job.gradual_latent, {left_out + place: size for place, size in sizes.items()})
        return scheduler, timesteps

    def _start(
        self,
        jobs: Sequence[Job],
        originals: torch.Tensor | None,
        starts: Sequence[Start] | None,
        scheduler: SchedulerMixin,
        timesteps: torch.Tensor,
        noise: Noise,
    ) -> tuple[torch.Tensor, list[BeforeStep], list[AfterStep]]:
        """The latents that denoising starts from, and what is done before and after each step."""
        from library.draw.gradual_latent import shrink_start
        from library.draw.inpainting import Inpainting
        from library.draw.samplers import add_noise
        from library.draw.sources import latent_masks

        source_noise = devices.sent(noise.source, self.device)
        beneath = originals  # what noise is added to; None to begin at noise alone
        after_step: list[AfterStep] = []
        if starts is not None:
            masks = latent_masks(starts, self._latent_shape(jobs[0])[1:], self.device)
            with self._on_device(self.vae):
                # a model that reads the picture keeps to it from noise alone, too
                if self.inputs is PLAIN or jobs[0].steps_run < jobs[0].steps:
                    beneath = self.sources.beneath(starts, masks, [job.seed for job in jobs])
                if masks is not None and self.inputs is not INPAINTING:  # which sees what is to stay
                    kept = self.sources.of(starts)
                    after_step.append(Inpainting(scheduler, timesteps, kept, source_noise, masks))
        if beneath is None:
            latents = devices.sent(noise.start, self.device) * scheduler.init_noise_sigma
        else:
            latents = add_noise(scheduler, beneath, source_noise, timesteps[:1])
        if jobs[0].gradual_latent.timesteps is not None:
            latents = shrink_start(latents, jobs[0].gradual_latent)
        return latents, [], after_step

    def _enlarge(
        self, latents: torch.Tensor, pictures: Sequence[np.ndarray | None], stage: Sequence[Job]
    ) -> torch.Tensor:
        """What Highres. fix's next stage draws over: latents (B, C, h, w) float32 of that stage's size."""
        import torch
        import torch.nn.functional as F
        from PIL import Image

        from library.draw.sources import encode
        from library.models.upscaler import PictureUpscaler

        size = (stage[0].width, stage[0].height)
        if self.highres is not None and self.highres.enlarge_latents:
            return F.interpolate(latents, size=self._latent_shape(stage[0])[1:], mode="bilinear", align_corners=False)
        small = [  # a picture that failed stays failed; black takes its place among its neighbours
            Image.new("RGB", size) if picture is None else Image.fromarray(picture) for picture in pictures
        ]
        if isinstance(self.upscaler, PictureUpscaler):
            large = self.upscaler.enlarge(small, *size)
            with self._on_device(self.vae):
                return torch.stack([encode(self.vae, picture, self.tiling) for picture in large])
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

    def _ends_with(self, jobs: Sequence[Job]) -> bool:
        """Whether nothing is denoised after these jobs: not what comes, and not they again, for lack of memory."""
        return len(jobs) == 1 and jobs[0] is self.last and not self.works_ahead

    def _let_unet_go(self) -> None:
        """Free the memory of the U-Net, and of what works with it, for good."""
        from library.machine.packed_layers import let_go

        for model in (self.unet, *self.control_nets.models):
            let_go(model)
        if self.by_openvino is not None:
            self.by_openvino.forget()

    def _decode(self, latents: torch.Tensor, *, ends: bool = False) -> list[Decoding]:
        """Begin to decode latents (B, C, h, w), `vae_batch_size` at a time; `ends`: after all that is denoised."""
        from library.draw.decoding import Decoding

        if ends:
            self._let_unet_go()
        if self.by_openvino is not None:
            self.by_openvino.rest()
        malloc.give_back()  # the U-Net's memory is in pieces of other sizes
        with self._on_device(self.vae):
            return [Decoding(self.vae, part, self.tiling) for part in latents.split(self.vae_batch_size)]


def _put_back(starts: Sequence[Start], decoded: Sequence[Decoding], lost: Sequence[bool]) -> list[np.ndarray | None]:
    """What was drawn, in its place in the source pictures; None where this failed, or what was drawn before it."""
    return [
        None if drawn is None or failed else start.put_back(drawn)
        for start, drawn, failed in zip(starts, _pictures(decoded), lost)
    ]


def _pictures(decoded: Sequence[Decoding]) -> list[np.ndarray | None]:
    return [picture for part in decoded for picture in part.pictures()]


@devices.no_collection()
@malloc.blocks_from_system()
def load_pipeline(plan: RunPlan, process: int = 0) -> Pipeline:
    """Choose the device, load the models and set them up as planned."""
    computing = plan.computing
    if computing.compile:
        keep_compiled()
    machine = devices.choose_machine(computing, process)
    if plan.engine.openvino:
        devices.check_openvino(machine)
    devices.check_torchvision()
    from library.models.kept_weights import ModelKeeper
    from library.models.upscaler import make_upscaler

    upscaler = None
    if plan.upscaler:  # before the model, which may take minutes
        pictures = plan.defaults.upscale != 1
        upscaler = make_upscaler(plan.upscaler, machine.device, machine.dtype, pictures=pictures)

    vae_dtype = devices.choose_vae_dtype(machine, plan.model, no_half=computing.no_half_vae)
    # OpenVINO has weights of its own; what it made them of should not stay in memory
    keeps = plan.engine.draws and not plan.networks.merged
    keeper = ModelKeeper(plan.model, machine.dtype, vae_dtype) if keeps else None
    models, encoder = read_models(plan, machine, vae_dtype, keeper)
    from library.draw.attention import use_kernel
    from library.draw.control_net import load_control_nets
    from library.draw.lllite import load_lllites
    from library.machine.prepare import make_fast, set_layout
    from networks.attach import Networks, merge_networks
    from networks.states import read_state

    gradients = plan.loss_guidance.uses_anything
    network_weights = [read_state(spec.weights) for spec in plan.networks.specs]
    merge_networks(plan.networks, network_weights, models)
    # differences are to the U-Net that networks were merged into, and to nothing that only hangs on it
    control_nets = load_control_nets(plan.control_nets, models.unet, plan.masks)
    kernel = devices.choose_attention(machine, xformers=computing.xformers, gradients=gradients)
    for model in (models.unet, *control_nets.models):
        use_kernel(model, kernel)
    set_layout(models.vae, control_nets.models, machine, computing)
    networks = Networks(plan.networks, network_weights, models)
    if computing.compile:
        networks.keep_shapes()
    rewritten, written_into = networks.rewritten_layers(), networks.write_into_weights
    make_fast(
        *(models.unet, control_nets.models, models.vae, machine, computing),
        rewritten=set(models.unet.modules()) if plan.engine.draws else rewritten,  # OpenVINO reads the weights as well
        may_pack=not (gradients or written_into),
        constant=not (rewritten or written_into),
    )
    judges = None
    if gradients:
        from library.draw.loss_guidance import load_judges

        judges = load_judges(plan.loss_guidance, plan.loss_guidance_files, models)
    lllites = load_lllites(plan.control_nets, models.unet, plan.masks)
    by_openvino = engage_openvino(plan, models, keeper, steered=bool(control_nets.models))
    return Pipeline(models, networks, control_nets, lllites, plan, upscaler, judges, by_openvino, encoder)


def read_models(
    plan: RunPlan, machine: devices.Machine, vae_dtype: torch.dtype, keeper: ModelKeeper | None
) -> tuple[Models, PromptEncoder | None]:
    """Read the model; where its texts come first, with what has encoded them, and without text encoders.

    Args:
        plan: of the run.
        machine: that it is for.
        vae_dtype: the VAE's type.
        keeper: keeps the weights, if they are to be kept.
    """
    from library.models.light_imports import import_light
    from library.models.weight_reading import read_ahead

    texts_first = plan.texts_first
    with devices.single_threaded():
        weights = read_ahead(
            *(plan.model, machine.device, machine.dtype),
            **{"vae_dtype": vae_dtype, "channels_last": machine.channels_last, "kept": keeper.find() if keeper else {}},
            texts_go=texts_first,
        )
        # takes longer than the weights take to be read meanwhile
        import_light(compiles=plan.computing.compile)
        from library.draw.first_texts import encode_first
        from library.models.models import load_models, load_texts

        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load_texts, plan.model, weights)
            _ = plan.text.tokens  # the tokenizer is loaded meanwhile
            texts = loading.result()
    encoder = None
    if texts_first:
        if keeper:
            keeper.keep({text.kind.part: text.model for text in texts})
        encoder = encode_first(plan, texts, machine.device)
        texts = encoder.texts
        if keeper:
            keeper.leave_memory()
    with devices.single_threaded():
        models = load_models(plan.model, weights, texts)
        if keeper:
            keeper.keep(models.parts)
    return models, encoder


def engage_openvino(plan: RunPlan, models: Models, keeper: ModelKeeper | None, *, steered: bool) -> OpenVinoUnet | None:
    """Let OpenVINO compute what it is asked to; gives the U-Net that it computes, if it does.

    Args:
        plan: of the run.
        models: as they are loaded, with what networks do to them.
        keeper: of the weights that lie in files, which need not stay in memory.
        steered: whether there are ControlNets.
    """
    if not plan.engine.openvino:
        return None
    from library.machine.openvino_engine import OpenVinoUnet, decode_by_openvino
    from networks.layers import values_of

    let_go = keeper.leave_memory if keeper else None
    if plan.engine.decodes:
        decode_by_openvino(models.vae, let_go)
    return OpenVinoUnet(models.unet, values_of, let_go, steered=steered) if plan.engine.draws else None


# ---------------------------------------------------------------------------------------------------------------------
# Runs

EXIT_SOME_FAILED = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    console.make_streams_safe()
    options = parse_options(sys.argv[1:] if argv is None else argv)
    team = Team.from_environment()
    with console.messages(message_level(options, team)):
        try:
            devices.check_versions()
            return run(options, team)
        except ProgramError as problem:
            if options.debug:
                console.trace()
            for each in getattr(problem, "problems", [problem]):
                console.error(each)
            return problem.exit_status
        except KeyboardInterrupt as interruption:
            console.error("interrupted; the pictures named above are complete")
            return getattr(interruption, "exit_status", Interrupted(signal.SIGINT).exit_status)
        except Exception as problem:
            if options.debug:
                console.trace()
            if fault := compile_fault(problem):
                console.error(fault)
                return fault.exit_status
            reason = f"{type(problem).__name__}: {problem}".replace("\n", " ")
            console.error(f"a fault of this program, {reason}; --debug shows where")
            return ProgramError.exit_status
        finally:
            team.leave()


def parse_options(argv: Sequence[str]) -> Options:
    """The options that a command line gives; leaves with status 2 where one cannot be used."""
    parser = make_parser()
    try:
        argv = with_config(argv, parser)
    except InputError as problem:
        parser.error(str(problem))
    return parser.parse(argv)


def message_level(options: Options, team: Team) -> int:
    """From which level on this process shows its messages; the first of several speaks for all."""
    if not team.is_first:
        return logging.ERROR
    return logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO


def run(options: Options, team: Team) -> int:
    """Plan and do what the user said; returns the exit status."""
    shared = None if team.is_first else team.receive_plan()
    if shared is None and not team.is_first:
        return 0  # the first process says why
    for name in ("interactive", "ray"):
        if options.given(name) and team.size > 1:
            raise InputError(f"--{name}", "is for one process; start the program by itself")
    plan = make_plan(options, shared)
    if options.dry_run:
        return show(plan)
    make_folder(plan.output.folder, "--outdir")
    facts = run_facts(plan)
    if plan.keyboard is not None:
        announce_here = partial(announce, plan=plan)
        with PictureWriter(facts, announce_here, quality=plan.output.quality) as writer:
            run_interactive(plan, load_pipeline(plan), writer, plan.keyboard)
        return 0
    return make_pictures(plan, facts, team)


def show(plan: RunPlan) -> int:
    """Show the plan in place of carrying it out; of the model only the tokenizer is loaded."""
    batches = plan.batches(plan.to_do)
    for line in show_plan(plan, batches):
        console.result(line)
    console.say(summary(plan, batches))
    return 0


def make_pictures(plan: RunPlan, facts: RunFacts, team: Team) -> int:
    """Make the planned pictures that are not there yet, and say what came of it."""
    with Manifest(plan.output.folder, plan.record) as manifest:
        if plan.resumed and team.is_first:
            plan = replace(plan, done=recover(plan, manifest, facts))
        team.send_plan(plan)
        tally = Tally(plan)
        try:
            if plan.to_do:
                draw_and_save(plan, facts, team, tally, manifest)
            else:
                console.say(summary(plan))
            if team.is_first:
                for file in show_results(plan, facts, plan.options.for_one()):
                    console.say(f"written: {file}")
        finally:
            team.tell("made", tally.made)
            tally.made_elsewhere = sum(team.told("made"))
            if team.is_first and (tally.started or not plan.to_do):  # else the model could not be loaded
                tell(tally, plan)
    # the launcher of several processes stops them all once one says that something failed: the first one does, at last
    return EXIT_SOME_FAILED if (tally.failed or tally.left) and team.is_first else 0


def draw_and_save(plan: RunPlan, facts: RunFacts, team: Team, tally: Tally, manifest: Manifest) -> None:
    """Draw this process's share, here or on a fleet, and save the pictures as they come."""
    with ExitStack() as stack:
        node_of: dict[Path, str] = {}  # that drew a picture, where there are several
        if plan.fleet is None:
            draw = draw_here(plan, load_pipeline(plan, team.local_rank), tally)
        else:
            from library.fleet.driver import opened  # which imports Ray

            program = Path(__file__).resolve()
            driver = stack.enter_context(opened(plan, plan.fleet, program, load_pipeline.__name__, tally.fail))
            draw, node_of = driver.draw, driver.node_of
        console.say(summary(plan))
        if team.is_first:
            keep_settings(plan.output.folder, plan.options)

        def saved(job: Job, file: Path) -> None:
            tally.count_made(job)
            announce(job, file, plan, node_of.pop(job.file, None))

        with PictureWriter(facts, saved, manifest, plan.output.quality, plan.resumed) as writer:
            run_jobs(plan, draw, writer, tally, team)


def draw_here(plan: RunPlan, pipeline: Pipeline, tally: Tally) -> Draw:
    """What draws batches in this process."""

    def draw(batches: Sequence[Sequence[Job]], interruptions: Interruptions, progress: console.Progress) -> Drawn:
        drawer = BatchDrawer(pipeline, plan.batch_key, tally.fail, progress.steps)
        pipeline.last = batches[-1][-1] if batches else None
        return drawer.draw(interruptions.until_asked(batches))

    return draw


def tell(tally: Tally, plan: RunPlan) -> None:
    """Say what a run came to, and where the lines of its failed pictures are."""
    console.say(tally.summary())
    if tally.failed and (file := save_failed(plan, tally.failed)):
        console.say(f"the failed pictures' lines: {file}")


def announce(job: Job, file: Path, plan: RunPlan, node: str | None = None) -> None:
    """Say on standard output where a picture is, and with `--json` which node of a fleet drew it."""
    drawn_by = {"node": node} if node else {}
    console.result(to_json(picture_facts(plan, job, file) | drawn_by) if plan.output.as_json else str(file))


if __name__ == "__main__":
    status = main()
    gc.freeze()  # leaving would search a million objects for garbage; the system takes all memory back anyway
    sys.exit(status)
