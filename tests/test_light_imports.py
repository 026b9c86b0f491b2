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
print([name for name in others if name in sys.modules])
""",
        # what was postponed runs for whoever asks for it
        """
import torch, scipy.stats
from diffusers import UNet1DModel
from diffusers.models.unets import UNet3DConditionModel
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2 and torch.distributed.is_available()
print([each for each in (UNet1DModel, UNet3DConditionModel) if not callable(each)])
""",
    ],
)
def test_drawing_imports_what_it_uses_and_the_rest_is_there(tmp_path: Path, then: str) -> None:
    command = [sys.executable, "-c", _DRAWS + then, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
