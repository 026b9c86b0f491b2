"""Names that the user gives: `--f` in a line, `--file_name` for all pictures."""

import os
import re
from argparse import ArgumentTypeError
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.plan.file_names import FileNames, first_stage_name
from library.settings.file_names import NamePattern, name_pattern, picture_name

NOW = datetime(2026, 11, 23, 4, 5, 6)
SAID = {"prompt": "a cat", "sampler": "ddim", "width": 512, "height": 768, "steps": 20, "guidance_scale": 7.5}


def names(folder: Path, pattern: str = "", **settings) -> FileNames:
    made = NamePattern.from_text(pattern) if pattern else None
    return FileNames(folder, sequential=False, now=NOW, pattern=made, model="mo/del", **settings)


@pytest.mark.parametrize(
    ("pattern", "said", "name"),
    [
        ("{number}_{seed}", {}, "001_7.png"),
        ("{number:05d}-{seed:2}", {}, "00001-07.png"),
        ("{date} {model} {sampler} {steps} {scale}.PNG", {}, "20261123040506 mo_del ddim 20 7.5.png"),
        ("{width}x{height}{{x}}", {}, "512x768{x}.png"),
        ("v1.5 {prompt}", {"prompt": 'a/b\\c: "d"?\x07 \u202e*'}, "v1.5 a_b_c_ _d.png"),
        ("{prompt}", {"prompt": ""}, "_.png"),
        ("{prompt}", {"prompt": "../../etc"}, "etc.png"),
        ("{prompt}", {"prompt": "COM1"}, "_COM1.png"),
        ("{prompt}", {"prompt": ".hidden. "}, "hidden.png"),
        ("{prompt}{model}", {"prompt": "x"}, "xmo_del.png"),
        ("{number}", {"file_name": "mine"}, "mine.png"),
    ],
)
def test_patterns(tmp_path, pattern, said, name):
    assert names(tmp_path, pattern).next(7, None, {**SAID, **said}).name == name


@pytest.mark.parametrize("letter", ["a", "é", "猫", "😀", "e\u0301"])
def test_long_prompts_are_cut_to_what_the_file_system_takes(tmp_path, letter):
    given = names(tmp_path, "{prompt}_{seed}_{prompt}", beside=["_guide12.png"], two_stages=True)
    for _ in range(3):
        file = given.next(7, None, {**SAID, "prompt": letter * 500})
        for name in (file.name, f"{file.stem}_guide12.png", first_stage_name(file.name)):
            (tmp_path / name).write_bytes(b"")
        kept = re.fullmatch(rf"((?:{letter})+)_7_\1(-[12])?", file.stem)  # whole letters, with their accents
        assert kept and len(os.fsencode(file.name)) > 220


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.text(max_size=300))
def test_any_prompt_makes_a_name(tmp_path_factory, prompt):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    name = names(folder, "{prompt}").next(7, None, {**SAID, "prompt": prompt}).name
    assert "/" not in name and not name.startswith(".") and name == Path(name).name
    assert picture_name(name) == name.removesuffix(".png").strip()
    (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ".", "..", "../a", "/a", "a/b", "a\\b", "C:a", "a\0", "a\nb", "a\x1b", "con", "NUL.txt", "Lpt1"),
        *("a.", ".a", "a?", "a*", "a|b", "<a>", 'a"', "\u202ea", "\ud800", ".png", "a..png"),
    ],
)
def test_names_that_are_refused(text):
    with pytest.raises(ArgumentTypeError):
        picture_name(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [("a", "a"), ("a.PNG", "a"), ("a.jpeg", "a"), ("v1.5", "v1.5"), ("é 猫", "é 猫"), ("console", "console")],
)
def test_names_that_are_taken(text, name):
    assert picture_name(text) == name


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{sed}", "no such field; did you mean {seed}?"),
        ("{0}", "no such field; known are number"),
        ("{}", "no such field"),
        ("{seed.real}", "did you mean {seed}?"),
        ("{prompt:>9}", "cannot be written so; write {prompt}"),
        ("{number:x}", "write a number of digits, as {number:04d}"),
        ("{number:999999999d}", "write a number of digits"),
        ("{seed!r}", "fields have no conversions"),
        ("{seed", "a brace itself twice"),
        ("../{seed}", "holds /"),
        (".{seed}", "begins or ends with a dot"),
        ("", "is empty"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(ArgumentTypeError) as error:
        name_pattern(pattern)
    assert message in str(error.value)


def test_first_stages_have_names_of_their_own(tmp_path):
    assert first_stage_name("im_1cat.png") == "im_1cat_1st.png"
    (tmp_path / "cat_1st.png").write_bytes(b"")
    given = names(tmp_path, two_stages=True)
    files = [given.next(1, None, {"file_name": name}) for name in ("cat", "dog", "dog_1st", "dog")]
    assert [file.name for file in files] == ["cat-1.png", "dog.png", "dog_1st-1.png", "dog-1.png"]
    stages = [first_stage_name(file.name) for file in files]
    assert len({*stages, *(file.name for file in files), "cat_1st.png"}) == 9


def test_many_equal_names_take_no_longer_each(tmp_path):
    """Counted from 0 each time, twenty thousand would be two hundred million looks."""
    given = names(tmp_path)
    for _ in range(20_000):
        file = given.next(1, None, {"file_name": "cat"})
    assert file.name == "cat-19999.png"


def test_a_name_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--f, .*\(p:3\): would need names of 304 bytes, .*give a shorter name"):
        names(tmp_path).next(1, None, {"file_name": "a" * 300, "where": "p:3"})
    with pytest.raises(InputError, match="take something out of the pattern"):
        names(tmp_path, "a" * 300 + "{seed}").next(1, None, SAID)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_pictures_of_a_run_have_their_names_and_keep_them(sd1, generate, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "cat.png").write_bytes(b"not ours")
    prompts = tmp_path / "p.list"
    prompts.write_text("a --f cat --d 1,2\nb? --f {dog|dog}.webp --d 3,4\nc/d --d 5,6\n")
    command = (sd1.folder, "--from_file", prompts, "--images_per_prompt", 2, "--file_name", "{number} {prompt} {seed}")
    made = ["cat-1.png", "cat-2.png", "dog-1.png", "dog.png", "005 c_d 5.png", "006 c_d 6.png"]
    whole = generate(*command)
    assert sorted(file.name for file in whole.files) == sorted(made)
    assert (out / "cat.png").read_bytes() == b"not ours"
    (out / "cat-2.png").unlink()
    prompts.write_text(prompts.read_text() + "e --d 9\n")
    resumed = generate(*command, "--resume")
    assert sorted(file.name for file in resumed.files) == ["007 e 9.png", "008 e 9.png", "cat-2.png"]
    assert generate(*command[:-1], "{seed}", "--resume").stderr.startswith(
        "error: --file_name {seed}: the run to resume has"
    )


def test_both_stages_of_a_named_picture_stand(sd1, generate, tmp_path):
    result = generate(
        sd1.folder,
        "--prompt",
        "a --f im_1.png",
        "--highres_fix_scale",
        0.5,
        "--highres_fix_save_1st",
        "--W",
        128,
        "--H",
        128,
    )
    assert [file.name for file in result.files] == ["im_1.png", "im_1_1st.png"]
    assert [picture.shape[0] for picture in result.pictures] == [128, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "a --f ../x"), "--f ../x (column 3): holds /; pictures stand in --outdir"),
        (("--prompt", "a --f {x|x}/y"), "--f x/y (column 3): holds /"),
        (("--prompt", "a", "--file_name", "{sed}"), "--file_name {sed}: {sed}: no such field; did you mean {seed}?"),
        (("--prompt", "a", "--file_name", "{seed}", "--sequential_file_name"), "are two ways to name files"),
    ],
)
def test_what_is_refused_is_refused_before_a_model_is_loaded(sd1, generate, options, message):
    result = generate(sd1.folder, *options)
    assert result.status == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
