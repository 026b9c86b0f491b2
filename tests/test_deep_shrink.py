"""Deep Shrink: features shrunk where and when planned, sizes that match again, and a U-Net left as it was."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image

from library.draw.deep_shrink import Shrinker
from library.files.families import SD1
from library.settings.deep_shrink import DeepShrink

ONE_LEVEL = 1  # float32 sums in another order, rounded


@pytest.fixture(scope="module")
def unet(sd1) -> UNet2DConditionModel:
    """The tiny model's U-Net."""
    return UNet2DConditionModel.from_pretrained(sd1.folder, subfolder="unet").eval()


def shrunk_forward(unet, sample, timestep, text, depth, ratio):
    """The U-Net block by block, as behaviour.md describes Deep Shrink."""

    def resize(x, **how):
        return F.interpolate(x, mode="bicubic", align_corners=False, **how)

    embedding = unet.time_embedding(unet.time_proj(timestep.expand(len(sample))))
    x = unet.conv_in(sample)
    skips = [x]
    for place, block in enumerate(unet.down_blocks):
        if place == depth:
            x = resize(x, scale_factor=ratio)
        for number, resnet in enumerate(block.resnets):
            x = resnet(x, embedding)
            if hasattr(block, "attentions"):
                x = block.attentions[number](x, encoder_hidden_states=text, return_dict=False)[0]
            skips.append(x)
        if block.downsamplers:
            x = block.downsamplers[0](x)
            skips.append(x)
    x = unet.mid_block(x, embedding, encoder_hidden_states=text)
    for block in unet.up_blocks:
        for number, resnet in enumerate(block.resnets):
            skip = skips.pop()
            if x.shape[2:] != skip.shape[2:]:
                x = resize(x, size=skip.shape[2:])
            x = resnet(torch.cat([x, skip], 1), embedding)
            if hasattr(block, "attentions"):
                x = block.attentions[number](x, encoder_hidden_states=text, return_dict=False)[0]
        if block.upsamplers:
            x = block.upsamplers[0](x)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@torch.inference_mode()
def test_features_are_shrunk_and_resized_as_described(unet, depth):
    generator = torch.Generator().manual_seed(depth)
    sample = torch.randn(1, 4, 16, 24, generator=generator)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    timestep = torch.tensor(801)
    plain = unet(sample, timestep, encoder_hidden_states=text).sample
    shrinker = Shrinker(DeepShrink(depth_1=depth, ratio=0.5), SD1.shrink_points(unet.config), [801.0, 500.0])
    with shrinker.attached(unet):
        shrinker.begin_step(0)
        shrunk = unet(sample, timestep, encoder_hidden_states=text).sample
        shrinker.begin_step(1)
        assert torch.equal(unet(sample, timestep, encoder_hidden_states=text).sample, plain)
    expected = shrunk_forward(unet, sample, timestep, text, depth, 0.5)
    assert torch.allclose(shrunk, expected, atol=1e-4)  # float32
    assert not torch.allclose(shrunk, plain, atol=1e-2)
    assert torch.equal(unet(sample, timestep, encoder_hidden_states=text).sample, plain)
    hooks = [m for m in unet.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks


def test_depths_follow_the_timesteps():
    settings = DeepShrink(depth_1=3, timesteps_1=650, depth_2=1, timesteps_2=300)
    depths = [settings.depth(t) for t in (999, 650, 649.9, 300, 299, 0)]
    assert depths == [3, 3, 1, 1, None, None]
    assert DeepShrink(depth_2=1, timesteps_2=0).depth(999) is None


def test_options_hold_for_their_line_and_pictures_for_themselves(sd1, generate, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("a --d 1 --dsd1 1\nb --d 2\nc --d 3 --dsr 0.75\nd --d 4 --dsd1 1 --dst1 300 --dsd2 2 --dst2 0\n")
    options = ["--steps", 3, "--W", 128, "--H", 128, "--sequential_file_name"]
    together = generate(sd1.folder, *options, "--batch_size", 4, "--from_file", lines).pictures
    for number, line in enumerate(lines.read_text().splitlines()):
        alone = generate(sd1.folder, *options, "--prompt", line, outdir=tmp_path / str(number)).pictures[0]
        assert np.abs(together[number] - alone).max() <= ONE_LEVEL
    plain = generate(sd1.folder, *options, "--prompt", "a --d 1", outdir=tmp_path / "plain").pictures[0]
    by_option = generate(sd1.folder, *options, "--ds_depth_1", 1, "--prompt", "a --d 1", outdir=tmp_path / "option")
    assert np.abs(together[0] - plain).max() > 10
    assert np.abs(together[0] - by_option.pictures[0]).max() <= ONE_LEVEL
    assert 'Deep Shrink: "depth_1 1, timesteps_1 650' in Image.open(by_option.files[0]).text["parameters"]
    off = generate(sd1.folder, *options, "--ds_depth_1", 1, "--prompt", "a --d 1 --dsd1 none", outdir=tmp_path / "off")
    assert np.array_equal(off.pictures[0], plain)


@pytest.mark.parametrize(
    ("options", "line", "message"),
    [
        (["--ds_depth_1", 4], "a", "Deep Shrink: has depths 0 to 3 with this model; use one of them, not 4"),
        (["--ds_ratio", 0.5], "a", "--ds_ratio: does nothing by itself; give --ds_depth_1 too"),
        ([], "a --dsr 0", "--dsr 0 (column 3): out of range"),
        (["--W", 8, "--H", 8], "a --dsd1 0", "Deep Shrink: leaves nothing of a picture this small"),
    ],
)
def test_what_cannot_work_is_refused(sd1, generate, options, line, message):
    result = generate(sd1.folder, *options, "--prompt", line)
    assert (result.status, result.files) == (2, [])
    assert message in result.stderr and result.stderr.count("\n") == 1
