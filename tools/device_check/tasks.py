"""All that is measured, in its order: what tells most comes first, what takes minutes comes last."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tools.benchmark_child import Case
from tools.device_check import attention, measures
from tools.device_check.processes import Result, Task

PARTS = {
    "expected": "the expected images, on this device against the CPU's",
    "attention": "each attention kernel's time, and whether all give the same",
    "speed": "steps and pictures a second: eager, with CUDA graphs, compiled",
    "memory": "the most GPU memory that is taken: plain, with --lowvram, with a LoRA, with a ControlNet",
    "start": "seconds from the program's start to its first step",
    "writing": "how long writing pictures holds the device up",
    "peer": "this program beside diffusers' own pipeline",
}
MACHINE, MODELS = "machine", "models"  # parts that are for the others
FAMILIES = {"sd1": "SD 1.5", "sdxl": "XL"}
SIZES_PX = {"sd1": 512, "sdxl": 1024}
EAGER, GRAPHS, COMPILED = "eager", "CUDA graphs", "--compile"
# What the program is given for each, on a GPU; on a CPU there are no graphs to be switched off
VARIANTS = {EAGER: ("--cuda_graphs", "off"), GRAPHS: ("--cuda_graphs", "on"), COMPILED: ("--compile",)}
FLOAT32 = "float32"
_BATCH_SIZES = {"sd1": (1, 2, 4, 8, 16, 32), "sdxl": (1, 2, 4, 8)}
_USUAL_BATCH = {"sd1": 8, "sdxl": 4}  # where the best is not known
_ON_GPUS_ONLY = "is for CUDA devices"
_NOT_TINY = "takes a minute whatever the model's size; left out with --tiny"


@dataclass(frozen=True)
class Check:
    """What is checked, and where."""

    device: str  # cuda or cpu
    tiny: bool
    folder: Path  # for models and pictures, removed afterwards

    @property
    def precision(self) -> str:
        """What is measured in."""
        return "fp16" if self.device == "cuda" else "fp32"

    def case(self, family: str, steps: int = 20, also: tuple[str, ...] = ()) -> Case:
        """What a picture of a family's own size is measured with: plain, one at a time."""
        side = 64 if self.tiny else SIZES_PX[family]
        steps = 3 if self.tiny else steps
        here = self.folder / family
        size = (side, side, steps, self.precision)
        return Case(str(here / "model"), family, *size, 1, False, str(here / "pictures"), also=also)

    def with_all(self, family: str) -> Case:
        """A case with a LoRA and a ControlNet."""
        here = self.folder / family
        lora, control_net, guide = (str(here / name) for name in ("lora.safetensors", "control_net", "guide.png"))
        return replace(self.case(family), lora=lora, control_net=control_net, guide=guide)


def machine_task(check: Check) -> Task:
    """Looks at the machine."""
    return Task(MACHINE, "the machine", measures.machine, (check.device,), 60, needs_models=False)


def model_tasks(check: Check) -> Iterator[Task]:
    """Make what the others measure with."""
    for family in FAMILIES:
        arguments = (check.with_all(family), check.device, check.tiny)
        yield Task(MODELS, f"{FAMILIES[family]}, made", measures.make_models, arguments, 90, family)


def tasks(check: Check, done: list[Result]) -> Iterator[Task]:
    """All tasks but those of the machine and of the models; later ones look at what is done."""
    yield from _expected(check)
    shapes = attention.TINY_SHAPES if check.tiny else attention.SHAPES
    arguments = (check.precision, shapes, 0.005 if check.tiny else 0.05)
    yield Task("attention", "kernels", attention.attention, arguments, 60, needs_models=False)
    for variant in (EAGER, GRAPHS):
        for family in FAMILIES:
            yield _speed(check, family, variant, done)
    yield from _memory(check)
    for family in ("sd1",) if check.tiny else FAMILIES:
        case = check.case(family, steps=2)
        yield Task("start", FAMILIES[family], measures.start, (case,), 90, family)
    few = replace(check.case("sd1", steps=8), batch_size=2 if check.tiny else 4)
    yield Task("writing", "PNG", measures.writing, (few, 2 if check.tiny else 4), 60, "sd1")
    for family in FAMILIES:
        case = check.case(family)
        for variant, measure in (("this program", measures.program_pace), ("diffusers", measures.diffusers_pace)):
            yield Task("peer", f"{FAMILIES[family]}, {variant}", measure, (case,), 60, family, variant)
    for family in FAMILIES:
        yield _speed(check, family, COMPILED, done)


def _expected(check: Check) -> Iterator[Task]:
    on_gpu = check.device == "cuda"
    every, of_others = (19, 28) if check.tiny else (1, 3)  # a case takes half a second and more
    others = "" if on_gpu else _ON_GPUS_ONLY
    for variant, options, exact, share, skipped in (
        (FLOAT32, (), True, every, ""),
        ("float32 with TF32", (), False, of_others, others),
        ("float16", ("--fp16",), False, of_others, others),
        ("bfloat16", ("--bf16",), False, of_others, ""),
    ):
        arguments = (check.folder, options, exact, share)
        measure = measures.expected_images
        yield Task("expected", variant, measure, arguments, 90, "", variant, needs_models=False, skipped=skipped)


def _speed(check: Check, family: str, variant: str, done: Iterable[Result]) -> Task:
    on_gpu = check.device == "cuda"
    sizes: tuple[int, ...] = (1, 2) if check.tiny else _BATCH_SIZES[family]
    if variant != EAGER and not check.tiny:
        sizes = (1, best_batch(family, done))
    also = VARIANTS[variant] if on_gpu or variant != EAGER else ()
    skipped = ""
    if not on_gpu and variant == GRAPHS:
        skipped = _ON_GPUS_ONLY
    elif check.tiny and variant == COMPILED:
        skipped = _NOT_TINY
    case = check.case(family, also=also)
    limit_s = 150 if variant == COMPILED else 60
    name = f"{FAMILIES[family]}, {variant}"
    return Task("speed", name, measures.speed, (case, sizes), limit_s, family, variant, skipped=skipped)


def best_batch(family: str, done: Iterable[Result]) -> int:
    """The batch size that gave most pictures a second without graphs and compiling."""
    rows = [
        row
        for result in done
        if (result.task.part, result.task.family, result.task.variant) == ("speed", family, EAGER)
        for row in result.rows
    ]
    best = max(rows, key=lambda row: row["pictures_s"], default={"batch": _USUAL_BATCH[family]})["batch"]
    return max(2, best)


def _memory(check: Check) -> Iterator[Task]:
    for family in FAMILIES:
        plain, full = check.case(family, steps=3), check.with_all(family)
        variants: Mapping[str, Case] = {
            "plain": plain,
            "--lowvram": replace(plain, also=("--lowvram",)),
            "LoRA": replace(plain, lora=full.lora),
            "ControlNet": replace(plain, control_net=full.control_net, guide=full.guide),
        }
        for variant, case in variants.items():
            if check.tiny and family != "sd1" and variant != "plain":
                continue  # the same once more
            yield Task("memory", f"{FAMILIES[family]}, {variant}", measures.memory, (case,), 45, family, variant)
