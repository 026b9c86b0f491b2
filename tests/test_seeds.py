"""Seeds in prompt lines: ranges, new ones, as many pictures as seeds, and runs of the version that drew one picture."""

import json

import pytest


def planned(generate, *options: object) -> tuple[list[int], str]:
    result = generate("examples/shapes", "--dry_run", "--json", *options)
    assert result.status == 0, result.stderr
    return [json.loads(line)["seed"] for line in result.stdout.splitlines()], result.stderr


@pytest.mark.parametrize(
    ("said", "seeds"), [("1,2,3", [1, 2, 3]), ("5-8", [5, 6, 7, 8]), ("9, 2 - 3,9", [9, 2, 3, 9]), ("4", [4])]
)
def test_a_line_has_as_many_pictures_as_seeds(generate, said, seeds):
    assert planned(generate, "--prompt", f"a --d {said} --s 1")[0] == seeds
    assert planned(generate, "--prompt", f"{{a|b}} --d {said}")[0] == seeds


def test_a_number_that_is_given_wins_and_seeds_without_a_picture_are_told(generate):
    seeds, messages = planned(generate, "--prompt", "a --d 5-8", "--images_per_prompt", 2)
    assert seeds == [5, 6]
    assert messages.startswith("warning: --d has 2 seeds more than the 2 pictures of the line; ")
    assert planned(generate, "--prompt", "a --d 5,6", "--images_per_prompt", 3)[0] == [5, 6, 6]
    assert "--d has 1 seed more than the 2 pictures" in planned(generate, "--prompt", "{e$$a|b} --d 1,2,3")[1]


def test_minus_one_is_a_new_seed_that_the_runs_seed_decides(generate):
    options = ("--prompt", "a --d 7,-1,-1")
    first, second = (planned(generate, *options)[0] for _ in range(2))
    assert first[0] == second[0] == 7
    assert len({*first, *second}) == 5
    assert planned(generate, *options, "--seed", 3) == planned(generate, *options, "--seed", 3)
    assert planned(generate, "--prompt", "a", "--seed", -1)[0] != planned(generate, "--prompt", "a", "--seed", -1)[0]


def test_ranges_that_are_none(generate):
    for said in ("8-5", "1-999999999", "-3", "a-b"):
        result = generate("examples/shapes", "--prompt", f"a --d {said}")
        assert (result.status, result.stderr.count("\n")) == (2, 1)
        assert result.stderr.startswith(f"error: --d {said} (column 3): ")


def test_equal_pictures_of_one_iteration_are_told(generate):
    options = ("--iter_same_seed", "--images_per_prompt", 3)
    assert "--iter_same_seed: 2 of 3 pictures are as another" in planned(generate, "--prompt", "a", *options)[1]
    assert "warning" not in planned(generate, "--prompt", "a", "--iter_same_seed", "--n_iter", 3)[1]


def test_runs_of_the_version_that_drew_one_picture_are_gone_on_with(generate, sd1, tmp_path):
    """Its manifests say that one picture a prompt was asked for."""
    command = ("--prompt", "a --d 1,2,3", "--seed", 1)
    made = generate(sd1.folder, *command, "--images_per_prompt", 1)
    assert len(made.files) == 1
    again = generate(sd1.folder, *command, "--resume")
    assert (again.status, again.files) == (0, [])
    made.files[0].unlink()
    assert generate(sd1.folder, *command, "--resume").files == made.files
    new = generate(sd1.folder, *command, outdir=tmp_path / "new")
    new.files[1].unlink()
    assert generate(sd1.folder, *command, "--resume", outdir=tmp_path / "new").files == new.files[1:2]
