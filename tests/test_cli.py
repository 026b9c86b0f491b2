"""The command line: what it accepts, what it refuses, and how it says so."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import types
import unicodedata
from importlib import metadata
from pathlib import Path

import pytest
import torch
from child_runs import Child, Forked
from PIL import Image
from safetensors.torch import save_file

import gen_img_diffusers
from library import console
from library.machine import devices
from library.settings.samplers import SAMPLERS

PROGRAM = [sys.executable, "gen_img_diffusers.py"]


def refuse(capfd, *argv: object) -> str:
    """The single line with which the program refuses a command line, with status 2."""
    try:
        status = gen_img_diffusers.main([str(argument) for argument in argv])
    except SystemExit as leaving:
        status = leaving.code
    captured = capfd.readouterr()
    assert status == 2
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--W", "500"], "--W 500: must be a multiple of 8; use 496 or 504"),
        (["--H", "0"], "--H 0: out of range; write a whole number from 8 to 16384"),
        (["--steps", "0"], "--steps 0: out of range; write a whole number from 1 to 1000"),
        (["--steps", "abc"], "--steps abc: not a whole number; write a whole number from 1 to 1000"),
        (["--steps", "1e9"], "--steps 1e9: not a whole number"),
        (["--steps", "9" * 5000], "not a whole number"),
        (["--scale", "nan"], "--scale nan: not a finite number"),
        (["--scale", "inf"], "--scale inf: not a finite number"),
        (["--scale", "-1"], "--scale -1: out of range; write a number not below 0"),
        (["--sampler", "eulr"], "--sampler eulr: no such sampler; did you mean euler?"),
        (["--sampler", "qqq"], "known are ddim, pndm"),
        (["--batch_size", "0"], "--batch_size 0: out of range"),
        (["--vae_batch_size", "0"], "--vae_batch_size 0: out of range"),
        (["--vae_batch_size", "1.5"], "--vae_batch_size 1.5: out of range"),
        (["--seed", "-2"], "--seed -2: out of range"),
        (["--clip_skip", "9"], "--clip_skip 9: this model's text encoder has 3 layers; use 1 to 3"),
        (["--fp16", "--bf16"], "--fp16 and --bf16: are two precisions; give one"),
        (["--from_file", "x"], "--prompt and --from_file: are two sources of prompts; give one"),
        (["--interactive"], "--prompt and --interactive: are two sources of prompts; give one"),
        (["--samplr", "ddim"], "--samplr: no such option; did you mean --sampler?"),
        (["--sample", "ddim"], "--sample: no such option"),  # no guessing from a beginning
        (["cat"], "cat: no such option; see --help; a text with spaces needs quotes"),
        (["--steps"], "--steps: expected one argument"),
        (["--n_iter", "100000", "--images_per_prompt", "100"], "10,000,000 pictures, more than 1,000,000"),
        (["--vae", "nowhere"], "--vae nowhere: no such file or folder"),
        (["--prompt", "a --w 500"], "--w 500 (column 3): must be a multiple of 8"),
        (["--prompt", "a --samplr x"], "--samplr (column 3): no such prompt option; did you mean --sampler?"),
        (["--prompt", "a {b|c"], "{ (column 3): is never closed"),
    ],
)
def test_bad_options_are_refused_in_one_line(sd1, capfd, tmp_path, options, message):
    argv = ["--ckpt", sd1.folder, "--outdir", tmp_path / "out", "--prompt", "a", *options]
    assert message in refuse(capfd, *argv)
    assert not (tmp_path / "out").exists()


def test_a_source_of_prompts_is_needed(sd1, capfd):
    assert "--prompt: is missing; give --prompt TEXT, --from_file FILE or" in refuse(capfd, "--ckpt", sd1.folder)
    assert "the following arguments are required: --ckpt" in refuse(capfd, "--prompt", "a")


def test_faults_in_a_prompt_file_name_the_line(sd1, capfd, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# x\n\na cat\na dog --h 512.9\n")
    message = refuse(capfd, "--ckpt", sd1.folder, "--from_file", file)
    assert message.startswith(f"--h 512.9 ({file}:4, column 7): not a whole number")
    assert "cannot be read: No such file" in refuse(capfd, "--ckpt", sd1.folder, "--from_file", tmp_path / "none")
    assert "cannot be read: Is a directory" in refuse(capfd, "--ckpt", sd1.folder, "--from_file", tmp_path)


def test_all_faulty_lines_are_named_at_once(sd1, generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --w 5\nfine\na dog --x 1\n")
    result = generate(sd1.folder, "--from_file", file, "--n_iter", 3)
    assert result.status == 2
    errors = result.stderr.splitlines()
    assert [error.partition(":")[0] for error in errors] == ["error", "error"]
    assert f"({file}:1, column 7)" in errors[0]
    assert f"({file}:3, column 7)" in errors[1]


def test_output_folders_that_are_none(sd1, capfd, tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        argv = ("--ckpt", sd1.folder, "--prompt", "a", "--outdir", tmp_path / folder)
        assert f"{tmp_path / 'file'} is no folder; give another one" in refuse(capfd, *argv)


def test_an_output_folder_with_nul(sd1, capfd):
    """A shell cannot give it, a file of options can."""
    message = refuse(capfd, "--ckpt", sd1.folder, "--prompt", "a", "--outdir", "a\0b")
    assert message == "--outdir a\\x00b: holds a NUL character; give another folder"


def test_long_values_are_not_shown_in_full(capfd):
    message = refuse(capfd, "--ckpt", "x", "--prompt", "a", "--seed", "9" * 100_000)
    assert len(message) < 2100
    assert message.startswith("--seed 999") and message.endswith("write a whole number from 0 to 9223372036854775807")


def test_an_output_folder_that_cannot_be_written_to(sd1, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    message = refuse(capfd, "--ckpt", sd1.folder, "--prompt", "a", "--outdir", tmp_path)
    assert "cannot be written to; give another folder" in message


def test_refusals_and_help_need_no_torch(sd1):
    code = (
        "import sys, gen_img_diffusers as g\n"
        "try: g.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy', 'cv2'} & set(sys.modules)))"
    )
    for options in (["--help"], ["--ckpt", "x", "--W", "5"], ["--ckpt", str(sd1.safetensors), "--v2", "--prompt", "a"]):
        done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]", options


def test_help_names_every_option_and_prompt_option():
    text = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True).stdout
    for name in (*SAMPLERS, "--iter_same_seed", "--vae_slices", "--nl SCALE"):
        assert name in text


def test_standard_output_holds_the_paths_alone(sd1, generate):
    result = generate(sd1.folder, "--prompt", "a", "--images_per_prompt", 2)
    assert result.stdout.splitlines() == [str(path) for path in result.files]
    assert "2/2 images" in result.stderr


def test_prompts_from_standard_input(sd1, tmp_path):
    argv = ("--ckpt", sd1.folder, "--outdir", tmp_path, "--from_file", "-", "--steps", 1, "--W", 64, "--H", 64)
    done = Child(*argv, text="a cat\n# x\na dog\n").wait()
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_a_closed_pipe_does_not_stop_the_run(sd1, tmp_path):
    argv = [*map(str, PROGRAM), "--ckpt", str(sd1.folder), "--outdir", str(tmp_path / "out"), "--prompt", "a"]
    argv += ["--steps", "1", "--W", "64", "--H", "64", "--images_per_prompt", "3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = Forked(argv, cwd=Path.cwd(), env=os.environ, **pipes)
    process.stdout.close()
    stderr = process.stderr.read()
    assert os.waitpid(process.pid, 0)[1] == 0, stderr
    assert "Broken pipe" not in stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_what_the_machine_cannot_do_is_warned_of(sd1, generate):
    result = generate(sd1.folder, "--prompt", "a —w 8 b", "--fp16", "--xformers")
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert result.status == 0
    assert any("--fp16 is slower than float32 on a CPU" in line for line in warnings)
    assert any("xFormers" in line and "SDPA" in line for line in warnings)
    assert any("two hyphens" in line for line in warnings)
    assert len(warnings) == 3


def test_the_documents_command_lines_parse():
    for options in (
        "--xformers --fp16 --W 512 --H 704 --scale 12.5 --sampler k_euler_a --steps 32 --batch_size 4",
        "--n_iter 1 --scale 7.5 --opt_channels_last --diffusers_xformers --vae_batch_size 0.5 --no_preview --sdpa",
    ):
        argv = [
            "--ckpt",
            "model.ckpt",
            "--outdir",
            "outputs",
            *options.split(),
            "--prompt",
            "beautiful flowers --n monochrome",
        ]
        parsed = gen_img_diffusers.make_parser().parse(argv)
        assert parsed.prompt == "beautiful flowers --n monochrome"


def test_a_faulty_program_says_so_in_one_line(sd1, generate, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("oops\nsecond line")

    monkeypatch.setattr(gen_img_diffusers, "load_pipeline", broken)
    result = generate(sd1.folder, "--prompt", "a")
    assert result.status == 1
    message = "error: a fault of this program, ZeroDivisionError: oops second line; --debug shows where"
    assert result.stderr.splitlines()[-1] == message
    assert "Traceback" not in result.stderr
    debugged = generate(sd1.folder, "--prompt", "a", "--debug")
    assert debugged.status == 1
    assert "Traceback" in debugged.stderr


HOSTILE = "a\x1b[31m\nerror: forged\r\x07\x9b2J\u202egnp.\u2066\u200f\u2028error: too\x85\tb"
HARMLESS = r"a\x1b[31m\nerror: forged\r\x07\x9b2J\u202egnp.\u2066\u200f\u2028error: too\x85\tb"
JOINED = "é 猫 \U0001f468\u200d\U0001f469\u200d\U0001f467 می\u200cخواهم \\ ‘x’"


def test_what_acts_on_a_terminal_is_written_as_text(capfd):
    assert console.one_line(JOINED) == JOINED
    with console.messages(logging.INFO):
        console.error(HOSTILE)
        console.say(HOSTILE)
        logging.getLogger("networks.files").warning("%s", HOSTILE)
        console.result(f"out/{HOSTILE}.png")
    captured = capfd.readouterr()
    assert captured.err == f"error: {HARMLESS}\n{HARMLESS}\nwarning: {HARMLESS}\n"
    assert captured.out == f"out/{HARMLESS}.png\n"


def told(result) -> list[str]:
    """The lines of a run, none of which a file may have forged or written with."""
    text = result.stdout + result.stderr
    assert not [
        character for character in text if unicodedata.category(character) in ("Cc", "Cf") and character != "\n"
    ]
    lines = text.splitlines()
    assert not [line for line in lines if "forged" in line.partition("error: ")[0] or line.startswith("error: forged")]
    return lines


def test_texts_of_files_cannot_forge_messages(sd1, generate, tmp_path):
    tensors = {f"{HOSTILE}.{n}": torch.zeros(1) for n in range(2)}
    key = "lora_unet_mid_block_attentions_0_proj_in"
    lora = {f"{key}.lora_down.weight": torch.ones(1, 64, 1, 1), f"{key}.lora_up.weight": torch.ones(64, 1, 1, 1)}
    metadata = {"ss_comment": HOSTILE, HOSTILE: "x", "ss_tags": json.dumps({"a": HOSTILE}), "ss_deep": "[" * 10_000}
    save_file(lora | tensors, tmp_path / "lora.safetensors", metadata=metadata)
    save_file(tensors, tmp_path / "other.safetensors")
    network = ("--network_module", "networks.lora", "--network_weights")
    shown = generate(
        sd1.folder, "--prompt", "a", "--dry_run", *network, tmp_path / "lora.safetensors", "--network_show_meta"
    )
    lines = told(shown)
    assert f"  ss_comment: {HARMLESS}" in lines
    assert f"  {HARMLESS}: x" in lines
    refused = generate(sd1.folder, "--prompt", "a", "--debug", *network, tmp_path / "other.safetensors")
    assert [line[:6] for line in told(refused) if "error:" in line[:6]] == ["error:"]


def test_names_of_files_cannot_forge_messages(sd1, generate, tmp_path):
    names = ["a\nerror: forged.png", "b\x1b[2J\u202e.png"]
    (tmp_path / "sources").mkdir()
    for name in names:
        Image.new("RGB", (64, 64)).save(tmp_path / "sources" / name)
    options = ("--image_path", tmp_path / "sources", "--use_original_file_name", "--prompt", "a \x1b[31mcat",
               "--images_per_prompt", 2, "--strength", 1)  # fmt: skip
    for more in (["--dry_run"], []):
        lines = told(generate(sd1.folder, *options, *more))
        assert any(r"a\nerror: forged.png" in line for line in lines)
    (tmp_path / "sources" / names[0]).write_bytes(b"no picture")
    (error,) = told(generate(sd1.folder, *options))
    assert error.startswith("error: --image_path ")
    told(generate(tmp_path / names[0], "--prompt", "a"))


def test_libraries_of_other_versions_are_refused(monkeypatch, sd1, generate):
    real = metadata.version
    monkeypatch.setattr(devices, "version", lambda name: "4.57.1" if name == "transformers" else real(name))
    result = generate(sd1.folder, "--prompt", "a")
    assert result.status == 2
    assert "transformers: found version 4.57.1, wanted is transformers >= 5.6, < 6" in result.stderr


def test_an_xformers_that_does_not_load(monkeypatch, caplog):
    import torch

    broken = types.ModuleType("xformers")
    monkeypatch.setitem(sys.modules, "xformers", broken)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    from library.machine.attention import sdpa

    machine = devices.Machine(torch.device("cuda"), torch.float16, channels_last=False)
    with caplog.at_level(logging.WARNING):
        assert devices.choose_attention(machine, xformers=True) is sdpa
    assert "xFormers cannot be used" in caplog.text


def test_interrupting_ends_with_130(sd1, generate, monkeypatch):
    monkeypatch.setattr(gen_img_diffusers, "load_pipeline", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    result = generate(sd1.folder, "--prompt", "a")
    assert result.status == 130
    assert result.stderr.splitlines()[-1].startswith("error: interrupted")


@pytest.mark.parametrize(("sampler", "steps"), [("pndm", 3), ("pndm", 1000), ("ddim", 1000)])
def test_steps_that_a_sampler_cannot_do(sd1, capfd, tmp_path, sampler, steps):
    file = tmp_path / "p.txt"
    file.write_text(f"a --s 10\nb --s {steps}")
    message = refuse(capfd, "--ckpt", sd1.folder, "--sampler", sampler, "--from_file", file)
    assert message.startswith(f"{steps} steps ({file}:2): the sampler {sampler} does ")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_fewest_steps(sd1, generate, sampler):
    steps = SAMPLERS[sampler].steps[0]
    assert generate(sd1.folder, "--prompt", "a", "--sampler", sampler, "--steps", steps).status == 0


def run_bytes(models, *options: bytes, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    argv = [*PROGRAM, "--ckpt", str(models.folder), "--W", "64", "--H", "64", "--steps", "1", *options]
    return subprocess.run(argv, input=stdin, capture_output=True, env=os.environ | environment)


def test_texts_that_are_not_utf8(sd1, tmp_path):
    done = run_bytes(sd1, b"--prompt", b"\xff cat")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"--prompt: the text is not UTF-8" in done.stderr
    options = (b"--interactive", b"--no_preview", b"--outdir", bytes(tmp_path))
    done = run_bytes(sd1, *options, stdin=b"\xff cat\na\0b\nok\n", LC_ALL="C")
    assert done.returncode == 0
    assert b"not UTF-8" in done.stderr
    assert b"NUL" in done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_a_locale_without_utf8_still_takes_it(sd1, tmp_path):
    from PIL import Image

    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_bytes(sd1, b"--prompt", "猫".encode(), b"--outdir", "出".encode(), b"--debug", **locale)
    assert done.returncode == 0, done.stderr
    folder = Path(os.fsdecode("出".encode()))
    (picture,) = folder.glob("*.png")
    assert Image.open(picture).info["prompt"] == "猫"
    shutil.rmtree(folder)


def test_standard_output_that_takes_nothing(sd1, tmp_path):
    argv = [*map(str, PROGRAM), "--ckpt", str(sd1.folder), "--W", "64", "--H", "64", "--steps", "1", "--prompt", "a"]
    for redirection in (">/dev/full", ">&-"):
        command = f"{shlex.join([*argv, '--outdir', str(tmp_path)])} {redirection}"
        assert subprocess.run(command, shell=True, capture_output=True).returncode == 0
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_errors_stay_on_one_line(sd1, capfd):
    assert "a\\nb" in refuse(capfd, "--ckpt", "a\nb", "--prompt", "x")
    assert "e\\nu" in refuse(capfd, "--ckpt", sd1.folder, "--sampler", "e\nu", "--prompt", "x")


def test_debug_keeps_the_exit_status(sd1, generate):
    result = generate(sd1.folder, "--prompt", "a --w 7", "--debug")
    assert result.status == 2
    assert "error: --w 7 (column 3)" in result.stderr
