"""Options from TOML files, the settings a run leaves, and the habits of a shell."""

import json
import os
import pty
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import pictures_in

import gen_img_diffusers
from library.plan.config import settings_toml, with_config
from library.settings.samplers import SAMPLERS
from library.version import VERSION


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
    assert options.network_mul == [0.5, 1]
    assert parsed("--config", file, "--network_mul", 2).network_mul == [2]


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
        ("steps = ", "is no TOML (Invalid value (at line 1, column 9))"),
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


def test_files_that_cannot_be_read(sd1, generate, tmp_path):
    result = generate(sd1.folder, "--prompt", "a", "--config", tmp_path / "none")
    assert result.status == 2
    assert "none: cannot be read: No such file or directory; check the path" in result.stderr


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
    assert ["euler_a", "k_euler_a"] in names
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
