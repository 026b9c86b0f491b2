"""A negative prompt for the whole run: `--negative_prompt`, and the lines that say otherwise."""

import json
import re

import pytest
from PIL import Image


def negatives(generate, *options: object) -> list[str]:
    result = generate("examples/shapes", "--dry_run", "--json", *options)
    assert result.status == 0, result.stderr
    return [json.loads(line)["negative_prompt"] for line in result.stdout.splitlines()]


def test_a_line_of_its_own_wins_also_an_empty_one(generate, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb --n\nc --n other --s 2\nd --s 2\n")
    said = negatives(generate, "--from_file", tmp_path / "p.txt", "--negative_prompt", "(blurry:1.2),\nbad")
    assert said == ["(blurry:1.2), bad", "", "other", "(blurry:1.2), bad"]


def test_its_choices_are_each_pictures_own_and_not_those_of_the_prompt(generate):
    options = ("--prompt", "{a|b}", "--images_per_prompt", 40, "--seed", 1, "--negative_prompt", "{a|b}", "--dry_run")
    result = generate("examples/shapes", *options, "--json")
    facts = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(each["prompt"], each["negative_prompt"]) for each in facts} == {(a, b) for a in "ab" for b in "ab"}
    again = generate("examples/shapes", *options, "--json")
    assert [json.loads(line)["negative_prompt"] for line in again.stdout.splitlines()] == [
        each["negative_prompt"] for each in facts
    ]


def test_the_picture_is_that_of_a_line_with_it(sd1, generate):
    run_wide = generate(sd1.folder, "--prompt", "a --d 1", "--negative_prompt", "bad")
    in_line = generate(sd1.folder, "--prompt", "a --d 1 --n bad")
    without = generate(sd1.folder, "--prompt", "a --d 1")
    assert (run_wide.pictures[0] == in_line.pictures[0]).all()
    assert (run_wide.pictures[0] != without.pictures[0]).any()
    assert Image.open(run_wide.files[0]).info["negative-prompt"] == "bad"


def test_it_stands_in_a_file_of_options_and_a_run_goes_on_with_it_alone(sd1, generate, tmp_path):
    (tmp_path / "run.toml").write_text('negative_prompt = "bad"\n')
    options = ("--prompt", "a", "--seed", 3, "--config", tmp_path / "run.toml")
    first = generate(sd1.folder, *options)
    assert "bad" in (first.files[0].parent / "settings.toml").read_text()
    first.files[0].unlink()
    refused = generate(sd1.folder, *options, "--resume", "--negative_prompt", "other")
    assert re.match(r"error: --negative_prompt other: the run to resume has bad", refused.stderr)
    assert generate(sd1.folder, *options, "--resume").files == first.files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blurry --w 64", "--negative_prompt, '--w 64': takes the text of a negative prompt alone"),
        ("{e$$a|b}", "{e$$…} (--negative_prompt): counts pictures"),
        ("{a|b", "{ (--negative_prompt, column 1): is never closed"),
    ],
)
def test_what_is_no_negative_prompt_is_refused(generate, text, message):
    result = generate("examples/shapes", "--prompt", "a", "--negative_prompt", text)
    assert result.status == 2
    assert result.stderr.startswith(f"error: {message}")
