"""`--from_pictures`: this program's pictures drawn again are the same, and options that are given win."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Result, pictures_in
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import gen_img_diffusers

SHAPES = Path(__file__).resolve().parent.parent / "examples/shapes"
COMPANIONS = SHAPES / "companions"

LINES = """\
a red circle --d 1
a (red:1.3) circle, [dim] {big|small} --n a \\(star\\) --d 2 --s 4 --sampler dpmsolver++ --schedule karras --l 5.25
a --w 64 --h 128 --d 3 --sampler euler_a --s 6 --glt 900 --glr 0.5 --gls 0.25 --gle 1 --glus 3,0.5,0.25,0
a --d 4 --dsd1 1 --dst1 500 --dsr 0.75 --s 3
a --d 5 --nl 2.5 --n b --sampler ddim --eta 0.5
a --d 6 --sampler euler --s_churn 2
a --d 9223372036854775807 --sampler euler --timesteps 999,500,20
a AND b --d 8 --n c, d: "e"
"""


@pytest.fixture
def redraw(tmp_path, capfd):
    """Draw pictures again without any option that the fixture `generate` adds: `redraw(ckpt, path, *options)`."""

    def run(ckpt: object, path: object, *options: object) -> Result:
        outdir = tmp_path / "again"
        before = set(pictures_in(outdir))
        argv = ["--ckpt", ckpt, "--outdir", outdir, "--from_pictures", path, *options]
        try:
            status = gen_img_diffusers.main([str(argument) for argument in argv])
        except SystemExit as leaving:
            status = leaving.code
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err, sorted(set(pictures_in(outdir)) - before))

    return run


def same(first, second) -> bool:
    """Whether two runs gave the same pictures, in the same order."""
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_pictures_are_the_same_again(sd1, generate, redraw, tmp_path, ending):
    """Lossless or not: what is compared is what both runs write."""
    lines = LINES if ending == "png" else "".join(LINES.splitlines(keepends=True)[:2])
    (tmp_path / "p.txt").write_text(lines)
    how = ("--format", ending, "--sequential_file_name")
    first = generate(sd1.folder, "--from_file", tmp_path / "p.txt", *how, "--clip_skip", 2, "--guidance_rescale", 0.5)
    assert first.status == 0, first.stderr
    again = redraw(sd1.folder, tmp_path / "out", *how)
    assert again.status == 0
    assert "not taken over" not in again.stderr
    assert same(first.pictures, again.pictures)


def test_prompt_lines_are_shown_and_say_the_same(sd1, generate, redraw, tmp_path):
    first = generate(sd1.folder, "--prompt", "a cat --n fog --d 7 --s 3 --l 4", "--W", 128)
    shown = redraw(sd1.folder, first.files[0], "--dry_run").stdout.splitlines()
    assert shown[-1] == "a cat --n fog --w 128 --h 64 --s 3 --d 7 --l 4.0"


def test_options_win(sd1, generate, redraw, tmp_path):
    first = generate(sd1.folder, "--prompt", "a cat --n fog --d 7 --l 4 --sampler dpmsolver++ --schedule karras")
    given = ("--sampler", "euler_a", "--scale", 3, "--seed", 11, "--negative_prompt", "rain")
    told = json.loads(redraw(sd1.folder, first.files[0], "--dry_run", "--json", *given).stdout)
    names = ("prompt", "negative_prompt", "sampler", "schedule", "guidance_scale", "seed", "steps", "width", "height")
    assert [told[name] for name in names] == ["a cat", "rain", "euler_a", "own", 3.0, 11, 2, 64, 64]


def test_highres_fix_in_the_web_ui_s_syntax(sd1, generate, redraw, tmp_path):
    options = ("--highres_fix_scale", 0.4, "--highres_fix_steps", 3, "--prompt_syntax", "webui", "--strength", 0.6)
    first = generate(sd1.folder, "--prompt", "a [cat|dog] --w 128 --h 192 --s 4 --d 5", *options)
    again = redraw(sd1.folder, first.files[0])
    assert same(first.pictures, again.pictures)
    text = (tmp_path / "again/settings.toml").read_text()
    assert 'prompt_syntax = "webui"' in text
    assert "highres_fix_steps = 3" in text


def test_what_lies_beside_pictures_is_passed_over(sd1, generate, redraw, tmp_path):
    options = ("--highres_fix_scale", 0.5, "--highres_fix_save_1st", "--grid", "--images_per_prompt", 2)
    made = generate(sd1.folder, "--prompt", "a --d 5,6 --w 128 --h 128", *options)
    assert len(made.files) == 5
    told = redraw(sd1.folder, tmp_path / "out", "--dry_run", "--json")
    assert [json.loads(line)["seed"] for line in told.stdout.splitlines()] == [5, 6]
    assert "sheets are passed over: 3 files" in told.stderr


def test_networks_and_controlnets_that_are_at_hand(generate, redraw, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "guide.png")
    networks = ("--network_weights", COMPANIONS / "dotted.safetensors", COMPANIONS / "dipped.safetensors")
    nets = ("--control_net_models", COMPANIONS / "canny.safetensors", "--guide_image_path", tmp_path / "guide.png")
    nets += ("--control_net_preps", "canny")
    (tmp_path / "p.txt").write_text("a star --d 1 --am 0.5,0.25\na heart --d 2 --am 0.75/0.5,0\n")
    how = ("--sequential_file_name",)
    first = generate(SHAPES, "--from_file", tmp_path / "p.txt", *networks, *nets, *how)
    again = redraw(SHAPES, tmp_path / "out", *networks, *nets, *how)
    assert "not taken over" not in again.stderr
    assert same(first.pictures, again.pictures)
    found = redraw(SHAPES, tmp_path / "out", "--network_dir", COMPANIONS, *nets, *how)
    assert same(first.pictures, found.pictures)
    plain = redraw(SHAPES, tmp_path / "out", "--dry_run")
    for what in ("network dotted (give --network_dir)", "ControlNet canny: give --control_net_models"):
        assert what in plain.stderr


SIZE = ("--W", 128, "--H", 128, "--steps", 3, "--sequential_file_name")
LAYER = ("--clip_skip", 1)
V = ("--v_parameterization",)


@pytest.mark.parametrize("said", [LAYER, V, (*V, "--zero_terminal_snr")])
def test_what_is_said_of_a_model(sdxl, generate, redraw, tmp_path, said):
    """XL's text encoders are left at the last layer but one, and models may predict v without saying so."""
    first = generate(sdxl.folder, "--prompt", "a red cat --d 1", *SIZE, *said)
    again = redraw(sdxl.folder, tmp_path / "out")
    assert again.status == 0, again.stderr
    assert same(first.pictures, again.pictures)
    assert not same(first.pictures, generate(sdxl.folder, "--prompt", "a red cat --d 1", *SIZE).pictures)


def test_what_was_said_of_another_model(sdxl, generate, redraw, tmp_path):
    """Neither option nor file of one model say how another is drawn with."""
    shutil.copytree(sdxl.folder, tmp_path / "other", copy_function=os.link)
    line = ("--prompt", "a --d 1 --sampler euler", *SIZE)
    plain = generate(sdxl.folder, *line)
    said = generate(tmp_path / "other", *line, *V, "--zero_terminal_snr", outdir=tmp_path / "v")
    again = redraw(sdxl.folder, tmp_path / "v")
    assert same(plain.pictures, again.pictures)
    assert not same(plain.pictures, said.pictures)
    for option in ("--v_parameterization", "--zero_terminal_snr"):
        assert f"{option}, as another model needs it ({tmp_path / 'v/im_000001.png'})" in again.stderr
    (tmp_path / "link").symlink_to(tmp_path / "other", target_is_directory=True)
    for named in ("link", "oth*"):
        again = redraw(tmp_path / named, tmp_path / "v")
        assert same(said.pictures, again.pictures)
        assert "made with other models" not in again.stderr


def test_samplers_of_a_model_that_begins_at_pure_noise(sdxl, generate, redraw, tmp_path):
    """Those that cannot begin there share a run with those that can, as before."""
    file = tmp_path / "noob.safetensors"
    save_file(load_file(sdxl.safetensors) | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, file)
    (tmp_path / "p.txt").write_text("a --d 1 --sampler euler\na --d 2 --sampler lms\n")
    first = generate(file, "--from_file", tmp_path / "p.txt", *SIZE)
    again = redraw(file, tmp_path / "out", "--sequential_file_name")
    assert again.status == 0, again.stderr
    assert same(first.pictures, again.pictures)


def test_zero_snr_that_the_option_and_the_file_tell(sdxl, generate, redraw, tmp_path):
    """Once both were written alike."""
    shutil.copy(sdxl.safetensors, tmp_path / "noob.safetensors")
    by_option = generate(tmp_path / "noob.safetensors", "--prompt", "a --d 1", *SIZE, *V, "--zero_terminal_snr")
    save_file(load_file(sdxl.safetensors) | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "noob.safetensors")
    by_file = generate(tmp_path / "noob.safetensors", "--prompt", "a --d 2", *SIZE, *V)
    again = redraw(tmp_path / "noob.safetensors", *by_option.files, *by_file.files, "--sequential_file_name", *V)
    assert again.status == 0, again.stderr
    assert same(by_option.pictures + by_file.pictures, again.pictures)


HIGHRES = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2)
OVER = ("--image_path", "source.png", "--mask_path", "mask.png")
MAP = ("--mask_path", "source.png")
NETS = ("--control_net_models", *[COMPANIONS / "canny.safetensors"] * 2, "--guide_image_path", *["source.png"] * 2)

NET = (*NETS[:2], *NETS[3:5])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (OVER, ("--keep_unmasked",)),
        (MAP, ("--network_regional_mask_max_color_codes", 3)),
        (NETS, ("--control_net_together",)),
        (NETS, (*HIGHRES, "--highres_fix_disable_control_net")),
        (NETS, ("--control_net_weights", 0.5, -0.25, "--control_net_starts", 0.4, "--control_net_ratios", 0.9)),
        (NETS, ("--control_net_preps", "none", "canny_50_90")),
        (NET, ("--control_net_weights", 0)),
    ],
)
def test_how_masks_and_control_nets_were_used(generate, redraw, tmp_path, monkeypatch, files, said):
    """It is in the picture; which they were has to be given."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).choice([0, 255], (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((128, 128), Image.Resampling.NEAREST).save("source.png")
    Image.fromarray(pixels).convert("L").resize((128, 128), Image.Resampling.NEAREST).save("mask.png")
    line = ("--prompt", "a red star AND a heart --d 1" if files is MAP else "a red star --d 1", *SIZE)
    first = generate(SHAPES, *line, *files, *said)
    assert first.status == 0, first.stderr
    again = redraw(SHAPES, tmp_path / "out", *files)
    assert again.status == 0, again.stderr
    assert "not taken over" not in again.stderr
    assert same(first.pictures, again.pictures)
    assert not same(first.pictures, generate(SHAPES, *line, *files, *said[: 4 * (said[:4] == HIGHRES)]).pictures)


def test_what_was_said_of_other_control_nets(generate, redraw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("source.png")
    generate(SHAPES, "--prompt", "a star --d 1", *NETS, "--control_net_weights", 0.5, 0.25)
    one = redraw(SHAPES, tmp_path / "out", *NETS[:2], "--guide_image_path", "source.png", "--dry_run")
    assert one.status == 0, one.stderr
    assert "--control_net_weights 0.5 0.25, as other ControlNets have it" in one.stderr
    shutil.copy(NETS[1], "another.safetensors")
    others = (NETS[0], NETS[1], "another.safetensors", *NETS[3:])
    assert "0.25, as other ControlNets have it" in redraw(SHAPES, tmp_path / "out", *others, "--dry_run").stderr
    own = redraw(SHAPES, tmp_path / "out", *NETS, "--control_net_weights", 1, "--dry_run")
    assert "not taken over" not in own.stderr


@pytest.mark.parametrize("guide", ["a, b; c.png", "a"])
def test_names_of_control_nets_with_commas(generate, redraw, tmp_path, monkeypatch, guide):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save(guide, format="png")
    for name in ("edges, soft; v1", "depth, v2"):
        shutil.copy(NETS[1], f"{name}.safetensors")
    nets = ("--control_net_models", "edges, soft; v1.safetensors", "depth, v2.safetensors")
    nets += ("--guide_image_path", guide, guide)
    how = ("--control_net_weights", 0.5, 0.25, "--control_net_preps", "none", "canny_100_200")
    first = generate(SHAPES, "--prompt", "a star --d 1", *nets, *how)
    assert first.status == 0, first.stderr
    again = redraw(SHAPES, tmp_path / "out", *nets)
    assert "not taken over" not in again.stderr
    assert same(first.pictures, again.pictures)
    plain = redraw(SHAPES, tmp_path / "out", "--dry_run")
    assert "ControlNet edges, soft; v1: give --control_net_models" in plain.stderr


def test_pictures_that_were_drawn_over_one(sd1, generate, redraw, tmp_path):
    Image.effect_noise((80, 72), 90).convert("RGB").save(tmp_path / "source.png")
    first = generate(sd1.folder, "--prompt", "a --d 3 --t 0.5 --s 4", "--image_path", tmp_path / "source.png")
    again = redraw(sd1.folder, tmp_path / "out", "--image_path", tmp_path / "source.png")
    assert same(first.pictures, again.pictures)
    without = redraw(sd1.folder, tmp_path / "out", "--dry_run")
    assert without.status == 0
    assert "picture source.png: give --image_path" in without.stderr


def test_several_pictures_of_each(sd1, generate, redraw, tmp_path):
    first = generate(sd1.folder, "--prompt", "a --d 3")
    more = redraw(sd1.folder, first.files[0], "--images_per_prompt", 3, "--dry_run", "--json")
    seeds = [json.loads(line)["seed"] for line in more.stdout.splitlines()]
    assert seeds[0] == 3
    assert len(set(seeds)) == 3


def test_pictures_that_differ_in_what_a_run_has_once(sd1, generate, redraw, tmp_path):
    generate(sd1.folder, "--prompt", "a", "--clip_skip", 2, "--file_name", "skip")
    generate(sd1.folder, "--prompt", "a", "--file_name", "plain")
    refused = redraw(sd1.folder, tmp_path / "out")
    assert refused.status == 2
    assert "1 without --clip_skip" in refused.stderr
    assert f"1 with --clip_skip 2 ({tmp_path / 'out/skip.png'})" in refused.stderr
    assert "or give --clip_skip" in refused.stderr
    assert redraw(sd1.folder, tmp_path / "out", "--clip_skip", 1, "--dry_run").status == 0


def test_a_run_of_pictures_goes_on(sd1, generate, redraw, tmp_path):
    first = generate(sd1.folder, "--prompt", "a --d 3")
    options = (tmp_path / "out", "--resume")
    begun = redraw(sd1.folder, *options)
    assert len(begun.files) == 1
    assert not redraw(sd1.folder, *options).files
    info = PngInfo()
    for name, text in Image.open(first.files[0]).info.items():
        info.add_text(name, "4" if name == "seed" else text)
    Image.open(first.files[0]).save(first.files[0], pnginfo=info)
    changed = redraw(sd1.folder, *options)
    assert (changed.status, "is changed or gone" in changed.stderr) == (2, True)


def test_refusals(sd1, generate, redraw, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    refused = redraw(sd1.folder, tmp_path / "x.png", "--prompt", "a")
    assert "are two sources of prompts" in refused.stderr
    info = PngInfo()
    info.add_text("parameters", "a\nSteps: 2, Sampler: Frobnicate, Seed: 1, Size: 64x64")
    Image.new("RGB", (64, 64)).save(tmp_path / "y.png", pnginfo=info)
    unknown = redraw(sd1.folder, tmp_path / "y.png")
    assert unknown.status == 2
    assert "sampler 'Frobnicate': there is none like it here; give --sampler" in unknown.stderr
    assert redraw(sd1.folder, tmp_path / "y.png", "--sampler", "lms", "--dry_run").status == 0
    assert "no such file or folder" in redraw(sd1.folder, tmp_path / "z.png").stderr
