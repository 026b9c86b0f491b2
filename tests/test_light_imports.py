"""What is imported to draw, in a process of its own: tests import more."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_DRAWS = """
import sys, gen_img_diffusers
command = "--ckpt examples/shapes --prompt red --W 64 --H 64 --steps 1 --sampler dpmsolver++ --bf16 --outdir"
assert gen_img_diffusers.main([*command.split(), sys.argv[1]]) == 0
"""


@pytest.mark.parametrize(
    "then",
    [
        # nothing ran that is only imported for others
        """
others = ("torch._dynamo.utils", "torch.distributed.tensor", "scipy.stats._stats_py", "diffusers.models.unets.unet_1d")
names = vars(sys.modules["transformers.models"]).get("__all__", [])  # which it reads out of its files
print([name for name in others if name in sys.modules] + list(names))
""",
        # what was postponed runs for whoever asks for it
        """
import torch, scipy.stats
from diffusers import UNet1DModel
from diffusers.models.unets import UNet3DConditionModel
import diffusers.models.unets, diffusers.hooks
assert diffusers.models.unets.UNet1DModel is UNet1DModel and diffusers.hooks.HookRegistry
import transformers
import transformers.models as early
from transformers import BertConfig
from transformers.models import t5
assert early.bert.BertConfig is transformers.models.BertConfig is BertConfig and early.t5 is t5
from scipy.stats import *
assert norm.cdf(0) == 0.5
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2 and torch.distributed.is_available()
print([each for each in (UNet1DModel, UNet3DConditionModel) if not callable(each)])
""",
    ],
)
def test_drawing_imports_what_it_uses_and_the_rest_is_there(tmp_path: Path, then: str) -> None:
    assert run(_DRAWS + then, tmp_path) == "[]"


@pytest.mark.parametrize(
    "before",
    [
        "sys.modules['scipy'] = None",  # not installed
        "import diffusers",  # as a custom module does
    ],
)
def test_whatever_is_there_before_what_draws_is_imported_and_keeps_quiet(tmp_path: Path, before: str) -> None:
    program = f"""
import sys
{before}
from library.models.light_imports import import_light
import_light(compiles=False)
import diffusers.utils.logging, transformers.utils.logging, logging, library.models.models
print([each.get_verbosity() for each in (diffusers.utils.logging, transformers.utils.logging)] == [logging.ERROR] * 2)
"""
    assert run(program, tmp_path) == "True"


def run(program: str, outdir: Path) -> str:
    """The last line that a program prints."""
    command = [sys.executable, "-c", program, str(outdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
