"""Tiles: large pictures drawn in overlapping parts, and joined so that nobody sees where."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from test_control_net import write_control_net
from test_demo_model import MODEL
from test_regions import write_map
from test_xl_features import lllite  # noqa: F401  # a fixture

from library.draw.denoiser import Denoiser
from library.draw.lllite import LayerNetwork
from library.draw.regions import Regions
from library.draw.tiles import Tile, join, strips, tile_weights, tiles_over

TILED = ("--W", 128, "--H", 96, "--tile", 64)
# in tiles of 64 pixels the tiny model normalises groups of two numbers, which makes a rounding error a change of sign
EXACT = ("--W", 256, "--H", 192, "--tile", 128, "--tile_overlap", 64)
LINE = ("--prompt", "a cat --n fog --d 1")


@pytest.fixture
def source(tmp_path):
    Image.effect_noise((128, 96), 60).convert("RGB").save(tmp_path / "source.png")
    return tmp_path / "source.png"


@pytest.fixture
def predicted(monkeypatch):
    """What the U-Net was asked, with the text, and what came of it: a list of all predictions of the runs to come."""
    seen = []
    real = Denoiser._predict

    def predict(self, rows, timestep, text, index):
        prediction = real(self, rows, timestep, text, index)
        seen.append((rows.clone(), timestep, text.embeddings.clone(), prediction))
        return prediction

    monkeypatch.setattr(Denoiser, "_predict", predict)
    return seen


def drawn(generate, *options, **settings):
    result = generate(*options, **settings)
    assert result.status == 0, result.stderr
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Where tiles lie


@pytest.mark.parametrize(("whole", "size", "overlap"), [((64, 40), 16, 4), ((33, 7), 16, 0), ((65, 64), 64, 63)])
def test_tiles_cover_a_picture_evenly(whole, size, overlap):
    tiles = tiles_over(whole, size, overlap)
    covered = torch.zeros(whole)
    for tile in tiles:
        assert (tile.height, tile.width) == (min(size, whole[0]), min(size, whole[1]))
        tile.cut(covered).add_(1)
    assert covered.min() == 1
    for side, length, starts in ((0, whole[0], {t.top for t in tiles}), (1, whole[1], {t.left for t in tiles})):
        starts = sorted(starts)
        assert starts[0] == 0 and starts[-1] + min(size, length) == length, side
        gaps = [after - before for before, after in pairwise(starts)]
        assert not gaps or (max(gaps) - min(gaps) <= 1 and max(gaps) <= size - overlap)
    assert len({(t.top, t.left) for t in tiles}) == len(tiles)


def test_parts_are_joined_by_weights_that_fall_to_inner_borders():
    """One row of two tiles of 4 that overlap by 2: there the first counts 3/4, then 1/4."""
    tiles = tiles_over((1, 6), 4, 2)
    assert [tile_weights(tile).tolist() for tile in tiles] == [[[3.5, 2.5, 1.5, 0.5]], [[0.5, 1.5, 2.5, 3.5]]]
    joined = join(tiles, [torch.full((1, 4), 8.0), torch.zeros(1, 4)])
    assert joined.tolist() == [[8, 8, 6, 2, 0, 0]]
    large = torch.randn(2, 3, 40, 24)
    tiles = tiles_over((40, 24), 16, 12)  # more than two tiles lie over one another
    parts = list(strips(tiles, (tile.cut(large) for tile in tiles)))
    torch.testing.assert_close(torch.cat(parts, dim=-2), large)
    assert max(part.shape[-2] for part in parts) == 16  # what is finished is given at once


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def test_one_tile_is_the_plain_picture(sd1, generate, source, tmp_path):
    options = (sd1.folder, "--W", 128, "--H", 96, "--image_path", source, *LINE)
    plain = drawn(generate, *options)
    tiled = drawn(generate, *options, "--tile", 128, "--tile_overlap", 0, outdir=tmp_path / "tiled")
    assert np.array_equal(plain.pictures[0], tiled.pictures[0])
    assert "Tile" not in Image.open(tiled.files[0]).info["parameters"]
    assert "warning: --tile 128 does nothing: no picture is larger" in tiled.stderr
    several = drawn(generate, *options, "--tile", 64, outdir=tmp_path / "several")
    assert not np.array_equal(plain.pictures[0], several.pictures[0])


def averaged(whole: tuple[int, int], predict) -> torch.Tensor:
    """The mean of what `predict(rows, columns)` gives for tiles of 16 cells that begin every 8: written out."""
    total, weights = torch.zeros(1), torch.zeros(1)
    for top in range(0, whole[0] - 15, 8):
        for left in range(0, whole[1] - 15, 8):
            sides = []
            for first, length in ((top, whole[0]), (left, whole[1])):
                place = torch.arange(length, dtype=torch.float32)
                before = place - first + 0.5 if first else torch.full((length,), 99.0)
                after = first + 16 - place - 0.5 if first + 16 < length else torch.full((length,), 99.0)
                reach = torch.minimum(before, after).clamp(max=16)
                sides.append(torch.where((place >= first) & (place < first + 16), reach, 0).clamp(min=0))
            weight = sides[0][:, None] * sides[1]
            part = predict(slice(top, top + 16), slice(left, left + 16))
            placed = torch.zeros(*part.shape[:2], *whole)
            placed[..., top : top + 16, left : left + 16] = part
            total, weights = total + placed * weight, weights + weight
    return total / weights


def test_predictions_of_tiles_are_averaged(sd1, generate, source, predicted):
    """Against diffusers' U-Net called for each tile, for img2img with three branches; the scheduler steps the whole."""
    drawn(generate, sd1.folder, *EXACT, "--image_path", source, "--negative_scale", 2, "--steps", 4, *LINE)
    unet = UNet2DConditionModel.from_pretrained(sd1.folder / "unet")
    assert len(predicted) == 3
    for rows, timestep, text, prediction in predicted:
        assert rows.shape == (3, 4, 24, 32)

        def predict(r, c, rows=rows, timestep=timestep, text=text):
            return unet(rows[..., r, c], timestep, encoder_hidden_states=text).sample

        with torch.inference_mode():
            expected = averaged((24, 32), predict)
        torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)  # another attention kernel


def test_control_nets_see_the_tiles_part_of_their_guide(sd1, generate, predicted, tmp_path):
    """The guide is embedded as a whole would be, though tile by tile, and cut like the latents."""
    net = write_control_net(tmp_path / "net", sd1, 1) / "folder"
    pixels = np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "guide.png")
    options = ("--control_net_models", net, "--guide_image_path", tmp_path / "guide.png")
    drawn(generate, sd1.folder, *EXACT, *options, "--scale", 1, "--steps", 1, *LINE)
    unet, model = UNet2DConditionModel.from_pretrained(sd1.folder / "unet"), ControlNetModel.from_pretrained(net)
    [(rows, timestep, text, prediction)] = predicted
    with torch.inference_mode():
        guide = model.controlnet_cond_embedding(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        model.controlnet_cond_embedding = torch.nn.Identity()

        def predict(r, c):
            told = {"encoder_hidden_states": text, "return_dict": False}
            down, middle = model(rows[..., r, c], timestep, controlnet_cond=guide[..., r, c], **told)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            return unet(rows[..., r, c], timestep, encoder_hidden_states=text, **added).sample

        expected = averaged((24, 32), predict)
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)  # another attention kernel


# a left and a right tile
APART = ("--W", 256, "--H", 128, "--tile", 128, "--tile_overlap", 0, "--scale", 1, "--steps", 1)
LEFT, RIGHT = (..., slice(None, 16)), (..., slice(16, None))


def test_lllites_see_the_tiles_part_of_their_guide(sdxl, lllite, generate, predicted, tmp_path):  # noqa: F811
    """What changes in the right half of a guide changes the right tile's prediction alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    for name in ("one", "other"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        options = ("--control_net_lllite_models", lllite[0], "--guide_image_path", tmp_path / f"{name}.png")
        drawn(generate, sdxl.folder, *APART, *options, *LINE)
        pixels[:, 128:] = 255 - pixels[:, 128:]
    one, other = (prediction for *_, prediction in predicted)
    assert torch.equal(one[LEFT], other[LEFT])
    assert (one[RIGHT] - other[RIGHT]).abs().max() > 1e-3


def test_in_tiles_too_the_last_lllite_works_first(sdxl, lllite, generate, tmp_path, monkeypatch):  # noqa: F811
    file, state = lllite
    marked = tmp_path / "marked.safetensors"
    save_file({name: tensor + 100 if name.endswith("up.0.bias") else tensor for name, tensor in state.items()}, marked)
    Image.new("RGB", (256, 128)).save(tmp_path / "guide.png")
    guides = ("--guide_image_path", *[tmp_path / "guide.png"] * 2)
    is_marked, change = [], LayerNetwork.change

    def noted(self, x, share):
        is_marked.append(self._up[1].mean().item() > 50)
        return change(self, x, share)

    monkeypatch.setattr(LayerNetwork, "change", noted)
    drawn(generate, sdxl.folder, *APART, "--control_net_lllite_models", file, marked, *guides, *LINE)
    assert is_marked == [True, False] * (len(is_marked) // 2)
    assert is_marked


def test_regions_are_cut_like_the_tiles(sd1, generate, predicted, tmp_path):
    """A tile that lies in one part's region is predicted as for that part alone."""
    halves = write_map(tmp_path / "halves.png", (255, 0, 0), (0, 255, 0))
    drawn(generate, sd1.folder, *APART, "--mask_path", halves, "--prompt", "a cat AND a dog --d 1")
    drawn(generate, sd1.folder, *APART, "--prompt", "a cat --d 1")
    drawn(generate, sd1.folder, *APART, "--prompt", "a dog --d 1")
    both, cat, dog = (prediction for *_, prediction in predicted)
    assert (cat - dog).abs().amax(dim=(0, 1, 2)).min() > 1e-3
    # only 1 / 1.0001 is between them
    torch.testing.assert_close(both[LEFT], cat[LEFT], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(both[RIGHT], dog[RIGHT], rtol=1e-2, atol=1e-3)


def test_masks_of_regions_are_those_of_the_whole():
    masks = torch.randint(0, 256, (2, 96, 128), dtype=torch.uint8)
    regions = Regions([masks], torch.device("cpu"))
    tile = Tile(4, 8, 8, 8, (12, 16))
    whole, deeper = regions.masks((12, 16)), regions.masks((6, 8))
    regions.begin_tile(tile)
    assert torch.equal(regions.masks((8, 8)), tile.cut(whole))
    assert regions.masks((4, 4)).shape == (2, 1, 4, 4)
    assert not torch.equal(regions.masks((4, 4)), deeper[..., :4, :4])
    regions.begin_tile(Tile(0, 0, 12, 16, (12, 16)))
    assert torch.equal(regions.masks((12, 16)), whole)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_batch_equals_pictures_alone(sd1, generate, source, tmp_path):
    options = (sd1.folder, *EXACT, "--image_path", source, "--mask_path", source)
    together = drawn(generate, *options, "--batch_size", 2, "--images_per_prompt", 2, "--prompt", "a cat --d 1,2")
    alone = drawn(generate, *options, "--prompt", "a cat --d 2", outdir=tmp_path / "alone")
    assert np.abs(together.pictures[1] - alone.pictures[0]).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        ("--highres_fix_scale", 0.5, "--highres_fix_steps", 1, "--strength", 0.5),
        ("--sampler", "euler_a", "--gradual_latent_timesteps", 999, "--gradual_latent_ratio_step", 0.5),
        ("--ds_depth_1", 1, "--ds_timesteps_1", 500),
    ],
    ids=["highres", "gradual_latent", "deep_shrink"],
)
def test_models_see_no_more_than_a_tile(sd1, generate, monkeypatch, options):
    """Whatever the way to larger pictures: so memory is that of a tile."""
    sizes = []
    for model, name in ((UNet2DConditionModel, "forward"), (AutoencoderKL, "encode"), (AutoencoderKL, "decode")):
        real, cell_px = getattr(model, name), 8 if name == "encode" else 1

        def call(self, x, *rest, real=real, cell_px=cell_px, **told):
            sizes.append(max(x.shape[-2:]) // cell_px)
            return real(self, x, *rest, **told)

        monkeypatch.setattr(model, name, call)
    result = drawn(generate, sd1.folder, "--W", 256, "--H", 128, "--tile", 128, *options, *LINE)
    assert result.pictures[0].shape == (128, 256, 3)
    assert max(sizes) == 16


def test_no_seam_is_seen(generate, tmp_path):
    """Across tiles' borders colours change no more than elsewhere, on flat grounds and where tiles see other things."""
    grounds = [f"on a {ground} background" for ground in ("white", "black", "blue")]
    things = ["a small red circle on a white background", "a small green square on a black background"]
    (tmp_path / "lines.txt").write_text("\n".join(f"{line} --d 1" for line in (*grounds, *things)))
    sizes = ("--W", 224, "--H", 224, "--tile", 128, "--steps", 6, "--scale", 5, "--batch_size", 5)
    result = drawn(generate, MODEL, *sizes, "--from_file", tmp_path / "lines.txt", "--sequential_file_name")
    for pictures in (result.pictures[:3], result.pictures[3:]):
        steps = np.mean([np.abs(np.diff(x, axis=0)) for p in pictures for x in (p, p.swapaxes(0, 1))], axis=(0, 2, 3))
        borders = np.array([96, 128]) - 1  # where the second tile begins, and where the first one ends
        assert steps[borders].mean() <= 1.1 * np.delete(steps, borders).mean()


def test_it_is_told(sd1, generate, source):
    options = (sd1.folder, *TILED, "--image_path", source, *LINE)
    assert 'Tile: "64, overlap 16"' in Image.open(drawn(generate, *options).files[0]).info["parameters"]
    told = json.loads(drawn(generate, *options, "--dry_run", "--json").stdout)
    assert (told["tile"], told["tile_overlap"]) == (64, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tile", 100], "--tile 100: must be a multiple of 8; use 96 or 104"),
        (["--tile", 32], "--tile 32: too small; write 64 or more, better the size the model was trained on"),
        (["--tile", 64, "--tile_overlap", 12], "--tile_overlap 12: must be a multiple of 8; use 8 or 16"),
        (["--tile", 64, "--tile_overlap", 64],
         "--tile_overlap 64: leaves no way from one tile of 64 to the next; give 56 or less, 16 is usual"),
        (["--tile_overlap", 16], "--tile_overlap: is for tiles; give --tile too, or leave it out"),
        (["--tile", 64, "--compile"], "--tile and --compile: do not go together; give one"),
        (["--tile", 64, "--clip_guidance_scale", 1], "--tile and --clip_guidance_scale: do not go together; give one"),
        (["--tile", 64, "--W", 512, "--H", 512, "--ds_depth_1", 3, "--ds_ratio", 0.9],
         "Deep Shrink: leaves nothing of a picture this small; use a smaller depth or a larger ratio"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(sd1, generate, options, message):
    result = generate(sd1.folder, *LINE, *options)
    assert (result.status, result.stderr) == (2, f"error: {message}\n")
