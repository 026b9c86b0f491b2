"""Measure, with the demo model and its judge, what the program's features are for: img2img, inpainting, the ways to
larger pictures, regions, ControlNet, guidance by CLIP.

    python -m tools.demo.evaluate_pictures --model examples/shapes --seeds 50

Every picture is drawn by the program itself. Prints one line for each figure.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

import gen_img_diffusers
from library.draw.loss_guidance import load_clip
from library.draw.sources import pixels_to_tensor
from library.files.loss_guidance import find_clip
from tools.demo.judge import OBJECT_DISTANCE, judge, overlap, see_ground, see_objects
from tools.demo.render import render
from tools.demo.scenes import COLOURS, GROUND_COLOURS, LORA_STYLES, OBJECT_COLOURS, SHAPES, Scene, Thing
from tools.demo.style_judge import STYLE_JUDGES

SETTINGS = [
    "--W",
    128,
    "--H",
    128,
    "--steps",
    20,
    "--scale",
    5,
    "--batch_size",
    10,
    "--sequential_file_name",
    "--quiet",
]
CLIP_SCALE = 400
PARTS = "a red circle AND a blue square"
LARGER = {
    "plain": [],
    "Highres. fix": ["--highres_fix_scale", 0.5, "--highres_fix_steps", 20, "--strength", 0.5],
    "Gradual Latent": ["--gradual_latent_timesteps", 750, "--gradual_latent_every_n_steps", 2],
    "Deep Shrink": ["--ds_depth_1", 0],  # the demo model's features are small already further down
}


class Program:
    """Runs of the program with one model, each in a folder of its own."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self.companions = model / "companions"
        self._folder = Path(tempfile.mkdtemp())
        self._runs = 0

    def draw(self, lines: Sequence[str], *options: object) -> list[np.ndarray]:
        """Draw prompt lines; returns the pictures (H, W, 3) in their order."""
        return [np.asarray(Image.open(file).convert("RGB")) for file in self.files(lines, *options)]

    def files(self, lines: Sequence[str], *options: object) -> list[Path]:
        """As `draw`, but the files. Without lines, the prompts come from the source pictures."""
        out = self.new_folder()
        if lines:
            (out.parent / f"{out.name}.txt").write_text("\n".join(lines))
            options = ("--from_file", out.parent / f"{out.name}.txt", *options)
        argv = ["--ckpt", self._model, "--outdir", out, *SETTINGS, *options]
        status = gen_img_diffusers.main([str(argument) for argument in argv])
        if status:
            raise SystemExit(f"status {status} of {argv}")
        return sorted(out.glob("im_*.png"))

    def new_folder(self) -> Path:
        """A new, empty folder."""
        self._runs += 1
        folder = self._folder / f"{self._runs:03d}"
        folder.mkdir()
        return folder


def percent(values: Iterable[bool]) -> str:
    values = list(values)
    return f"{100 * sum(values) / len(values):.0f} % of {len(values)}"


def scenes(count: int, place: str, x: float) -> list[Scene]:
    """Rendered scenes of one flat object on a white ground."""
    rng = random.Random(f"pictures {place}")
    colours = [colour for colour in OBJECT_COLOURS if colour not in ("white", "blue")]
    things = [
        Thing(rng.choice(SHAPES), rng.choice(colours), "flat", "medium", place, x, 0.5, 0.19) for _ in range(count)
    ]
    return [Scene("white", (thing,)) for thing in things]


def render_all(program: Program, drawn: Sequence[Scene]) -> Path:
    """The scenes as pictures in a folder."""
    folder = program.new_folder()
    for number, scene in enumerate(drawn):
        Image.fromarray(render(scene)).save(folder / f"{number:03d}.png")
    return folder


def inpainting(program: Program, seeds: int) -> None:
    """A blue star into the right half: the left half stays what the VAE makes of the source."""
    sources = render_all(program, scenes(seeds, "left", 0.26))
    masks = program.new_folder()
    mask = np.zeros((128, 128), np.uint8)
    Image.fromarray(mask).save(masks / "nothing.png")
    mask[:, 64:] = 255
    Image.fromarray(mask).save(masks / "right.png")
    lines = [f"a blue star on the right, on a white background --d {seed}" for seed in range(seeds)]
    options = ("--image_path", sources, "--strength", 1)
    round_trips = program.draw(lines, *options, "--mask_path", masks / "nothing.png")
    pictures = program.draw(lines, *options, "--mask_path", masks / "right.png")
    # the last 24 columns beside the border hold what the VAE blends over it
    differences = [np.abs(a[:, :40].astype(int) - b[:, :40]).mean() for a, b in zip(pictures, round_trips, strict=True)]
    halves = [np.abs(a[:, :64].astype(int) - b[:, :64]).mean() for a, b in zip(pictures, round_trips, strict=True)]
    right_halves = [half_alone(picture, slice(64, 128)) for picture in pictures]
    stars = [("star", "blue") in [(seen.shape, seen.colour) for seen in see_objects(half, 1)] for half in right_halves]
    print(f"inpainting: blue star in the repainted half {percent(stars)}")
    print(f"inpainting: the other half differs from the round trip by {np.mean(halves):.2f} levels, at most")
    print(f"  {np.max(halves):.2f}; without the columns next to the border {np.max(differences):.2f}")


def masked_area(program: Program, seeds: int) -> None:
    """A yellow star into a canvas of 512×128 with a red circle, drawn at 128×128 and put back."""
    canvas = Image.new("RGB", (512, 128), COLOURS["blue"])
    circle = Thing("circle", "red", "flat", "large", "centre", 0.5, 0.5, 0.24)
    canvas.paste(Image.fromarray(render(Scene("blue", (circle,)))))
    mask = Image.new("L", canvas.size)
    mask.paste(255, (336, 16, 432, 112))
    folder = program.new_folder()
    canvas.save(folder / "canvas.png")
    mask.save(folder / "mask.png")
    lines = [f"a large yellow star in the centre, on a blue background --d {seed}" for seed in range(seeds)]
    options = ("--image_path", folder / "canvas.png", "--mask_path", folder / "mask.png", "--inpaint_area", "mask")
    pictures = program.draw(lines, *options)
    stars = [[(s.shape, s.colour) for s in see_objects(p[:, 320:448], 1)] == [("star", "yellow")] for p in pictures]
    outside = np.asarray(mask) == 0
    kept = [np.array_equal(picture[outside], np.asarray(canvas)[outside]) for picture in pictures]
    print(f"masked area: the star is there {percent(stars)}, nothing else has changed {percent(kept)}")


def new_borders(program: Program, seeds: int) -> None:
    """Pictures grown by half to the right: their ground goes on, and they stay what the VAE makes of them."""
    grounds = [GROUND_COLOURS[seed % len(GROUND_COLOURS)] for seed in range(seeds)]
    things = (Thing("circle", "red", "flat", "medium", "centre", 0.5, 0.5, 0.2),)
    sources = render_all(program, [Scene(ground, things) for ground in grounds])
    lines = [f"a red circle on a {ground} background --d {seed} --w 192" for seed, ground in enumerate(grounds)]
    pictures = program.draw(lines, "--image_path", sources, "--extend", "0,0,64,0")
    files = sorted(sources.glob("*.png"))
    same = [
        bool(np.linalg.norm(np.median(picture[:, 128:].reshape(-1, 3), axis=0) - COLOURS[ground]) < OBJECT_DISTANCE)
        for picture, ground in zip(pictures, grounds, strict=True)
    ]
    away = [np.abs(p[:, :120].astype(int) - np.asarray(Image.open(f))[:, :120]).mean() for p, f in zip(pictures, files)]
    print(f"new borders: the ground goes on {percent(same)}, the rest is {np.mean(away):.2f} levels from the source")


def img2img(program: Program, seeds: int) -> None:
    """Weak strength keeps the layout, full strength follows the prompt."""
    drawn = scenes(seeds, "left", 0.26)
    sources = render_all(program, drawn)
    wanted = [Scene("white", (Thing("circle", "blue", "flat", "medium", "centre", 0.5, 0.5, 0.2),))] * seeds
    lines = [f"a blue circle, on a white background --d {seed}" for seed in range(seeds)]
    kept = program.draw(lines, "--image_path", sources, "--strength", 0.3)
    print(f"img2img 0.3: the object is where it was in the source {percent(layout(kept, drawn))}")
    lines = [f"a blue circle in the centre, on a white background --d {seed}" for seed in range(seeds)]
    followed = program.draw(lines, "--image_path", sources, "--strength", 1)
    print(f"img2img 1.0: the prompt is followed {percent(judge(p, s).right for p, s in zip(followed, wanted))}")


def layout(pictures: Sequence[np.ndarray], drawn: Sequence[Scene]) -> list[bool]:
    return [bool(judge(picture, scene).places) for picture, scene in zip(pictures, drawn, strict=True)]


def larger_pictures(program: Program, seeds: int) -> None:
    """One object at twice the size the model was trained on."""
    rng = random.Random("larger")
    colours = [colour for colour in OBJECT_COLOURS if colour != "white"]
    wanted = [(rng.choice(colours), rng.choice(SHAPES)) for _ in range(seeds)]
    lines = [
        f"a {colour} {shape} in the centre, on a white background --d {seed}"
        for seed, (colour, shape) in enumerate(wanted)
    ]
    for name, options in LARGER.items():
        for sampler in ("ddim", "euler_a") if name == "plain" else ("euler_a",) if "Latent" in name else ("ddim",):
            pictures = program.draw(lines, "--W", 256, "--H", 256, "--sampler", sampler, *options)
            whole = [one_object(picture, *said) for picture, said in zip(pictures, wanted, strict=True)]
            print(f"256x256, {name} ({sampler}): exactly one object, of the right colour and shape {percent(whole)}")


def one_object(picture: np.ndarray, colour: str, shape: str) -> bool:
    """Whether a picture of 256×256 shows what is asked for, once."""
    small = np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.BOX))
    return [(seen.colour, seen.shape) for seen in see_objects(small)] == [(colour, shape)]


def remade(program: Program, seeds: int) -> None:
    """img2img without a prompt draws what the source's metadata says."""
    lines = [f"a {shape} in the centre, on a white background --n red --d {seed}"
             for seed, shape in zip(range(seeds), SHAPES * seeds)]  # fmt: skip
    first = program.files(lines)
    again = program.files([], "--image_path", first[0].parent, "--strength", 1)
    texts = [PngImageFile(file).text for file in (*first, *again)]
    same = [a["prompt"] == b["prompt"] and a["negative-prompt"] == b["negative-prompt"]
            for a, b in zip(texts[:seeds], texts[seeds:], strict=True)]  # fmt: skip
    shapes = [[s.shape for s in see_objects(np.asarray(Image.open(file)), 1)] for file in again]
    right = [seen == [shape] for seen, shape in zip(shapes, SHAPES * seeds)]
    print(f"img2img without a prompt: the source's prompts {percent(same)}, the shape they name {percent(right)}")


def halves_mask(program: Program) -> Path:
    """A mask whose red channel is the left half, the green one the right half."""
    halves = np.zeros((128, 128, 3), np.uint8)
    halves[:, :64, 0] = halves[:, 64:, 1] = 255
    mask = program.new_folder() / "halves.png"
    Image.fromarray(halves).save(mask)
    return mask


def regions(program: Program, seeds: int) -> None:
    """A red circle in the left half, a blue square in the right one, by regions and by words alone."""
    for name, prompt, options in (
        ("regions", PARTS, ("--mask_path", halves_mask(program))),
        ("words alone", "a red circle and a blue square", ()),
    ):
        pictures = program.draw([f"{prompt} --d {seed}" for seed in range(seeds)], *options)
        right = [
            {(seen.colour, seen.shape, seen.x < 0.5) for seen in see_objects(picture)}
            == {("red", "circle", True), ("blue", "square", False)}
            for picture in pictures
        ]
        print(f"{name}: the red circle is left, the blue square right {percent(right)}")


def regional_loras(program: Program, seeds: int) -> None:
    """One LoRA in each half: its style shows there and not in the other half."""
    lines = [f"{PARTS} --d {seed}" for seed in range(seeds)]
    mask = ("--mask_path", halves_mask(program))
    for styles in ((), tuple(LORA_STYLES), tuple(reversed(LORA_STYLES))):
        weights = [program.companions / f"{style}.safetensors" for style in styles]
        networks = ("--network_module", *["networks.lora"] * 2, "--network_weights", *weights) if styles else ()
        pictures = program.draw(lines, *mask, *networks)
        for half, columns in (("left", slice(64)), ("right", slice(64, 128))):
            alone = [half_alone(picture, columns) for picture in pictures]
            shown = [f"{style} {percent(judge(p) for p in alone)}" for style, judge in STYLE_JUDGES.items()]
            name = f"{styles[0]} left, {styles[1]} right" if styles else "none"
            print(f"regional LoRAs, {name}: in the {half} half {', '.join(shown)}")


def half_alone(picture: np.ndarray, columns: slice) -> np.ndarray:
    """The picture with nothing but its ground outside these columns."""
    alone = np.full_like(picture, see_ground(picture)[1])
    alone[:, columns] = picture[:, columns]
    return alone


def control_net(program: Program, seeds: int) -> None:
    """The outline of a guide picture holds, and lets go with a weight or a ratio of 0."""
    drawn = [*scenes(seeds // 2, "left", 0.3), *scenes(seeds - seeds // 2, "right", 0.7)]
    guides = render_all(program, drawn)
    outlines = [see_objects(render(scene), 1)[0].mask for scene in drawn]
    lines = [f"a {scene.things[0].colour} {scene.things[0].shape}, on a white background --d {seed}"
             for seed, scene in enumerate(drawn)]  # fmt: skip
    model = next(program.companions.glob("canny*.safetensors"))
    common = ("--control_net_models", model, "--control_net_preps", "canny", "--guide_image_path", guides)
    for name, options in (
        ("weight 1", ()),
        ("weight 0", ("--control_net_weights", 0)),
        ("ratio 0", ("--control_net_ratios", 0)),
    ):
        pictures = program.draw(lines, *common, *options)
        shares = [
            max((overlap(seen.mask, outline) for seen in see_objects(picture, 1)), default=0.0)
            for picture, outline in zip(pictures, outlines)
        ]
        print(f"ControlNet, {name}: outlines overlap by 0.6 or more {percent(share >= 0.6 for share in shares)}")


def clip_guidance(program: Program, seeds: int) -> None:
    """Guided pictures are nearer to the text, or to the guide picture, than others, as CLIP sees them."""
    clip = load_clip(*find_clip(str(program.companions / "clip")), torch.device("cpu"))
    drawn = scenes(seeds, "centre", 0.5)
    guides = render_all(program, drawn)
    texts = [f"a {scene.things[0].colour} {scene.things[0].shape}, on a white background" for scene in drawn]
    clear = [f"{text} --d {seed}" for seed, text in enumerate(texts)]
    vague = [f"on a white background --d {seed}" for seed in range(seeds)]
    by_text, by_picture = "--clip_guidance_scale", "--clip_image_guidance_scale"
    with torch.no_grad():
        said = [clip.embed_text([text]) for text in texts]
        shown = [clip.embed_goal(Image.fromarray(render(scene))) for scene in drawn]
        for name, goals, lines, guided_lines, options in (
            ("by the prompt", said, clear, clear, (by_text,)),
            ("by --c", said, vague, [f"{line} --c {text}" for line, text in zip(vague, texts)], (by_text,)),
            ("by a picture", shown, vague, vague, ("--guide_image_path", guides, by_picture)),
        ):
            guided = program.draw(guided_lines, *options, CLIP_SCALE, "--clip_model", program.companions / "clip")
            nearer = []
            for goal, *pair in zip(goals, program.draw(lines), guided):
                before, after = (clip.embed_picture(pixels_to_tensor(Image.fromarray(p))) @ goal.T for p in pair)
                nearer.append(bool(after > before))
            print(f"CLIP guidance {name}, scale {CLIP_SCALE}: nearer to the goal than without {percent(nearer)}")


MEASURES = {
    "inpainting": inpainting,
    "masked_area": masked_area,
    "new_borders": new_borders,
    "img2img": img2img,
    "larger": larger_pictures,
    "remade": remade,
    "regions": regions,
    "regional_loras": regional_loras,
    "control_net": control_net,
    "clip": clip_guidance,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--only", choices=MEASURES)
    options = parser.parse_args()
    program = Program(options.model)
    for name, measure in MEASURES.items():
        if options.only in (None, name):
            measure(program, options.seeds)


if __name__ == "__main__":
    main()
