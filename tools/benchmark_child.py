"""One process of a benchmark (see tools/benchmark.py): a program's run or its parts, measured from inside.

    python tools/benchmark_child.py MEASUREMENT CASE

MEASUREMENT is a name in `MEASUREMENTS`, CASE a `Case` as JSON; what was measured is written as JSON to standard output.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    from gen_img_diffusers import Pipeline
    from library.plan.job import Job
    from library.plan.run_plan import RunPlan

PROMPT = "a red fox in the snow, golden hour, a detailed photograph"
GUIDANCE_SCALE = 7.5
CELL_PX = 8  # pixels that a latent cell stands for, each way
TOKENS = 77
BATCHES = 5  # that a figure is the median of, or fewer where they take long

# Draws a batch in so many steps, telling a function each step's index when the step has ended
Draw = Callable[[int, Callable[[int], None]], None]


@dataclass(frozen=True)
class Case:
    """What is measured. Paths are text, so that a case can be written as JSON."""

    ckpt: str  # a Diffusers folder
    family: str  # as tools/random_model.py names it
    width: int
    height: int
    steps: int
    precision: str  # fp32, fp16 or bf16
    batch_size: int
    compile: bool
    outdir: str
    lora: str | None = None
    control_net: str | None = None  # a Diffusers folder
    guide: str | None = None  # the ControlNet's picture
    also: tuple[str, ...] = ()  # more options for this program

    def command_line(self) -> list[str]:
        """The options of gen_img_diffusers.py that draw one batch."""
        options = ["--ckpt", self.ckpt, "--outdir", self.outdir, "--prompt", PROMPT, "--scale", str(GUIDANCE_SCALE)]
        options += ["--W", str(self.width), "--H", str(self.height), "--steps", str(self.steps), "--sampler", "ddim"]
        options += ["--batch_size", str(self.batch_size), "--images_per_prompt", str(self.batch_size), "--seed", "1"]
        options += ["--v2"] if self.family == "sd2" else []
        options += [] if self.precision == "fp32" else [f"--{self.precision}"]
        options += ["--compile"] if self.compile else []
        options += ["--network_module", "networks.lora", "--network_weights", self.lora] if self.lora else []
        if self.control_net:
            assert self.guide is not None  # both are given or none
            options += ["--control_net_models", self.control_net, "--guide_image_path", self.guide]
        return [*options, *self.also]


def placement(case: Case) -> tuple[torch.device, torch.dtype]:
    """The device and the type that this program chooses, for both programs."""
    from library.machine.devices import choose_machine
    from library.settings.computing import Computing

    machine = choose_machine(Computing(fp16=case.precision == "fp16", bf16=case.precision == "bf16"))
    return machine.device, machine.dtype


def now() -> float:
    """The time in seconds at which the device has done all it was given."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------------------------------------------------------------
# With the model loaded


def steady(draw: Draw, case: Case) -> dict[str, float]:
    """Medians over several batches of what `timed_batch` measures, and the GPU memory they took at most."""
    import torch

    draw(2, lambda index: None)  # what happens once: compiling, packing weights, filling caches
    batches: list[dict[str, float]] = []
    begun = time.perf_counter()
    while not batches or (len(batches) < BATCHES and time.perf_counter() - begun < 20):
        batches.append(timed_batch(draw, case))
    figures = {name: statistics.median(batch[name] for batch in batches) for name in batches[0]}
    if torch.cuda.is_available():
        figures["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def timed_batch(draw: Draw, case: Case) -> dict[str, float]:
    """Seconds for a step of the batch, from the first one's end to the last one's; for a picture, whole and decoded."""
    ends: dict[int, float] = {}

    def step_ended(index: int) -> None:
        if index in (0, case.steps - 1):  # in between nothing waits for the device
            ends[index] = now()

    start = now()
    draw(case.steps, step_ended)
    end = now()
    first, last = ends[0], ends[case.steps - 1]
    return {
        "step_s": (last - first) / (case.steps - 1),
        "vae_s": (end - last) / case.batch_size,
        "image_s": (end - start) / case.batch_size,
    }


def program_steady(case: Case) -> dict[str, float]:
    """This program's figures with the model loaded."""
    pipeline, plan = load_program(case)
    return steady(program_draw(pipeline, plan.to_do), case)


def load_program(case: Case) -> tuple[Pipeline, RunPlan]:
    """This program's pipeline, loaded, and the plan whose pictures are one batch."""
    import gen_img_diffusers as program

    plan = program.make_plan(program.parse_options(case.command_line()))
    return program.load_pipeline(plan), plan


def program_draw(pipeline: Pipeline, jobs: Sequence[Job]) -> Draw:
    """Draws these jobs as one batch with this program."""

    def draw(steps: int, step_ended: Callable[[int], None]) -> None:
        def clocked(timesteps: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
            for index, timestep in enumerate(timesteps):
                yield timestep
                step_ended(index)

        pictures = pipeline.draw([replace(job, steps=steps) for job in jobs], clocked)
        if any(picture is None for _, picture in pictures):
            raise ArithmeticError("the model gave NaN; use another precision")

    return draw


def load_diffusers(case: Case) -> tuple[DiffusionPipeline, dict[str, object]]:
    """Diffusers' own pipeline as its documentation sets it up, and the arguments that it is called with."""
    import diffusers
    import torch
    from diffusers import ControlNetModel, DDIMScheduler
    from PIL import Image

    diffusers.utils.logging.disable_progress_bar()
    device, dtype = placement(case)
    xl = "XL" if case.family == "sdxl" else ""
    cls, parts = getattr(diffusers, f"StableDiffusion{xl}Pipeline"), {}
    arguments: dict[str, object] = {"prompt": PROMPT, "guidance_scale": GUIDANCE_SCALE}
    arguments |= {"num_images_per_prompt": case.batch_size, "width": case.width, "height": case.height}
    if case.control_net:
        assert case.guide is not None  # both are given or none
        cls = getattr(diffusers, f"StableDiffusion{xl}ControlNetPipeline")
        parts = {"controlnet": ControlNetModel.from_pretrained(case.control_net, dtype=dtype)}
        arguments["image"] = Image.open(case.guide)
    unused = {"add_watermarker": False} if xl else {"safety_checker": None, "requires_safety_checker": False}
    pipe = cls.from_pretrained(case.ckpt, dtype=dtype, **unused, **parts)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if case.lora and has_peft():
        pipe.load_lora_weights(case.lora)
    if case.compile:
        pipe.unet = torch.compile(pipe.unet)
    return pipe, arguments


def has_peft() -> bool:
    """Whether diffusers can load a LoRA here."""
    return importlib.util.find_spec("peft") is not None


def diffusers_steady(case: Case) -> dict[str, float]:
    """Diffusers' figures with the model loaded."""
    pipe, arguments = load_diffusers(case)

    def draw(steps: int, step_ended: Callable[[int], None]) -> None:
        def callback(pipe: object, index: int, timestep: object, tensors: dict) -> dict:
            step_ended(index)
            return tensors

        pipe(**arguments, num_inference_steps=steps, callback_on_step_end=callback)

    return steady(draw, case)


# ---------------------------------------------------------------------------------------------------------------------
# Whole processes, and what there is to be reached


def diffusers_once(case: Case) -> dict[str, float]:
    """Draw a batch with diffusers and save it, saying when the first step begins; measured from outside."""
    pipe, arguments = load_diffusers(case)
    files = [Path(case.outdir) / f"im_{number}.png" for number in range(case.batch_size)]
    print("drawing", ", ".join(file.name for file in files), file=sys.stderr, flush=True)
    for picture, file in zip(pipe(**arguments, num_inference_steps=case.steps).images, files):
        picture.save(file)
    return {}


def machine(case: Case) -> dict[str, object]:
    """What the figures are to be held against: the device, and its operations per second in a large matmul."""
    import diffusers
    import torch

    device, dtype = placement(case)
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side).to(device, dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < 100 and sum(seconds) < 1):
        start = now()
        torch.mm(a, b)
        seconds.append(now() - start)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {processor()}",
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": has_peft(),
        "step_tflop": step_operations(case) / 1e12,
        "matmul_tflops": 2 * side**3 / statistics.median(seconds) / 1e12,
    }


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def step_operations(case: Case) -> int:
    """Floating-point operations of a step's networks: matrix products, convolutions and attention.

    Counted for two samples a picture, as guidance has them; a LoRA's are left out.
    """
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(case.ckpt, subfolder="unet"))
        samples = 2 * case.batch_size
        sample = torch.empty(samples, unet.config.in_channels, case.height // CELL_PX, case.width // CELL_PX)
        text = torch.empty(samples, TOKENS, unet.config.cross_attention_dim)
        timestep = torch.empty((), dtype=torch.long)
        told = None
        if unet.config.addition_embed_type:
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            told = {"text_embeds": torch.empty(samples, pooled), "time_ids": torch.empty(samples, 6)}
        with FlopCounterMode(display=False) as counter:
            unet(sample, timestep, text, added_cond_kwargs=told)
            if case.control_net:
                control_net = ControlNetModel.from_config(ControlNetModel.load_config(case.control_net))
                guide = torch.empty(samples, 3, case.height, case.width)
                control_net(sample, timestep, text, guide, added_cond_kwargs=told)
    return counter.get_total_flops()


def make_control_net(case: Case) -> dict[str, object]:
    """Write a ControlNet that adds nothing yet, as each is before it is trained, and a guide picture of noise."""
    from diffusers import UNet2DConditionModel

    write_control_net(case, UNet2DConditionModel.from_pretrained(case.ckpt, subfolder="unet"))
    return {}


def write_control_net(case: Case, unet: UNet2DConditionModel) -> None:
    """Write the case's ControlNet, made from its U-Net, and its guide picture."""
    import numpy as np
    from diffusers import ControlNetModel
    from PIL import Image

    assert case.control_net is not None and case.guide is not None  # else there is none to make
    ControlNetModel.from_unet(unet).to(dtype=unet.dtype).save_pretrained(case.control_net)
    noise = np.random.default_rng(0).integers(0, 256, (case.height, case.width, 3), np.uint8)
    Image.fromarray(noise).save(case.guide)


MEASUREMENTS = {
    measure.__name__: measure
    for measure in (program_steady, diffusers_steady, diffusers_once, machine, make_control_net)
}

if __name__ == "__main__":
    case = Case(**json.loads(sys.argv[2]))
    print(json.dumps(MEASUREMENTS[sys.argv[1]](case)))
