"""Options from TOML files, the settings a run leaves, and the habits of a shell."""

import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import pictures_in
from PIL import Image
from safetensors.torch import save_file

import gen_img_diffusers
from library.plan.config import settings_toml, with_config
from library.plan.picture_facts import plain
from library.settings.options import PICTURE
from library.settings.samplers import SAMPLERS
from library.settings.sizes import ToldSizes
from library.version import VERSION
from networks.strengths import Strength


@pytest.fixture
def config(tmp_path: Path):
    """Writes a file of options and gives its path."""

    def write(text: str) -> Path:
        file = tmp_path / "options.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def parsed(*argv: object):
    parser = gen_img_diffusers.make_parser()
    return parser.parse(with_config([str(each) for each in argv], parser))


def test_options_come_from_the_file_and_flags_win(config):
    file = config('ckpt = "m"\nsteps = 20\nscale = 3.5\nbf16 = true\nv2 = false\nprompt = "--d is said -- here"\n')
    options = parsed("--config", file, "--steps", 7)
    assert (options.ckpt, options.steps, options.scale, options.bf16, options.v2) == ("m", 7, 3.5, True, False)
    assert options.prompt == "--d is said -- here"
    assert parsed("--steps=7", "--config", file).steps == 7


def test_lists_are_several_values(config):
    file = config('ckpt = "m"\nnetwork_module = ["networks.lora", "networks.lora"]\nnetwork_mul = [0.5, 1]\n')
    options = parsed("--config", file)
    assert options.network_module == ["networks.lora"] * 2
    assert options.network_mul == [Strength.of(0.5), Strength.of(1)]
    assert parsed("--config", file, "--network_mul", 2).network_mul == [Strength.of(2)]


def test_a_flag_takes_the_place_of_the_files_other_one(config):
    file = config('ckpt = "m"\nfrom_file = "x"\nfp16 = true\nsequential_file_name = true\n')
    options = parsed("--config", file, "--prompt", "a", "--bf16", "--use_original_file_name")
    assert (options.from_file, options.prompt, options.fp16, options.bf16) == (None, "a", False, True)
    assert not options.sequential_file_name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps = 3", "'stps' is no option; did you mean steps?"),
        ("config = 'x'", "'config' is no option"),
        ("help = true", "'help' is no option"),
        ("steps = ", "(line 1, column 9): is no TOML (Invalid value); write lines like steps = 20"),
        (
            "W = 64\nsampler = euler_a  # fast",
            "(line 2, column 11): is no TOML (Invalid value); texts stand in quotes: sampler = 'euler_a'\n",
        ),
        ("W = 64\n\nstps = 3", "(line 3): 'stps' is no option"),
        ("W = 64\nsampler = 'eulr'", "(line 2): --sampler eulr: no such sampler"),
        ("steps = [3, 4]", "steps = [3, 4]: takes one value"),
        ("steps = true", "steps = True: takes a text or a number"),
        ("steps = {a = 1}", "takes a text or a number"),
        ("bf16 = 1", "bf16 = 1: is on or off; write true or false"),
        ("steps = 0", "--steps 0: out of range"),
        ("sampler = 'eulr'", "--sampler eulr: no such sampler; did you mean euler?"),
    ],
)
def test_faults_in_the_file(sd1, generate, config, text, message):
    result = generate(sd1.folder, "--prompt", "a", "--config", config(f"{text}\n"))
    # what the command line says anyway is not looked at, so the options under test are not on it
    if result.status == 0:
        file = config(f"{text}\n")
        result = subprocess.run(
            [sys.executable, "gen_img_diffusers.py", "--ckpt", sd1.folder, "--prompt", "a", "--config", file],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_the_file_switches_on_the_command_line_switches_off(config):
    file = config('ckpt = "m"\nprompt = "a"\nhtml = true\niter_same_seed = true\nfp16 = true\n')
    assert parsed("--config", file).html
    options = parsed("--config", file, "--no-html", "--no-iter_same_seed", "--no_fp16")
    assert not any((options.html, options.iter_same_seed, options.fp16))
    assert not {"html", "iter_same_seed", "fp16"} & options.said.keys()
    assert parsed("--config", file, "--no-html", "--html").html  # the last one counts


def test_files_that_cannot_be_read(sd1, generate, tmp_path):
    result = generate(sd1.folder, "--prompt", "a", "--config", tmp_path / "none")
    assert result.status == 2
    assert "none: cannot be read: No such file or directory; check the path" in result.stderr


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("bf16 = True", "write bf16 = true"),
        ("html = no", "write html = false"),
        ('ckpt = "C:\\models\\sd.ckpt"', "a \\ stands in single quotes: 'C:\\models'"),
        ('prompt = "a cat', "end the text with the quotes that it begins with"),
        ("steps = 4\nsteps = 5", "a name may stand there once; take the others out"),
    ],
)
def test_what_is_no_toml_is_told_how_to_be_some(sd1, generate, config, content, advice):
    result = generate(sd1.folder, "--config", config(content + "\n"))
    assert result.status == 2
    assert "is no TOML" in result.stderr and result.stderr.endswith(f"; {advice}\n")


def test_a_file_that_is_misspelt(sd1, generate, tmp_path, monkeypatch):
    """Whatever the option, the file that is meant is named."""
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "style.safetensors", "sketch.png", "run.toml"):
        (tmp_path / name).touch()
    for option, given, meant in (
        ("--from_file", "promtps.txt", "prompts.txt"),
        ("--network_weights", "stlye.safetensors", "style.safetensors"),
        ("--textual_inversion_embeddings", "styl.safetensors", "style.safetensors"),
        ("--image_path", "sketh.png", "sketch.png"),
        ("--config", "runn.toml", "run.toml"),
    ):
        prompt = [] if option == "--from_file" else ["--prompt", "a"]
        result = generate(sd1.folder, option, given, *prompt)
        assert result.status == 2
        assert result.stderr.endswith(f"; did you mean {meant}?\n"), option


def test_the_settings_of_a_run_make_it_again(sd1, generate, config, tmp_path):
    prompt = 'a "red"\\cat\t猫 --d 3 --n 1e3'
    first = generate(sd1.folder, "--prompt", prompt, "--sampler", "euler_a", "--quality", 50, "--format", "webp")
    settings = tmp_path / "out" / "settings.toml"
    assert tomllib.loads(settings.read_text())["prompt"] == prompt
    outdir = tmp_path / "again"
    assert gen_img_diffusers.main(["--config", str(settings), "--outdir", str(outdir)]) == 0
    (again,) = pictures_in(outdir)
    assert again.read_bytes() == first.files[0].read_bytes()
    # other settings are kept beside them, the same ones once
    for steps in (2, 2, 3):
        generate(
            sd1.folder,
            "--prompt",
            prompt,
            "--sampler",
            "euler_a",
            "--quality",
            50,
            "--format",
            "webp",
            "--steps",
            steps,
        )
    assert len(list((tmp_path / "out").glob("settings*.toml"))) == 2


@pytest.mark.parametrize(
    "value",
    ["1", "01", "1.0", "1.50", "-3", "1e3", "nan", "", "a\nb", 'q"\\', "\x7f", "é猫🐈", "--x", "true", "1_000", "."],
)
def test_values_read_back_as_they_were_written(config, value):
    parser = gen_img_diffusers.make_parser()
    said = parser.said([f"--prompt={value}", "--bf16", "--network_weights", "a", "b 1"])
    assert said == {"prompt": value, "bf16": True, "network_weights": ["a", "b 1"]}
    file = config(settings_toml(said))
    again = parser.said(with_config(["--config", str(file)], parser))
    assert again == said | {"config": str(file)}


# ---------------------------------------------------------------------------------------------------------------------
# Shell


def run(*argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "gen_img_diffusers.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_version_samplers_and_help():
    assert run("--version").stdout == f"gen_img_diffusers.py {VERSION}\n"
    assert tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"] == VERSION
    names = [line.split() for line in run("--list_samplers").stdout.splitlines()]
    assert [first for first, *_ in names] == list(SAMPLERS)
    assert ["euler_a", "k_euler_a", "(Euler", "a):", "own,", "linspace,", "leading,", "trailing"] in names
    text = run("--help").stdout
    for heading in ("model:", "prompts:", "output:", "the run:", "memory and speed:", "examples:"):
        assert heading in text.splitlines()


def test_the_examples_of_the_help_parse():
    import shlex

    examples = gen_img_diffusers._EXAMPLES.splitlines()[1:]
    parser = gen_img_diffusers.make_parser()
    for example in examples:
        argv = shlex.split(example.partition("gen_img_diffusers.py")[2])
        if "--config" not in argv:
            parser.parse(argv)


def test_objects_for_scripts(sd1, generate):
    result = generate(sd1.folder, "--prompt", "a cat --n dog --d 4,5", "--images_per_prompt", 2, "--json")
    pictures = [json.loads(line) for line in result.stdout.splitlines()]
    assert [picture["file"] for picture in pictures] == [str(file) for file in result.files]
    assert [(picture["prompt"], picture["negative_prompt"], picture["seed"]) for picture in pictures] == [
        ("a cat", "dog", 4),
        ("a cat", "dog", 5),
    ]


def documented() -> set[str]:
    """The names that the table of JSON in docs/files.md has."""
    table = (
        (Path(gen_img_diffusers.__file__).parent / "docs" / "files.md")
        .read_text(encoding="utf-8")
        .partition("## JSON\n")[2]
        .partition("\n## ")[0]
    )
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall("`(\\w+)`", row)}


def objects(result) -> list[dict]:
    assert result.status == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


# How the objects tell of each option that changes how a picture looks
TOLD_AS = {
    **{"v2": "family", "v_parameterization": "prediction_type", "vae": "vae", "clip_skip": "clip_skip"},
    **{"max_embeddings_multiples": "max_embeddings_multiples", "W": "width", "H": "height", "steps": "steps"},
    **{"scale": "guidance_scale", "negative_scale": "negative_scale", "sampler": "sampler", "strength": "strength"},
    **{"guidance_start": "guidance_start", "guidance_end": "guidance_end", "format": "format", "quality": "quality"},
    **{"fp16": "precision", "bf16": "precision", "keep_unmasked": "keep_unmasked"},
    **{name: name for name in ("zero_terminal_snr", "emb_normalize_mode", "zero_empty_negative", "guidance_rescale")},
    **{name: name for name in ("schedule", "timesteps", "eta", "s_churn", "prompt_syntax", "tile", "tile_overlap")},
    **{name: name for name in ("mask_from_alpha", "mask_invert", "mask_blur", "fill", "extend")},
    **{name: name for name in ("inpaint_area", "inpaint_padding", "inpaint_regions", "negative_prompt")},
    **{"no_half_vae": "vae_in_float32", "image_guidance": "image_guidance"},
    **dict.fromkeys(ToldSizes.__dataclass_fields__, "sizes"),
    **{"network_regional_mask_max_color_codes": "color_codes", "network_pre_calc": "network_pre_calc"},
    **{
        f"network_{name}": "networks" for name in ("module", "weights", "mul", "args", "merge", "merge_n_models", "dir")
    },
    **{
        "textual_inversion_embeddings": "embeddings",
        "XTI_embeddings": "embeddings",
        "guide_image_path": "control_nets",
    },
    **{f"control_net_{name}": "control_nets" for name in ("models", "lllite_models", "types", "preps")},
    **{f"control_net_{name}": "control_nets" for name in ("weights", "starts", "ratios")},
    **{"control_net_together": "control_net_together", "highres_fix_disable_control_net": "highres"},
    **{
        f"highres_fix_{name}": "highres"
        for name in ("scale", "steps", "latents_upscaling", "upscaler", "upscaler_args")
    },
    **{"highres_fix_save_1st": "first_stage", "upscale": "upscale"},
    **{f"clip_{name}": "loss_guidance" for name in ("guidance_scale", "image_guidance_scale", "model")},
    **{f"vgg16_{name}": "loss_guidance" for name in ("guidance_scale", "guidance_layer", "model")},
}
NOT_TOLD = {"allow_large_pictures"}  # which is a permission


def test_objects_tell_of_every_option_that_changes_pictures():
    told = set(TOLD_AS) | NOT_TOLD
    for name, option in gen_img_diffusers.make_parser().table.items():
        if option.use is PICTURE and not name.startswith(
            ("gradual_latent_", "ds_")
        ):  # objects with all of their fields
            assert name in told, f"{name}: tell of it in plan/picture_facts.py, docs/files.md, and here"
    assert set(TOLD_AS.values()) <= documented()


def test_objects_have_the_documented_names(sd1, generate, tmp_path):
    """The same in a plan and in the run, whatever is drawn; a new field of jobs turns up by itself."""
    highres = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 3, "--W", 128, "--H", 128)
    common = ("--seed", 1, "--sequential_file_name", "--prompt", "a (cat:1.2) --n dog", "--json")
    for options in ((), (*highres, "--highres_fix_save_1st")):
        (planned,) = objects(generate(sd1.folder, *common, *options, "--dry_run"))
        *first, made = objects(generate(sd1.folder, *common, *options))
        assert set(planned) == documented()
        assert planned == made | {"batch": 1, "done": False}
        assert len(first) == bool(options)
        for each in first:
            assert (each["first_stage"], each["highres"], each["strength"]) == (True, None, None)
            assert (each["width"], each["steps"], each["seed"]) == (64, 3, 1)
    assert made["highres"] == {
        "width": 64, "height": 64, "scale": 0.5, "steps": 3, "enlarge_latents": False, "upscaler": None,
        "control_net": True,
    }  # fmt: skip


def test_objects_tell_values_as_they_are(sd1, generate, tmp_path):
    key = "lora_unet_mid_block_attentions_0_proj_in"
    lora = {f"{key}.lora_down.weight": torch.ones(1, 64, 1, 1), f"{key}.lora_up.weight": torch.ones(64, 1, 1, 1)}
    for name in ("a", "b"):
        save_file(lora, tmp_path / f"{name}.safetensors")
    save_file({"emb_params": torch.ones(2, 64)}, tmp_path / "zorb.safetensors")
    Image.new("RGB", (64, 64)).save(tmp_path / "source.png")
    line = "a zorb --n x --l 3 --nl 2 --am 0.25 --glt 700 --glus 3,0.5,0.5,0 --dsd1 2"
    networks = [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
    options = [
        *("--prompt", line, "--seed", 7, "--sampler", "k_euler_a", "--bf16", "--clip_skip", 2, "--steps", 30),
        *("--network_module", "networks.lora", "networks.lora", "--network_weights", *networks),
        *("--network_mul", 0.5, 2, "--network_merge_n_models", 1, "--vae", sd1.safetensors),
        *("--textual_inversion_embeddings", tmp_path / "zorb.safetensors", "--W", 128, "--H", 128),
        *("--image_path", tmp_path / "source.png", "--mask_path", tmp_path / "source.png", "--strength", 1),
        *("--format", "jpg", "--quality", 80),
    ]
    (told,) = objects(generate(sd1.folder, *options, "--dry_run", "--json"))
    spec = {"module": "networks.lora", "arguments": {}}
    expected = {
        "format_version": 1, "prompt": "a zorb", "negative_prompt": "x", "raw_prompt": line, "where": "", "seed": 7,
        "width": 128, "height": 128, "steps": 30, "guidance_scale": 3, "negative_scale": 2, "strength": 1,
        "sampler": "euler_a", "precision": "bf16", "clip_skip": 2, "model": "sd1", "vae": str(sd1.safetensors),
        "source": str(tmp_path / "source.png"), "mask": str(tmp_path / "source.png"), "regions": None,
        "networks": [
            {"name": "a", "file": str(tmp_path / "a.safetensors"), "multiplier": 0.5, "merged": True} | spec,
            {"name": "b", "file": str(tmp_path / "b.safetensors"), "multiplier": 0.25, "merged": False} | spec,
        ],
        "embeddings": [{"word": "zorb", "tokens": 2, "xti": False}],
        "gradual_latent": {
            "timesteps": 700, "ratio": 0.5, "ratio_step": 0.125, "every_n_steps": 3, "s_noise": 1,
            "unsharp": {"kernel_size": 3, "sigma": 0.5, "strength": 0.5, "on_sample": False},
        },
        "deep_shrink": {"depth_1": 2, "timesteps_1": 650, "depth_2": None, "timesteps_2": 650, "ratio": 0.5},
        "control_nets": [], "highres": None, "loss_guidance": None, "format": "jpg", "quality": 80,
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected


def test_what_has_no_plain_form_is_not_told_in_pythons_writing():
    with pytest.raises(TypeError, match="complex has no form in JSON"):
        plain({"x": [1, (2, 3j)]})


def test_a_dry_run_makes_nothing(sd1, generate, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a cat\na dog --w 72\na bird --s 5\na bee\n")
    options = ("--from_file", file, "--batch_size", 2, "--seed", 3, "--sequential_file_name")
    planned = generate(sd1.folder, *options, "--dry_run")
    assert (planned.status, (tmp_path / "out").exists()) == (0, False)
    assert "4 pictures to make" in planned.stderr
    assert "3 batches, 67% of their places filled" in planned.stderr
    lines = planned.stdout.splitlines()
    assert lines[0].split() == ["file", "size", "steps", "scale", "batch", "prompt"]
    assert lines[2].split()[:5] == ["im_000002.png", "72x64", "2", "7.5", "2"]
    objects = [json.loads(line) for line in generate(sd1.folder, *options, "--dry_run", "--json").stdout.splitlines()]
    assert [each["batch"] for each in objects] == [1, 2, 3, 1]
    made = generate(sd1.folder, *options)
    assert [each["file"] for each in objects] == [str(file) for file in made.files]
    done = generate(sd1.folder, *options, "--resume", "--dry_run", "--json")
    assert all(json.loads(line)["done"] for line in done.stdout.splitlines())


def test_how_much_is_said(sd1, generate):
    assert generate(sd1.folder, "--prompt", "a", "--quiet").stderr == ""
    assert "warning: --fp16" in generate(sd1.folder, "--prompt", "a", "--quiet", "--fp16").stderr
    plain = generate(sd1.folder, "--prompt", "a").stderr
    assert "1 picture made" in plain
    assert "drawing on cpu" not in plain
    assert "drawing on cpu" in generate(sd1.folder, "--prompt", "a", "--verbose").stderr


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_go_to_terminals_only(environment, coloured):
    ours, theirs = pty.openpty()
    command = [sys.executable, "gen_img_diffusers.py", "--ckpt", "x", "--prompt", "a", "--W", "5"]
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    subprocess.run(command, stderr=theirs, env=inherited | environment)
    os.close(theirs)
    text = os.read(ours, 10_000).decode()
    os.close(ours)
    assert ("\x1b[" in text) == coloured
    assert "--W 5" in text
