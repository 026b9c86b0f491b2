"""What is given and does nothing, or something else than was meant: warned of, or refused."""

import pytest

DEMO = "examples/shapes"


def warnings(generate, *options: object) -> list[str]:
    result = generate(DEMO, "--dry_run", "--seed", 1, *options)
    assert result.status == 0, result.stderr
    return [line.removeprefix("warning: ") for line in result.stderr.splitlines() if line.startswith("warning: ")]


def test_a_strength_without_a_picture(generate, tmp_path):
    does_nothing = "does nothing without --image_path and without Highres. fix"
    assert warnings(generate, "--prompt", "a", "--strength", 0.3) == [f"--strength 0.3 {does_nothing}"]
    assert warnings(generate, "--prompt", "a --t 0.3") == [f"--t {does_nothing}"]
    (tmp_path / "p.txt").write_text("a\nb --t 0.3\n")
    file = tmp_path / "p.txt"
    assert warnings(generate, "--from_file", file) == [f"{file}:2: --t {does_nothing}"]
    highres = ("--highres_fix_scale", 0.5, "--steps", 20, "--W", 128, "--H", 128)
    assert warnings(generate, "--prompt", "a --t 0.3", "--strength", 0.5, *highres) == []


@pytest.mark.parametrize(
    ("prompt", "lost"),
    [
        ("a (red:1.3 circle", "(red:1.3"),
        ("a (red: .5, blue (circle:1.2)", "(red: .5"),
        ("a --n (blurry:1.3", "(blurry:1.3"),
        ("a (red:1.3) circle", None),
        ("a (red:1.3 )", None),
        ("a (red circle", None),  # up to the end, as in the web UI
        ("a red:1.3 \\(circle:2", None),
        ("a ((red:1.3) circle", None),
    ],
)
def test_a_weight_whose_bracket_is_never_closed(generate, prompt, lost):
    told = [f"{lost!r}: the bracket is never closed and the weight is text; write ) after it"] if lost else []
    assert warnings(generate, "--prompt", prompt) == told


def test_a_small_model_drawn_large(generate):
    told = warnings(generate, "--prompt", "a", "--W", 512, "--H", 256)
    assert told == ["the model was made for 128 pixels a side; 512 x 256 repeats things: give --W 128 --H 128"]
    assert warnings(generate, "--prompt", "a", "--W", 192, "--H", 192) == []
    assert warnings(generate, "--prompt", "a", "--W", 256, "--H", 256, "--tile", 128) == []


@pytest.mark.parametrize("name", ["p.yaml", "p.YML", "p.toml", "p.json", "p.png"])
def test_files_of_other_kinds_are_no_prompts(generate, tmp_path, name):
    (tmp_path / name).write_text("a: b\n")
    result = generate(DEMO, "--from_file", tmp_path / name)
    assert (result.status, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: --from_file {tmp_path / name}: is no prompt file")
