"""What the program tells of itself: its help, what completes its options in a shell, and lines of progress in a log."""

import shutil
import subprocess

import pytest

import gen_img_diffusers
from library import console


def shown(capfd, *options: str) -> str:
    """What an option that leaves the program writes."""
    with pytest.raises(SystemExit) as leaving:
        gen_img_diffusers.main(options)
    captured = capfd.readouterr()
    assert (leaving.value.code, captured.err) == (None, "") or leaving.value.code == 0
    return captured.out


def refused(capfd, *options: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        gen_img_diffusers.main(options)
    captured = capfd.readouterr()
    assert (leaving.value.code, captured.out) == (2, "")
    assert captured.err.count("\n") == 1
    return captured.err


# ---------------------------------------------------------------------------------------------------------------------
# Help


def test_the_short_help_fits_a_screen_and_names_the_groups(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(capfd, "-h")
    assert len(text.splitlines()) <= 50
    for name in ("--ckpt MODEL", "--prompt TEXT", "--from_file FILE", "--steps N", "--outdir DIR"):
        assert f"\n  {name}" in text
    assert "--ds_depth_1" not in text
    assert "--help GROUP" in text and "networks\nand embeddings" in text


def test_the_long_help_begins_with_what_people_use_first(capfd):
    text = shown(capfd, "--help")
    places = [text.index(f"\n{title}:") for title in ("examples", "model", "prompts", "picture", "img2img, inpainting "
                                                       "and regions", "Deep Shrink")]  # fmt: skip
    assert places == sorted(places)
    assert text.index("--sampler NAME ") < text.index("--s_churn AMOUNT")
    assert text.splitlines()[0].endswith("[options]")  # not all 130 of them


@pytest.mark.parametrize(
    ("wanted", "title"),
    [
        ("networks", "networks and embeddings"),
        ("network", "networks and embeddings"),
        ("ControlNet", "ControlNet"),
        ("highres fix", "Highres. fix and enlarging"),
        ("XL", "sizes that XL models are told"),
        ("line", "options of a prompt line"),
        ("run", "the run"),
    ],
)
def test_the_help_of_a_group(capfd, wanted, title):
    lines = shown(capfd, "--help", wanted).splitlines()
    assert lines[0] == f"{title}:"
    assert [line for line in lines if line and not line.startswith(" ")] == [f"{title}:"]
    assert len(lines) > 2


def test_options_of_which_one_can_be_given_stand_in_their_groups_help(capfd):
    assert "--quiet" in shown(capfd, "--help", "run")


def test_several_groups_that_a_word_fits(capfd):
    lines = shown(capfd, "--help", "prompt").splitlines()
    assert {"prompts:", "options of a prompt line:"} <= set(lines)


@pytest.mark.parametrize("wanted", ["nothing", "", "..."])
def test_an_unknown_group_is_refused_with_the_known_ones(capfd, wanted):
    message = refused(capfd, "--help", wanted)
    assert message.startswith(
        f"error: --help {wanted}: no such group; write a word of one of these: model | prompts | "
    )


# ---------------------------------------------------------------------------------------------------------------------
# Completion


def completed(script: str, *words: str) -> list[str]:
    """What bash offers where the last of these words is being typed."""
    typed = " ".join(f"'{word}'" for word in words)
    ask = (
        f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}\n"
        f"_gen_img_diffusers '{words[0]}' '{words[-1]}' '{words[-2]}'\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_options_and_values(capfd):
    script = shown(capfd, "--completion", "bash")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for command in (
        ("./gen_img_diffusers.py",),
        ("python", "gen_img_diffusers.py"),
        ("python3", "-u", "../gen_img_diffusers.py"),
    ):
        assert completed(script, *command, "--ckpt", "x", "--st") == ["--steps", "--strength"]
        assert completed(script, *command, "--sampler", "euler") == ["euler", "euler_a"]
    assert completed(script, "gen_img_diffusers.py", "--control_net_preps", "canny", "mlsd", "gr") == ["gray"]
    assert completed(script, "gen_img_diffusers.py", "--help", "netw") == ["networks"]
    assert completed(script, "gen_img_diffusers.py", "--ckpt", "mod") == []  # left to bash: files
    assert completed(script, "python", "other.py", "--st") == []  # other programs' options are not ours


def test_every_word_that_completes_help_is_a_group(capfd):
    words = completed(shown(capfd, "--completion", "bash"), "gen_img_diffusers.py", "--help", "")
    assert len(words) == len(set(words)) > 10
    for word in words:
        assert "--" in shown(capfd, "--help", word)


def test_bash_completes_every_option(capfd):
    script = shown(capfd, "--completion", "bash")
    table = gen_img_diffusers.make_parser().table
    offered = completed(script, "gen_img_diffusers.py", "--")
    assert {f"--{name}" for name in table if name != "h"} <= set(offered)


@pytest.mark.parametrize(("shell", "check"), [("zsh", ["-n"]), ("fish", ["--no-execute"])])
def test_other_shells_accept_theirs(capfd, tmp_path, shell, check):
    script = shown(capfd, "--completion", shell)
    assert "steps" in script and "euler_a" in script
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, *check, tmp_path / "script"], check=True)


def test_a_shell_that_is_not_known(capfd):
    assert "--completion tcsh: there is none of that name; write bash, zsh or fish" in refused(
        capfd, "--completion", "tcsh"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Progress


def test_a_log_has_a_line_of_progress_every_ten_seconds_at_most(monkeypatch, capfd):
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.messages(20):
        progress = console.Progress(30)
        for picture in range(1, 31):
            now += 3
            progress.reached(picture)
        progress.close()
    told = [line.partition(" ")[0] for line in capfd.readouterr().err.splitlines()]
    assert told == ["4/30", "8/30", "12/30", "16/30", "20/30", "24/30", "28/30", "30/30"]
