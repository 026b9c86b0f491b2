"""What the metadata of other programs' pictures means here, and that nothing in it ends in a traceback."""

import json
import logging
import struct
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import gen_img_diffusers
from library.errors import InputError
from library.plan.redrawing import redrawn
from library.recipes.own import read_own
from library.settings.options import Options
from tests import recipe_samples, recipe_samples_more
from tests.recipe_samples import Sample, basic_graph, node


def write(path: Path, texts: dict[str, str], size: tuple[int, int] = (64, 64)) -> Path:
    """A PNG with texts."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", size).save(path, pnginfo=info)
    return path


def drawn(*paths: Path, options: tuple[object, ...] = ()) -> tuple[Options, list[str]]:
    """The options and the prompt lines that pictures come to."""
    argv = ["--ckpt", "m", "--from_pictures", *map(str, paths), *map(str, options)]
    options_with, lines = redrawn(gen_img_diffusers.make_parser().parse(argv))
    return options_with, [line.text for line in lines]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture):
    """What is warned of."""
    caplog.set_level(logging.WARNING)
    return lambda: " | ".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("sample", recipe_samples_more.ALL, ids=lambda sample: sample.name)
def test_metadata_of_other_programs(tmp_path, told, sample: Sample):
    options, lines = drawn(write(tmp_path / "x.png", sample.texts, sample.size))
    assert lines == [sample.line]
    assert {name: getattr(options, name) for name in sample.run} == sample.run
    for what in sample.untold:
        assert what in told()
    if not sample.untold:
        assert "not taken over" not in told()


def test_each_program_has_four_samples():
    names = ("SD_SCRIPTS", "WEB_UI", "COMFYUI", "INVOKEAI", "FOOOCUS", "SWARMUI", "NOVELAI", "DRAW_THINGS")
    assert [len(getattr(recipe_samples, name)) for name in names] == [4] * 8
    assert (len(recipe_samples_more.FORGE), len(recipe_samples_more.OWN)) == (4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Whatever stands in metadata


SAMPLER = basic_graph()["3"]["inputs"]
CIRCLE = basic_graph(
    n6=node("ConditioningConcat", conditioning_to=["6", 0], conditioning_from=["10", 0]),
    n10=node("CLIPTextEncode", text=["11", 0], clip=["12", 0]),
    n11=node("StringConcatenate", string_a=["11", 0], string_b="a hill"),
    n12=node("CLIPSetLastLayer", clip=["12", 0], stop_at_clip_layer=-1),
    n4=node("LoraLoader", model=["4", 0], lora_name="round", strength_model=1, strength_clip=1),
    n5=node("LatentUpscaleBy", samples=["5", 0], scale_by=1.5),
)
DEEP = basic_graph(
    n6=node("ConditioningSetArea", conditioning=["100", 0]),
    **{f"n{100 + i}": node("ConditioningSetArea", conditioning=[str(101 + i), 0]) for i in range(5000)},
)
ODD = basic_graph(
    n3=node("KSampler", **SAMPLER | {"seed": "17", "steps": "9", "cfg": float("nan"), "sampler_name": None}),
    n5=node("EmptyLatentImage", width="512", height=1e400, batch_size=[["x"]]),
    n6=node("CLIPTextEncode", text=5, clip={"a": 1}),
    n7=node("CLIPTextEncode", text=["99", 0], clip=["4", "1"]),
)


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        ({"prompt": json.dumps(CIRCLE)}, "--n text, watermark --s 20 --l 8 --d 156680208700286 --w 64"),
        ({"prompt": json.dumps(DEEP)}, "--n text, watermark --s 20"),
        ({"prompt": json.dumps(ODD)}, "5 --s 9 --d 17 --w 64 --h 64"),
        ({"parameters": '{"sui_image_params": {"prompt": ["a"], "seed": {}, "steps": -5, "width": 1e9}}'}, None),
        ({"parameters": '{"sui_image_params": {"prompt": "a", "seed": NaN, "steps": "many", "width": 0}}'}, "a --w 64"),
        (
            {"parameters": "a\nSteps: 0, Sampler: Euler, CFG scale: -3, Seed: -1, Size: 9x9999999"},
            "a --d -1 --w 64 --h 64 --sampler euler",
        ),
        (
            {"parameters": "a\nSteps: 2, Seed: " + "9" * 5000 + ", Size: 4x4, Hires upscale: 1e99"},
            "a --s 2 --w 8 --h 8",
        ),
        (
            {"prompt": "a", "seed": "x", "sampler": "ddim", "steps": "", "scale": "inf"},
            "a --w 64 --h 64 --sampler ddim",
        ),
        ({"parameters": '{"sui_image_params": {"prompt": "a\\ud800\\u0000b", "steps": 0}}'}, "a�b --w 64"),
        ({"Dream": "\"a ' -s"}, None),
        ({"invokeai_metadata": '{"positive_prompt": "((((a+++", "loras": [1, {}], "model": 5}'}, "(a:1.331) --w 64"),
        ({"Comment": '{"prompt": "]]]{a::2::b::", "uc": 3, "signed_hash": ""}', "Software": "NovelAI"}, None),
    ],
)
def test_odd_values_are_named_or_refused(tmp_path, told, texts, line):
    path = write(tmp_path / "x.png", texts)
    try:
        lines = drawn(path)[1]
    except InputError as problem:
        assert str(path) in str(problem)
    else:
        assert line is None or line in lines[0]
        assert line is None or "not taken over" in told() or "invokeai_metadata" in texts


@pytest.mark.parametrize(
    "text, names, run",
    [
        (
            "u, v, anime_lineart, weight 0.5, steps 0 to 0.5, canny 63 191, guide v1.5; x.png; "
            "b; c, weight 1, steps 0.2 to 1, guide g",
            ("u, v", "b; c"),
            {
                **{"control_net_types": "anime_lineart none", "control_net_weights": "0.5 1"},
                **{"control_net_starts": "0 0.2", "control_net_ratios": "0.5 1"},
                "control_net_preps": "canny_63_191 none",
            },
        ),
        ("cut, weight 0.5; short", ("cut", "short"), {}),
        (", weight 1, steps 0 to 1, guide ; ", (), {}),
    ],
)
def test_what_this_program_tells_of_control_nets(text, names, run):
    recipe = read_own({"prompt": "a", "parameters": f'a\nSteps: 1, ControlNet: "{text}"'})
    assert recipe.control_nets == names
    assert {name: value for name, value in recipe.run.items() if name.startswith("control_net")} == run


@pytest.mark.parametrize("sample", recipe_samples_more.ALL, ids=lambda sample: sample.name)
def test_metadata_that_was_cut_short(tmp_path, sample: Sample):
    """Each is read as far as it goes, or refused by name."""
    for share in (0.1, 0.35, 0.6, 0.85, 0.99):
        texts = {name: text[: int(len(text) * share)] for name, text in sample.texts.items()}
        path = write(tmp_path / "x.png", texts)
        try:
            drawn(path)
        except InputError as problem:
            assert str(problem).startswith(f"--from_pictures {path}: ")


def test_huge_texts_are_passed_over(tmp_path):
    path = write(tmp_path / "x.png", {"parameters": "a " * 3_000_000})
    with pytest.raises(InputError, match="has metadata of more than 4,194,304 characters"):
        drawn(path)
    nested = write(tmp_path / "y.png", {"prompt": '{"3": {"class_type": "x", "inputs": ' + "[" * 100_000})
    with pytest.raises(InputError, match="damaged|deep"):
        drawn(nested)


def test_of_samplers_in_a_graph_the_saved_one_counts(tmp_path, told):
    graph = basic_graph(
        n20=node("KSampler", **SAMPLER | {"seed": 5, "steps": 4}),
        n21=node("PreviewImage", images=["22", 0]),
        n22=node("VAEDecode", samples=["20", 0]),
    )
    (line,) = drawn(write(tmp_path / "x.png", {"prompt": json.dumps(graph)}))[1]
    assert "--s 20" in line
    assert "--d 156680208700286" in line
    assert "the samplers before or beside it (node 20)" in told()


LOADED = {"ckpt_name": "m.ckpt", "clip_skip": -2, "lora_name": "None", "positive": "a (bell)", "negative": "rust"}
LOADED |= {"empty_latent_width": 384, "empty_latent_height": 256, "batch_size": 1}
OTHER_GRAPHS = {
    "two pictures saved, of which one is a stage of the other": (
        basic_graph(
            n10=node("LatentUpscale", samples=["3", 0], width=768, height=0),
            n11=node("KSampler", **SAMPLER | {"seed": 6, "denoise": 0.4, "latent_image": ["10", 0]}),
            n12=node("VAEDecode", samples=["11", 0]),
            n13=node("SaveImage", images=["12", 0]),
        ),
        "--s 20 --l 8 --t 0.4 --d 6 --w 768 --h 672",
        "seed 156680208700286",
    ),
    "a refiner that ends what the base began": (
        basic_graph(
            n10=node(
                "KSamplerAdvanced",
                **{**SAMPLER, "add_noise": "disable", "noise_seed": 0, "start_at_step": 16, "latent_image": ["3", 0]},
            ),
            n8=node("VAEDecode", samples=["10", 0]),
        ),
        "--d 156680208700286 --w 512 --h 448",
        "the refining sampler (node 10)",
    ),
    "a face that is drawn over": (
        basic_graph(
            n10=node("FaceDetailer", image=["8", 0], **SAMPLER | {"seed": 1, "steps": 3}),
            n9=node("SaveImage", images=["10", 0]),
        ),
        "--s 20 --l 8 --d 156680208700286",
        "FaceDetailer (node 10)",
    ),
    "a loader that holds texts and sizes": (
        {
            "1": node("Efficient Loader", **LOADED),
            "2": node(
                "KSampler (Efficient)",
                **SAMPLER | {"model": ["1", 0], "positive": ["1", 1], "negative": ["1", 2], "latent_image": ["1", 3]},
            ),
            "3": node("SaveImage", images=["2", 5]),
        },
        "a (bell) --n rust --s 20 --l 8 --d 156680208700286 --w 384 --h 256",
        "",
    ),
    "XL's two texts and sizes": (
        basic_graph(
            n6=node(
                "CLIPTextEncodeSDXL",
                **{"text_g": "a bell", "text_l": "brass", "width": 2048, "height": 1024, "crop_w": 8, "crop_h": 0},
            )
        ),
        "a bell, brass --n text, watermark --s 20 --l 8 --d 156680208700286 --w 512 --h 448 --sampler euler --ow 2048 "
        "--oh 1024 --cl 8",
        "a text of its own for each encoder",
    ),
    "latents enlarged by a node of a package": (
        basic_graph(
            n10=node("NNLatentUpscale", latent=["3", 0], version="SD 1.x", upscale=1.5),
            n11=node("KSampler", **SAMPLER | {"seed": 6, "denoise": 0.4, "latent_image": ["10", 0]}),
            n8=node("VAEDecode", samples=["11", 0]),
        ),
        "--s 20 --l 8 --t 0.4 --d 6 --w 768 --h 672",
        "the first sampler's seed 156680208700286",
    ),
    "a guider that is not known": (
        basic_graph(
            n3=node("SamplerCustomAdvanced", noise=["10", 0], guider=["11", 0], sampler=["12", 0], sigmas=["13", 0]),
            n10=node("RandomNoise", noise_seed=["14", 0]),
            n11=node("PerpNegGuider", model=["4", 0], positive=["6", 0], negative=["7", 0], cfg=5),
            n12=node("KSamplerSelect", sampler_name="dpmpp_2m_sde_gpu"),
            n13=node("BasicScheduler", model=["4", 0], scheduler="beta", steps=12, denoise=1),
            n14=node("PrimitiveInt", value=44),
        ),
        "--s 12 --l 5 --d 44 --w 64 --h 64 --sampler dpmsolver++_sde --schedule beta",
        "PerpNegGuider (node 11)",
    ),
    "networks' names that come from elsewhere": (
        basic_graph(
            n4=node("LoraLoader|pysssss", model=["10", 0], lora_name={"content": "a\\ink.safetensors", "image": None}),
            n10=node("LoraLoader", model=["11", 0], lora_name=["12", 0], strength_model=0.5),
            n11=node("CheckpointLoader|pysssss", ckpt_name={"content": "m.safetensors", "image": None}),
            n12=node("PrimitiveString", value="tin.safetensors"),
        ),
        "a green",
        "network tin (give --network_dir) (",
    ),
    "a picture that is gone on with from a step": (
        basic_graph(
            n3=node("KSamplerAdvanced", **SAMPLER | {"noise_seed": 5, "start_at_step": 8, "latent_image": ["10", 0]}),
            n10=node("VAEEncode", pixels=["11", 0], vae=["4", 2]),
            n11=node("LoadImage", image="valley.png"),
        ),
        "--s 20 --l 8 ",
        "picture valley.png that it was drawn over",
    ),
    "several networks in one node": (
        basic_graph(
            n4=node(
                "Power Lora Loader (rgthree)",
                **{"lora_1": {"on": True, "lora": "one.safetensors", "strength": 0.5}, "model": ["10", 0]},
                **{"lora_2": {"on": False, "lora": "two.safetensors", "strength": 1}},
            ),
            n10=node("CheckpointLoaderSimple", ckpt_name="m.safetensors"),
        ),
        "a green",
        "network one (give --network_dir)",
    ),
}


@pytest.mark.parametrize("name", OTHER_GRAPHS)
def test_graphs(tmp_path, told, name):
    graph, line, untold = OTHER_GRAPHS[name]
    lines = drawn(write(tmp_path / "x.png", {"prompt": json.dumps(graph)}))[1]
    assert line in lines[0]
    assert untold in told()
    assert "network two" not in told()


def test_the_nearest_layer_of_a_graph_counts_the_last_one_too(tmp_path):
    """XL's usual layer is another."""
    layers = {
        "n12": node("CLIPSetLastLayer", stop_at_clip_layer=-1, clip=["13", 0]),
        "n13": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["4", 1]),
    }
    graph = basic_graph(n6=node("CLIPTextEncode", text="a", clip=["12", 0]), **layers)
    options, _ = drawn(write(tmp_path / "a.png", {"prompt": json.dumps(graph)}))
    assert options.clip_skip == 1


def test_networks_are_looked_for(tmp_path, told):
    for name in ("ink", "foxTail"):
        (tmp_path / f"{name}.safetensors").touch()
    custom = next(sample for sample in recipe_samples.COMFYUI if sample.name == "comfyui-custom")
    tagged = next(sample for sample in recipe_samples.WEB_UI if sample.name == "web-ui-lora")
    of = ("--network_dir", tmp_path)
    (line,) = drawn(write(tmp_path / "x.png", custom.texts), options=of)[1]
    assert line.startswith("a paper boat, on a pond <lora:ink:0.8/0.6> --n blur ")
    (line,) = drawn(write(tmp_path / "y.png", tagged.texts), options=of)[1]
    assert line.startswith("a fox, <lora:foxTail:0.5:0.7> --s 30 ")
    assert "network inkBrush (not in --network_dir)" in told()
    given = ("--network_weights", tmp_path / "other.safetensors", tmp_path / "INK.safetensors", "--network_mul", 0.3)
    (line,) = drawn(tmp_path / "x.png", options=given)[1]
    assert "<lora" not in line
    assert line.endswith("--am 0.3,0.8/0.6") is False  # --network_mul is given, and wins
    (line,) = drawn(tmp_path / "x.png", options=given[:3])[1]
    assert line.endswith("--am 1,0.8/0.6")


def test_tags_that_cannot_stay(tmp_path, told):
    (tmp_path / "ink.safetensors").touch()
    text = "a <lora:ink:0.5> hut <lora:ink:1> <hypernet:mud:1> <lora:ink:x:y:z>\nNegative prompt: fog <lora:ink:1>"
    path = write(tmp_path / "x.png", {"parameters": f"{text}\nSteps: 2, Sampler: Euler, Seed: 1, Size: 64x64"})
    (line,) = drawn(path, options=("--network_dir", tmp_path))[1]
    assert line.startswith("a <lora:ink:0.5> hut --n fog --s 2 ")
    for what in ("a second tag of network ink", "hypernetwork mud", "network <lora:ink:…>"):
        assert what in told()


def test_pictures_without_metadata_are_counted(tmp_path):
    paths = [write(tmp_path / f"{name}.png", {}) for name in "abc"]
    with pytest.raises(InputError, match=rf"^--from_pictures {paths[0]} and 2 others: has no prompt in its metadata; "):
        drawn(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Exif


def exif_of(*tags: tuple[int, bytes], order: str, inner: bool = True) -> bytes:
    """Exif with texts, in byte order `<` or `>`; all in a directory of its own, or (`inner` off) beside one another."""
    outside = [] if inner else list(tags)
    first = _directory([*outside, (0x8769, b"")] if inner else outside, 8, order)
    if inner:
        first = _directory([*outside, (0x8769, struct.pack(f"{order}I", 8 + len(first)))], 8, order)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return b"Exif\0\0" + head + first + (_directory(list(tags), 8 + len(first), order) if inner else b"")


def _directory(entries: list[tuple[int, bytes]], offset: int, order: str) -> bytes:
    """One directory of TIFF 6.0 at an offset: bytes under tags, that of a directory as its place."""
    data, rows = b"", struct.pack(f"{order}H", len(entries))
    place = offset + 2 + 12 * len(entries) + 4
    for tag, content in sorted(entries):
        if tag == 0x8769:
            rows += struct.pack(f"{order}HHI", tag, 4, 1) + (content or bytes(4))
        else:
            rows += struct.pack(f"{order}HHII", tag, 7 if tag == 0x9286 else 2, len(content), place + len(data))
            data += content
    return rows + bytes(4) + data


WEB_UI_TEXT = "a cat, 日本\nNegative prompt: dog\nSteps: 2, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64"
FOOOCUS_TEXT = recipe_samples.FOOOCUS[0].texts["parameters"]
NOVELAI_TEXT = json.dumps(recipe_samples.novelai("{a} pond"))
COMFYUI_TEXT = json.dumps(basic_graph())


@pytest.mark.parametrize("ending", ["jpg", "webp"])
@pytest.mark.parametrize("order", "<>")
def test_exif_of_other_programs(tmp_path, order, ending):
    wide = "utf-16-le" if order == "<" else "utf-16-be"
    cases = [
        (((0x9286, b"UNICODE\0" + WEB_UI_TEXT.encode("utf-16-be")),), True, "a cat, 日本 --n dog --s 2 "),
        (((0x9286, b"UNICODE\0" + WEB_UI_TEXT.encode("utf-16-le")),), True, "a cat, 日本 --n dog --s 2 "),
        (((0x9286, b"UNICODE\0" + FOOOCUS_TEXT.encode(wide)),), True, "a coral reef --n grey --s 30 "),
        (((0x9286, FOOOCUS_TEXT.encode() + b"\0"), (0x927C, b"fooocus\0")), False, "a coral reef --n grey --s 30 "),
        (((0x9286, b"ASCII\0\0\0" + NOVELAI_TEXT.encode()),), True, "(a:1.05) pond --n "),
        (
            ((0x010F, b'workflow:{"nodes": []}\0'), (0x0110, b"prompt:" + COMFYUI_TEXT.encode() + b"\0")),
            *(False, "a green (valley:1.1) "),
        ),
    ]
    for tags, inner, line in cases:
        path = tmp_path / f"x.{ending}"
        Image.new("RGB", (64, 64)).save(path, exif=exif_of(*tags, order=order, inner=inner))
        assert drawn(path)[1][0].startswith(line)


# ---------------------------------------------------------------------------------------------------------------------
# What must not be taken for something else


@pytest.mark.parametrize(
    ("kind", "inputs", "text", "named"),
    [
        ("ImpactSwitch", {"select": 2, "input1": "a hill", "input2": ["11", 0]}, "a bay --n", ""),
        ("easy ifElse", {"boolean": False, "on_true": ["11", 0], "on_false": "a hill"}, "a hill --n", ""),
        ("Text Find and Replace", {"text": ["11", 0], "find": "bay", "replace": "sea"}, "a bay --n", "node 10"),
        ("DPRandomGenerator", {"text": "a {b|c} hat", "seed": 3}, "a {b|c} hat --n", "node 10"),
        ("SDXLPromptStyler", {"text_positive": "a bay", "text_negative": "x", "style": "base"}, "a bay --n", "node 10"),
        ("LoraTagLoader", {"text": "a bay <lora:ink:0.5>", "model": ["4", 0]}, "a bay --n", ""),
    ],
)
def test_nodes_that_make_texts(tmp_path, told, kind, inputs, text, named):
    graph = basic_graph(
        n6=node("CLIPTextEncode", text=["10", 0], clip=["4", 1]),
        n10=node(kind, **inputs),
        n11=node("PrimitiveString", value="a bay"),
    )
    (line,) = drawn(write(tmp_path / "x.png", {"prompt": json.dumps(graph)}))[1]
    assert line.startswith(text)
    assert (named in told()) if named else ("not taken over" not in told())


def test_what_is_done_after_the_sampler_is_named(tmp_path, told):
    enlarged = basic_graph(
        n9=node("SaveImage", images=["10", 0]),
        n10=node("ImageUpscaleWithModel", image=["8", 0], upscale_model=["11", 0]),
        n11=node("UpscaleModelLoader", model_name="4x.pth"),
        n3=node("KSampler (Efficient)", **SAMPLER | {"script": ["12", 0]}),
        n12=node("HighRes-Fix Script", upscale_by=1.5, hires_steps=12, denoise=0.5),
    )
    drawn(write(tmp_path / "x.png", {"prompt": json.dumps(enlarged)}))
    assert "ImageUpscaleWithModel (node 10)" in told()
    assert "HighRes-Fix Script (node 12)" in told()


@pytest.mark.parametrize(
    ("texts", "line", "named"),
    [
        (
            {"Dream": '"a <moss> (garden)1.3" -s 9 -S 4 -V 5:0.2 -W 64 -H 64 -C 7 -A k_dpmpp_2 -G 0.8'},
            "a moss (garden:1.3) --s 9 --l 7 --d 4 --w 64 --h 64 --sampler dpmsolver++",
            ("variations", "face restoration"),
        ),
        (
            {"parameters": '{"sui_image_params": {"prompt": "a <embed:x/foo.pt>, b", "seed": 1, "steps": 2}}'},
            "a foo, b --s 2 --d 1",
            (),
        ),
        (
            {"fooocus_scheme": "fooocus", "parameters": '{"prompt": "a", "seed": 1, "loras": [["None", 1, ""]]}'},
            "a --d 1 --w 64",
            (),
        ),
    ],
)
def test_smaller_things(tmp_path, told, texts, line, named):
    assert drawn(write(tmp_path / "x.png", texts))[1][0].startswith(line)
    assert all(what in told() for what in named)
    assert "network" not in told()
