"""The loop's commands, and what its window shows: run in this process, with what is typed and without a screen."""

import io
import sys

import cv2
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image

from library.draw.latent_preview import promised
from library.files.prediction import TRAINING_SCHEDULE
from library.run import preview


@pytest.fixture
def talk(generate, monkeypatch):
    """Type lines: `talk(ckpt, lines, *options)`."""

    def run(ckpt, lines, *options, window=False, outdir=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        return generate(
            ckpt, "--interactive", "--seed", 7, *([] if window else ["--no_preview"]), *options, outdir=outdir
        )

    return run


def answers(result) -> list[str]:
    """What was told, without the questions."""
    return [line.removeprefix("Type prompt: ") for line in result.stderr.replace("Type prompt: \n", "").splitlines()]


def infos(result) -> list[dict]:
    return [Image.open(file).info for file in result.files]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_set_keeps_options_and_a_lines_own_win(sd1, talk):
    lines = [
        *(
            ":set --s 3 --n blurry",
            "a",
            "b --s 1",
            ":set --d 5",
            "c",
            ":unset --s",
            "d",
            ":undo",
            "e",
            ":unset",
            "f --d 1",
        ),
        ":undo",
        ":set",
    ]
    result = talk(sd1.folder, lines)
    assert result.status == 0
    told = {info["prompt"]: (info["steps"], info.get("negative-prompt", ""), info["seed"]) for info in infos(result)}
    assert [told[name][:2] for name in "ab"] == [("3", "blurry"), ("1", "blurry")]
    assert told["c"] == told["e"] == ("3", "blurry", "5")
    assert told["d"] == ("2", "blurry", "5")  # as on the command line again
    assert told["f"] == ("2", "", "1")
    assert answers(result)[-2:] == ["taken back: :unset; kept: --s 3 --n blurry --d 5", "kept: --s 3 --n blurry --d 5"]
    assert result.stdout.splitlines() == [str(file) for file in result.files]  # paths alone


def test_an_option_within_a_choice_and_one_that_excludes_another_are_the_lines_own(sd1, talk):
    lines = [":set --s 3 --schedule karras --sampler euler", "a {--s 1|--s 1}", "b --timesteps 900,500"]
    result = talk(sd1.folder, lines)
    assert "error" not in result.stderr
    assert [info["steps"] for info in infos(result)] == ["1", "2"]


def test_show_tells_what_holds(sd1, talk):
    result = talk(sd1.folder, [":set --w 128 --d 3", ":show"], "--negative_prompt", "grey", "--scale", 3)
    shown = [" ".join(line.split()[:2]) for line in answers(result) if line.startswith("--")]
    assert shown == ["--n grey", "--w 128", "--h 64", "--s 2", "--d 3", "--sampler ddim", "--l 3.0"]
    assert [line for line in answers(result) if line.endswith("kept by :set")] != []


FAULTS = (
    (":set --x 1", "--x (column 1): no such prompt option"),
    (":set --steps 1", "--steps (column 1): no such prompt option; in a line it is --s"),
    (":set --s", "--s (column 1): needs a value; write --s N"),
    (":set --w 5", "--w 5 (column 1): out of range"),
    (":set --s 1 --s 2", "--s (column 7): given twice"),
    (":set --n {a|b", "{ (column 5): is never closed"),
    (":set a cat --s 1", ":set a cat --s 1: takes options of a line"),
    (":set --sampler pndm --s 1000", "1000 steps: the sampler pndm does 4 to 999 steps"),
    (":unset --s", ":unset --s: is not kept; nothing is kept"),
    (":undo", ":undo: there is nothing to take back"),
    (":shwo", ":shwo: no such command; did you mean :show?"),
    (":frobnicate x", ":frobnicate: no such command; there are :set, :unset, :undo, :show, :save, :help"),
    (":show all", ":show all: takes nothing"),
    (":save", ":save: needs a file"),
    (":save x.txt", ":save x.txt: nothing was drawn yet"),
)


def test_faults_in_commands_are_told_in_one_line(sd1, talk):
    """None ends the loop, and what was wrong is not kept."""
    result = talk(sd1.folder, [*(command for command, _ in FAULTS), ":set"])
    assert result.status == 0
    *errors, last = answers(result)[1:]
    for error, (_, message) in zip(errors, FAULTS, strict=True):
        assert error.startswith(f"error: {message}")
    assert last.startswith("nothing is kept")


def test_prompts_that_begin_with_a_colon(sd1, talk):
    result = talk(sd1.folder, [":) --d 1", " :set --d 2", "::x --d 3"])
    assert [(info["prompt"], info["seed"]) for info in infos(result)] == [(":)", "1"), (":set", "2"), ("::x", "3")]


def test_the_help_names_every_command(sd1, talk):
    text = "\n".join(answers(talk(sd1.folder, [":help"], "--quiet")))  # which is asked for
    for name in (":set OPTIONS", ":unset NAMES", ":undo", ":show", ":save FILE", ":help", ":q"):
        assert f"\n{name} " in f"\n{text}"


def test_saved_lines_draw_the_same_pictures(sd1, talk, generate, tmp_path):
    saved = tmp_path / "lines.txt"
    lines = ["a {red|blue|green} cat", ":set --n {x|y|z} --sampler euler_a", "# a dog --s 3", "no --w 5", "b --d 4,9"]
    drawn = talk(sd1.folder, [*lines, f":save {saved}", f":save {saved}"], "--n_iter", 2)
    assert f"error: :save {saved}: is there already; give another name" in drawn.stderr
    assert f"--from_file {saved} --n_iter 1 in place of --interactive" in drawn.stderr
    again = generate(sd1.folder, "--from_file", saved, "--seed", 7, "--n_iter", 2, "--n_iter", 1, outdir=tmp_path / "b")
    assert len(drawn.files) == 2 + 2 + 4
    assert {info.get("negative-prompt") for info in infos(again)} <= {None, "x", "y", "z"}
    assert len(again.files) == len(drawn.files)
    for before, after in zip(drawn.pictures, again.pictures):
        assert np.array_equal(before, after)


def test_pictures_are_taken_in_turn_as_in_the_saved_file(sd1, talk, generate, tmp_path):
    """A line that is refused after its first picture was planned takes no picture away."""
    (tmp_path / "sources").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (90 * number, 0, 0)).save(tmp_path / "sources" / f"{number}.png")
    options = ("--image_path", tmp_path / "sources", "--strength", 0.5, "--use_original_file_name")
    saved = tmp_path / "lines.txt"
    drawn = talk(sd1.folder, ["a", "x {e$$--s 2|--s 5000}", "b", "c", f":save {saved}"], *options)
    again = generate(sd1.folder, "--from_file", saved, *options, outdir=tmp_path / "again")
    assert [file.name[0] for file in drawn.files] == [file.name[0] for file in again.files] == ["0", "1", "2"]
    assert all(map(np.array_equal, drawn.pictures, again.pictures))


# ---------------------------------------------------------------------------------------------------------------------
# Window


@pytest.fixture
def screen(monkeypatch):
    """What OpenCV is told to show: titles and pictures, in order. A key is pressed once the pictures are finished."""
    told: list[object] = []
    monkeypatch.setattr(preview, "can_show", lambda: True)
    monkeypatch.setattr(cv2, "imshow", lambda window, pixels: told.append(pixels[..., ::-1].astype(int)))
    monkeypatch.setattr(cv2, "setWindowTitle", lambda window, title: told.append(title))
    monkeypatch.setattr(cv2, "waitKey", lambda ms: -1 if ms == 1 else 32)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda window, name: 1.0)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: told.append("closed"))
    return told


def test_the_window_shows_progress_and_tiles(sd1, talk, screen):
    result = talk(sd1.folder, ["a cat --d 1,2", "a dog --d 3"], window=True)
    titles = [each for each in screen if isinstance(each, str)]
    cat = [f"step {step}/2, {done} of 2 pictures done: a cat" for done in (0, 1) for step in (1, 2)]
    dog = [f"step {step}/2: a dog" for step in (1, 2)]
    assert titles == ["a cat", *cat, "a cat", "closed", "a dog", *dog, "a dog", "closed"]
    empty, first, both, *_, last = [each for each in screen if not isinstance(each, str)]
    assert empty.shape == both.shape == (64, 64 + 4 + 64, 3)
    assert len(np.unique(empty)) == 1
    assert np.array_equal(first[:, :64], result.pictures[0]) and np.array_equal(first[:, 64:], empty[:, 64:])
    assert np.array_equal(both[:, :64], result.pictures[0]) and np.array_equal(both[:, 68:], result.pictures[1])
    assert np.array_equal(last, result.pictures[2])


def test_previews_come_to_the_picture_and_change_none(talk, screen, tmp_path):
    """On the demo model, whose pictures have a meaning: what is shown at the last step is the picture, but coarse."""
    lines = ["a large red circle on a white background --d 1"]
    options = ("--W", 128, "--H", 128, "--steps", 8, "--scale", 5, "--sampler", "euler_a")
    plain = talk("examples/shapes", lines, *options)
    watched = talk("examples/shapes", lines, *options, "--preview_every", 3, window=True, outdir=tmp_path / "watched")
    assert np.array_equal(plain.pictures[0], watched.pictures[0])
    _, third, sixth, picture = [each for each in screen if not isinstance(each, str)]
    assert np.array_equal(picture, watched.pictures[0])
    for shown, most in ((third, 30), (sixth, 15)):  # levels of 255; coarse pixels differ at edges, and noise is left
        assert abs(_coarse(shown) - _coarse(picture)).mean() < most
    assert abs(_coarse(third) - _coarse(picture)).mean() > abs(_coarse(sixth) - _coarse(picture)).mean()


def _coarse(picture: np.ndarray) -> np.ndarray:
    return picture.reshape(16, 8, 16, 8, 3).mean((1, 3))


@pytest.mark.parametrize(
    "options",
    [
        ["--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--W", 128, "--H", 128],
        [
            "--gradual_latent_timesteps",
            900,
            "--gradual_latent_ratio_step",
            0.25,
            "--sampler",
            "euler_a",
            "--steps",
            6,
            "--W",
            128,
            "--H",
            128,
        ],
        ["--images_per_prompt", 3, "--batch_size", 2, "--W", 128],
    ],
)
def test_previews_of_any_size_fill_their_tiles(sd1, talk, screen, options):
    """Stages and growing latents are smaller at first; batches are shown in their own tiles."""
    result = talk(sd1.folder, ["a cat"], "--preview_every", 1, *options, window=True)
    assert result.status == 0, result.stderr
    shown = [each for each in screen if not isinstance(each, str)]
    assert len({each.shape for each in shown}) == 1
    assert len(shown) > 3
    assert not (shown[1][:64, :128] == shown[0][:64, :128]).all(-1).any()  # the first tile is filled at once


def test_a_window_that_is_closed_stays_closed_until_the_next_prompt(sd1, talk, screen, monkeypatch):
    opened = iter([1.0, 0.0])  # closed by hand after the first look at it
    monkeypatch.setattr(cv2, "getWindowProperty", lambda window, name: next(opened, 1.0))
    result = talk(sd1.folder, ["a cat --d 1", "a dog --d 2"], window=True)
    assert len(result.files) == 2
    assert [each for each in screen if isinstance(each, str)][:3] == ["a cat", "closed", "a dog"]


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_the_promised_picture_is_the_clean_one(kind, predicts):
    scheduler = kind(**TRAINING_SCHEDULE, prediction_type=predicts)
    scheduler.set_timesteps(10)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = scheduler.timesteps[3]
    noisy = scheduler.add_noise(clean, noise, timestep[None])
    sample = scheduler.scale_model_input(noisy, timestep)
    alpha = scheduler.alphas_cumprod[round(float(timestep))]
    said = noise if predicts == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    # Euler's timesteps lie between those of the training, of which the nearest is taken
    assert (promised(scheduler, said, sample, float(timestep)) - clean).abs().max() < 0.02


def test_previews_need_a_window(sd1, generate):
    assert (
        "--preview_every: is for the loop's window"
        in generate(sd1.folder, "--prompt", "a", "--preview_every", 1).stderr
    )
    both = generate(sd1.folder, "--interactive", "--no_preview", "--preview_every", 1)
    assert "--preview_every and --no_preview: do not go together" in both.stderr
