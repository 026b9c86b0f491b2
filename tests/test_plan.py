"""Prompt files, seeds, names and batches."""

import random
from datetime import datetime
from pathlib import Path

import pytest

from library.errors import InputError
from library.files.families import SD1
from library.plan.all_jobs import count_pictures, plan_jobs
from library.plan.batches import group_into_batches
from library.plan.file_names import FileNames
from library.plan.job import Job, JobSettings
from library.plan.job_maker import JobMaker
from library.plan.prompt_syntax import SD_SCRIPTS
from library.plan.seeds import SeedSource
from library.plan.sources import SourceLine, read_prompt_file, typed_line

NOW = datetime(2026, 11, 23, 4, 5, 6)


def make_jobs(lines, seed=None, images=1, iterations=1, same=False, shuffle=None) -> list[Job]:
    lines = [SourceLine(text, f"f:{number}") for number, text in enumerate(lines, 1)]
    seeds = SeedSource(seed, count_pictures(lines, images, iterations), same_in_iteration=same)
    names = FileNames(Path("does-not-exist"), sequential=True, now=NOW)
    maker = JobMaker(JobSettings(), images, SD1)
    return plan_jobs(lines, maker, seeds, names.next, iterations, shuffle)


def test_prompt_files_keep_line_numbers(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# comment\r\na cat\n\n# x\n b\u2028c\x0b \rlast".encode())
    lines = read_prompt_file(str(file))
    numbers = [int(line.where.rpartition(":")[2]) for line in lines]
    assert [line.text.strip() for line in lines] == ["a cat", "b\u2028c", "last"]
    assert numbers == [2, 5, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a cat".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a\n猫".encode("cp932"), "line 2, byte 1: 0x94 is not UTF-8"),
        (b"a\nb\0c", "line 2: holds a NUL"),
        (b"# only\n\n# comments", "holds no prompt"),
        (b"", "holds no prompt"),
    ],
)
def test_prompt_files_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match="--from_file") as error:
        read_prompt_file(str(file))
    assert message in str(error.value)


def test_line_breaks_in_an_argument_are_spaces():
    assert typed_line("a cat, \n    a dog\r\n  --n bad", "--prompt", SD_SCRIPTS).text == "a cat, a dog --n bad"


def test_one_picture_has_the_seed_itself():
    assert [job.seed for job in make_jobs(["a"], seed=7)] == [7]


def test_several_pictures_draw_their_seeds_from_it():
    rng = random.Random(7)
    expected = [rng.randint(0, 0x7FFFFFFF) for _ in range(12)]
    assert [job.seed for job in make_jobs(["a", "b"], seed=7, images=3, iterations=2)] == expected


def test_seeds_of_a_line_win_and_the_last_one_stays():
    jobs = make_jobs(["a --d 5,6", "b"], seed=7, images=3)
    rng = random.Random(7)
    assert [job.seed for job in jobs] == [5, 6, 6, *(rng.randint(0, 0x7FFFFFFF) for _ in range(3))]


def test_an_iteration_can_share_one_seed():
    seeds = [job.seed for job in make_jobs(["a", "b --d 3"], seed=7, images=2, iterations=2, same=True)]
    assert seeds[0] == seeds[1] != seeds[4] == seeds[5]
    assert seeds[2:4] == seeds[6:8] == [3, 3]
    assert seeds == [job.seed for job in make_jobs(["a", "b --d 3"], seed=7, images=2, iterations=2, same=True)]


def test_without_a_seed_each_run_differs():
    assert [job.seed for job in make_jobs(["a"], images=3)] != [job.seed for job in make_jobs(["a"], images=3)]


def test_enumerated_lines_give_one_picture_each():
    jobs = make_jobs(["{e$$a|b} {e$$c|d} --d 1,2", "x"], images=3)
    assert [job.prompt for job in jobs] == ["a c", "a d", "b c", "b d", "x", "x", "x"]
    assert [job.seed for job in jobs][:4] == [1, 2, 2, 2]
    assert jobs[0].raw_prompt == "{e$$a|b} {e$$c|d} --d 1,2"


def test_random_variants_follow_from_the_seed_alone():
    first = make_jobs(["{a|b|c|d} --w {64|128}"], seed=1, images=8)
    again = [make_jobs([f"{{a|b|c|d}} --w {{64|128}} --d {job.seed}"])[0] for job in first]
    assert [(job.prompt, job.width) for job in first] == [(job.prompt, job.width) for job in again]
    assert len({job.prompt for job in first}) > 1


def test_a_seed_cannot_be_left_to_chance():
    with pytest.raises(InputError, match="--d"):
        make_jobs(["a --d {1|2|3|4|5|6|7|8|9}"], images=10)


def test_options_hold_for_their_own_line():
    jobs = make_jobs(["a --w 64 --n x", "b"])
    assert [(job.width, job.negative_prompt) for job in jobs] == [(64, "x"), (512, "")]


def test_shuffling_is_repeatable_and_complete():
    lines = list("abcdefgh")
    first, again = (make_jobs(lines, seed=1, iterations=2, shuffle=random.Random(1)) for _ in range(2))
    prompts = [job.prompt for job in first]
    assert prompts == [job.prompt for job in again]
    assert sorted(prompts[:8]) == sorted(prompts[8:]) == lines
    assert prompts[:8] != prompts[8:]


def test_too_many_pictures_are_refused():
    with pytest.raises(InputError, match="2,000,000 pictures"):
        make_jobs(["a", "b"], images=1000, iterations=1000)


def test_batches_fill_over_the_whole_run():
    jobs = make_jobs([f"p{n} --w {64 if n % 2 else 128} --d {n}" for n in range(10)])
    batches = group_into_batches(jobs, 4, lambda job: job.batch_key)
    assert [[job.seed for job in batch] for batch in batches] == [[0, 2, 4, 6], [1, 3, 5, 7], [8], [9]]


def test_branches():
    jobs = make_jobs(["a --l 1", "a --l 2 --n x", "a --nl 2 --n x", "a --l 1 --nl 2"])
    assert [job.texts_at(0) for job in jobs] == [("a",), ("x", "a"), ("x", "a", ""), ("a",)]


# ---------------------------------------------------------------------------------------------------------------------


def test_names_collide_with_nothing(tmp_path):
    (tmp_path / "im_20261123040506_000_7.png").touch()
    names = FileNames(tmp_path, sequential=False, now=NOW)
    assert [names.next(seed).name for seed in (7, 7)] == [
        "im_20261123040506_000_7-1.png",
        "im_20261123040506_001_7.png",
    ]


def test_sequential_names_go_on_after_the_highest(tmp_path):
    for name in ("im_000003.png", "im_000041.png", "im_000050-1.png", "im_12.png", "im_000099.txt"):
        (tmp_path / name).touch()
    names = FileNames(tmp_path, sequential=True, now=NOW)
    assert [names.next(0).name for _ in range(2)] == ["im_000051.png", "im_000052.png"]
