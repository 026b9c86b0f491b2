"""Random prompt lines, options, headers and manifests: refused in one line or taken, no traceback, no hang.

`HYPOTHESIS_PROFILE=long pytest tests/test_fuzz.py` goes on for an hour or so.
"""

import contextlib
import io
import json
import os
import struct
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gen_img_diffusers
from library.errors import InputError
from library.files.families import SD1
from library.files.weight_files import open_weights
from library.plan.all_jobs import count_pictures, plan_jobs
from library.plan.earlier_runs import read_runs
from library.plan.emphasis import parse_emphasis
from library.plan.file_names import FileNames
from library.plan.job import JobSettings
from library.plan.job_maker import JobMaker
from library.plan.line_text import prompt_line
from library.plan.prompt_lines import PROMPT_OPTIONS, one_line
from library.plan.seeds import SeedSource
from library.plan.sources import SourceLine
from library.settings.samplers import SAMPLERS

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
fuzz = settings(
    max_examples=100_000 if LONG else 150,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
heavy = settings(fuzz, max_examples=5_000 if LONG else 25)

MARKS = [
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "|",
    "$$",
    "e$$",
    "2-3$$",
    ":1.3",
    "\\",
    "BREAK",
    " AND ",
    " --",
    "—",
    "\u2028",
    "#",
]
words = st.one_of(st.sampled_from(MARKS), st.text(max_size=12), st.from_regex(r"[a-z ]{1,8}", fullmatch=True))
values = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.sampled_from(["1,2,3", "none", "0.5", "64", "512x768", "1,,2", "nan", "٣", "{64|72}"]),
)
options_in_lines = st.tuples(st.sampled_from([*PROMPT_OPTIONS, "x", "prompt"]), values).map(
    lambda o: f" --{o[0]} {o[1]}"
)
lines = st.lists(st.one_of(words, options_in_lines), max_size=12).map("".join).map(one_line)


def make_jobs(text: str):
    line = SourceLine(text, "f:1")
    pictures = count_pictures([line], 2, 1)
    if pictures > 1000:
        return []
    names = FileNames(Path("does-not-exist"), sequential=True, now=datetime(2026, 11, 23))
    maker = JobMaker(JobSettings(sampler="euler_a"), 2, SD1)
    return plan_jobs([line], maker, SeedSource(1, pictures), names.next, 1)


@fuzz
@given(lines)
def test_prompt_lines(text):
    try:
        jobs = make_jobs(text)
    except InputError as problem:
        assert len(str(problem)) < 1000 + len(text)
        return
    for job in jobs:
        pieces = parse_emphasis(job.prompt)
        assert all(abs(weight) <= 1000 for _, weight in pieces)
        assert 0 < job.width <= 16384


@fuzz
@given(
    st.lists(st.one_of(st.from_regex(r"[a-z(): ]{1,8}", fullmatch=True), options_in_lines), max_size=6)
    .map("".join)
    .map(one_line)
)
@example(" --n 0\x850 \u2028")
def test_the_line_of_a_job_gives_the_job_again(text):
    try:
        jobs = make_jobs(text)
    except InputError:
        return
    for job in jobs:
        (again, *_) = make_jobs(prompt_line(job, JobSettings(), 512))
        for name in ("prompt", "negative_prompt", "seed", "width", "height", "steps", "guidance_scale", "deep_shrink"):
            assert getattr(again, name) == getattr(job, name), prompt_line(job, JobSettings(), 512)


def known_options() -> list[str]:
    parser = gen_img_diffusers.make_parser()
    names = [name for action in parser._actions for name in action.option_strings]
    return [name for name in names if name not in ("--interactive", "--from_file", "--outdir", "--debug")]


arguments = st.lists(st.one_of(st.sampled_from(known_options()), values, st.sampled_from(sorted(SAMPLERS))), max_size=5)


@heavy
@given(arguments)
def test_options(sd1, tmp_path_factory, given_arguments):
    out = tmp_path_factory.mktemp("out")
    argv = ["--ckpt", str(sd1.folder), "--prompt", "a", "--outdir", str(out), *given_arguments, "--dry_run"]
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = gen_img_diffusers.main(argv)
        except SystemExit as leaving:
            status = leaving.code or 0
    assert status in (0, 2), (argv, error.getvalue())
    assert "Traceback" not in error.getvalue()
    assert list(out.iterdir()) == []


tensor_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "X", 3, None]),
        "shape": st.one_of(st.lists(st.integers(-2, 2**62), max_size=4), st.text(max_size=3)),
        "data_offsets": st.one_of(st.lists(st.integers(-5, 2**62), max_size=3), st.just([0, 8])),
    },
)
headers = st.dictionaries(
    st.one_of(st.just("__metadata__"), st.text(max_size=8)), st.one_of(tensor_entries, st.integers())
)


@fuzz
@given(
    st.one_of(headers.map(json.dumps).map(str.encode), st.binary(max_size=60)),
    st.integers(-9, 9),
    st.binary(max_size=40),
)
def test_weight_files(tmp_path_factory, header, off, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(header) + off)) + header + data)
    try:
        weights = open_weights(path)
        for name in weights.shapes:
            weights.tensor(name)
    except InputError as problem:
        assert str(path) in str(problem)


@fuzz
@given(st.binary(max_size=200), st.integers(0, 3), st.lists(st.sampled_from(["run", "picture"]), max_size=4))
def test_manifests(tmp_path_factory, noise, cut, kinds):
    folder = tmp_path_factory.getbasetemp() / "manifests"
    folder.mkdir(exist_ok=True)
    known = {
        "run": {"run": "1", "started": "", "versions": {}, "model": "m", "options": {}, "files": {}, "parts": []},
        "picture": {"job": "j", "file": "f.png", "sha256": "0"},
    }
    content = b"\n".join(json.dumps(known[kind]).encode() for kind in kinds)
    (folder / "manifest.jsonl").write_bytes(content[: len(content) - cut] + noise)
    runs = read_runs(folder)
    assert len(runs) <= 1


@pytest.mark.parametrize(
    "line", ['{"parts": 3}', '{"parts": [1], "run": 5}', '{"job": [], "file": {}, "sha256": 1}', "[]"]
)
def test_odd_lines_of_manifests(tmp_path, line):
    (tmp_path / "manifest.jsonl").write_text(line)
    assert read_runs(tmp_path) == []
