"""Wildcards and weights: what __name__ stands for, which entry a seed chooses, and what is refused."""

import itertools
import json
import math
import os
import random
import string
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import fuzz

from library.errors import InputError
from library.files.wildcards import WildcardFolder
from library.plan.wildcards import MAX_REACH, Wildcards

COLOURS = "# warm\nred\n\n  dark orange \n# cold\nblue\n"
TREE = """\
shapes:
  round:
  - circle
  - 0.5::ring
  flat: [square, 007, 1e3, no, 'a: b']
one: [only]
"""


def write(folder: Path, **files: str | bytes) -> Path:
    """Files of wildcards; `a__b_txt` is a/b.txt."""
    for name, content in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def texts(folder: Path, line: str, seeds: int = 300) -> set[str]:
    dynamic = Wildcards(WildcardFolder(folder)).parse(line, "p.txt:4")
    return {variant.resolve(seed) for variant in dynamic.combinations() for seed in range(seeds)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(
        tmp_path,
        colour_txt=COLOURS,
        cat_txt=b"\xef\xbb\xbftabby\r\nblack\r\n",
        animals__dog_txt="terrier\nhound",
        animals__bird_txt="owl",
        animals__sea__fish_txt="carp",
        animals__more_yaml=TREE,
        nested_txt="a __colour__ {big|small} __animals/bird__\n__animals/*__!",
        _x_txt="hidden",
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("__colour__", "red|dark orange|blue"),
        ("x __cat____animals/bird__ y", "x tabbyowl y|x blackowl y"),
        ("__c*__", "red|dark orange|blue|tabby|black"),
        ("__animals/*__", "terrier|hound|owl|only"),  # of the tree what stands at its top; `*` is no slash
        ("__animals/d*g__", "terrier|hound"),
        ("__*/sea/*__", "carp"),
        ("__animals/**fish__", "carp"),
        ("__animals/shapes/flat__", "square|007|1e3|no|a: b"),
        ("__animals/more/shapes/round__", "circle|ring"),
        ("__animals/shapes/*__", "circle|ring|square|007|1e3|no|a: b"),
        ("{__cat__|dog}", "tabby|black|dog"),
        ("{2$$ & $$__cat__}", "tabby & black|black & tabby"),
        ("{e$$__cat__|x}", "tabby|black|x"),
        ("{e$$2$$+$$__cat__|x}", "tabby+black|tabby+x|black+x"),
        ("{e$$a __animals/bird__|x}", "a owl|x"),
        ("__nested__", "terrier!|hound!|owl!|only!|"
         + "|".join(f"a {c} {s} owl" for c in ("red", "dark orange", "blue") for s in ("big", "small"))),
        ("a_b ___ __ __ snake_case_name \\_\\_", "a_b ___ __ __ snake_case_name \\_\\_"),
        ("_\\_colour__", "_\\_colour__"),
    ],
)  # fmt: skip
def test_what_a_wildcard_stands_for(folder, line, expected):
    assert texts(folder, line) == set(expected.split("|"))


def test_enumerated_entries_are_each_drawn_once_in_their_order(folder):
    dynamic = Wildcards(WildcardFolder(folder)).parse("{e$$__colour__} {e$$__animals/dog__}")
    assert dynamic.count() == 6
    assert [variant.resolve(9) for variant in dynamic.combinations()][:3] == [
        "red terrier", "red hound", "dark orange terrier",
    ]  # fmt: skip


def test_choices_follow_from_the_seed_from_left_to_right_and_in_depth(folder):
    """What one entry leaves to choose comes before what follows it in the line, all of one generator."""
    dynamic = Wildcards(WildcardFolder(folder)).parse("{__colour__|x} {2$$a|b|c} __animals/dog__")
    for seed in range(30):
        rng = random.Random(seed)
        first = rng.sample(["colour", "x"], rng.randint(1, 1))[0]
        if first == "colour":
            first = rng.choice(["red", "dark orange", "blue"])
        pair = ", ".join(rng.sample(["a", "b", "c"], rng.randint(2, 2)))
        assert dynamic.resolve(seed) == f"{first} {pair} {rng.choice(['terrier', 'hound'])}"


@pytest.mark.parametrize(
    "line", ["{0.25::a|0.75::b}", "{1::a|3::b}", "{a| 3::b}", "__w__", "{__w__}", "{0::x|1::a|3::b}"]
)
def test_weights_are_shares(tmp_path, line):
    write(tmp_path, w_txt="a\n3::b\n0::x")
    dynamic = Wildcards(WildcardFolder(tmp_path)).parse(line)
    counts = Counter(dynamic.resolve(seed) for seed in range(2000))
    # 2000 draws at 3/4: 1500 ± 19; five times that
    assert counts["a"] + counts["b"] == 2000
    assert abs(counts["b"] - 1500) < 5 * math.sqrt(2000 * 3 / 16)


def test_weighted_choices_of_several_are_without_return(tmp_path):
    """The first is drawn by the weights, the second by those of the rest."""
    dynamic = Wildcards(WildcardFolder(tmp_path)).parse("{2$$-$$2::a|1::b|1::c}")
    counts = Counter(dynamic.resolve(seed) for seed in range(4000))
    expected = {"a-b": 1 / 4, "a-c": 1 / 4, "b-a": 1 / 6, "c-a": 1 / 6, "b-c": 1 / 12, "c-b": 1 / 12}
    assert counts.keys() == expected.keys()
    for text, share in expected.items():  # five standard deviations of 4000 draws
        assert abs(counts[text] - 4000 * share) < 5 * math.sqrt(4000 * share * (1 - share)), text


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "line", "message"),
    [
        ({}, "a __colur__", "__colur__ (p.txt:4, column 3): no such wildcard in DIR; did you mean __colour__?"),
        ({}, "__z*__", "__z*__ (p.txt:4, column 1): no such wildcard"),
        ({"d__x_txt": "a"}, "__d__", "d is a group of them; write __d/*__ for all"),
        ({"e_txt": "# x\n\n"}, "__e__", "DIR/e.txt: holds no entry"),
        ({"e_yaml": "e: []"}, "__e__", "DIR/e.yaml e: holds no entry"),
        ({"a_txt": "x\n__b__", "b_txt": "\n\ny __a__"}, "__a__",
         "__a__ (DIR/b.txt:3): leads back to itself: __a__ → __b__ → __a__"),
        ({"a_txt": "__a__"}, "{e$$__a__}", "__a__ (DIR/a.txt:1): leads back to itself"),
        ({"d__a_txt": "__d/*__"}, "__d/a__", "__d/*__ (DIR/d/a.txt:1): leads back to itself: __d/a__ → __d/*__"),
        ({"a_txt": "x\n__bb__"}, "__a__", "__bb__ (DIR/a.txt:2): no such wildcard"),
        ({"a_txt": "ok\n{x|y"}, "__a__", "{ (DIR/a.txt:2): is never closed"),
        ({"a_txt": "{e$$x|y}"}, "__a__", "{e$$x|y} (DIR/a.txt:1): only a prompt line can enumerate"),
        ({"a_txt": "0::x\n0::y"}, "__a__", "all its entries have a weight of 0"),
        ({}, "{2$$1::a|0::b}", "picks 2 of 1 variants whose weight is above 0"),
        ({}, "{4$$__colour__}", "picks 4 of 3 variants"),
        ({"a_txt": b"ok\n\xe9"}, "__a__", "DIR/a.txt: line 2, byte 1: 0xE9 is not UTF-8"),
        ({"a_txt": b"x\0y"}, "__a__", "DIR/a.txt: line 1: holds a NUL"),
        ({"a_txt": "x", "a_yaml": "a: [y]"}, "__a__", "is in DIR/a.txt and DIR/a.yaml; rename one"),
        ({"a_yaml": "a:\n  b: 5"}, "__a/b__", "DIR/a.yaml:2: b has no list"),
        ({"a_yaml": "- b"}, "__a__", "DIR/a.yaml:1: is no mapping"),
        ({"a_yaml": "a:\n- b: c"}, "__a__", "DIR/a.yaml:2: an entry is a text or a number"),
        ({"a_yaml": "a:\n- x\n- {y|z} b"}, "__a__", "DIR/a.yaml:3: "),
        ({"a_yaml": "a: [x]\nb: [y]\na: [z]"}, "__a__", "DIR/a.yaml:3: the name 'a' stands here twice"),
        ({"a_yaml": "a:\n  -\n"}, "__a__", "DIR/a.yaml:2: an entry is empty"),
        ({"a_yaml": "a: &x [b]\nc: *x"}, "__a__", "DIR/a.yaml:2: aliases are not read"),
        ({"a_yaml": "a: [!!python/name:os.system x]"}, "__a__", "DIR/a.yaml:1: the tag"),
        ({"a_yaml": "a: [x]\n---\nb: [y]"}, "__a__", "DIR/a.yaml:2: a second document"),
        ({"a_yaml": "a: [x"}, "__a__", "DIR/a.yaml:2: is no YAML"),
        ({"a_yaml": '{"a":' * 2000}, "__a__", "DIR/a.yaml:1: "),
        ({"a_yaml": 'a: ["\\0"]'}, "__a__", "DIR/a.yaml:1: an entry holds what is no text"),
    ],
)  # fmt: skip
def test_what_is_refused_says_where(folder, files, line, message):
    write(folder, **files)
    with pytest.raises(InputError) as error:
        Wildcards(WildcardFolder(folder)).parse(line, "p.txt:4")
    assert message.replace("DIR", str(folder)) in str(error.value)


def test_small_files_cannot_become_endless(tmp_path):
    """Forty files that name the next one twice would be 2^40 texts; many in a row would be too deep for the stack."""
    letters = [f"{first}{second}" for first in "abcdefghijklmnopqr" for second in "abcdefghijklmnopqrst"]
    for number, (name, after) in enumerate(itertools.pairwise(letters)):
        write(tmp_path, **{f"row{name}_txt": f"__row{after}__"})
        if number < 40:
            write(tmp_path, **{f"twice{name}_txt": f"__twice{after}__ __twice{after}__"})
            write(tmp_path, **{f"nothing{name}_txt": f"1::__nothing{after}____nothing{after}__"})
    write(tmp_path, twiceca_txt="x", nothingca_txt="1::", **{f"row{letters[-1]}_txt": "x"})
    for name in ("twiceaa", "nothingaa"):
        with pytest.raises(InputError, match=f"can become [0-9,]+ characters, {MAX_REACH:,} are the limit"):
            Wildcards(WildcardFolder(tmp_path)).parse(f"__{name}__")
    with pytest.raises(InputError, match="more than 50 deep"):
        Wildcards(WildcardFolder(tmp_path)).parse("__rowaa__")
    wildcards = Wildcards(WildcardFolder(tmp_path))
    with pytest.raises(InputError, match="more than 50 deep"):
        for name in reversed(letters):  # each is known when the next is read
            wildcards.parse(f"__row{name}__")


def test_huge_files_and_pipes_are_not_read(tmp_path):
    (tmp_path / "huge.txt").write_bytes(b"a\n" * 3_000_000)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match=r"huge.txt: has more than 4,194,304 bytes"):
        Wildcards(WildcardFolder(tmp_path)).parse("__huge__")
    with pytest.raises(InputError, match="no such wildcard"):
        Wildcards(WildcardFolder(tmp_path)).parse("__pipe__")


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def facts(result) -> list[dict]:
    assert result.status == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_pictures_of_a_file_with_wildcards(folder, sd1, generate, tmp_path):
    prompts = tmp_path / "p.list"
    prompts.write_text("a __colour__ x --n __cat__ --s {3|4} --d 5\n{e$$__animals/dog__} --d 6\n")
    command = (sd1.folder, "--from_file", prompts, "--wildcard_dir", folder, "--images_per_prompt", 2)
    made = facts(generate(*command, "--json"))
    assert [each["raw_prompt"][:10] for each in made] == ["a __colour"] * 2 + ["{e$$__anim"] * 2
    assert [each["prompt"] for each in made[2:]] == ["terrier", "hound"]
    assert made[0]["prompt"] in ("a red x", "a dark orange x", "a blue x")
    assert made[0]["negative_prompt"] in ("tabby", "black")
    assert {**made[0], "file": ""} == {**made[1], "file": ""}  # of equal seeds equal choices
    again = facts(generate(*command, "--json", "--dry_run", outdir=tmp_path / "other"))
    assert [each["prompt"] for each in again] == [each["prompt"] for each in made]


def test_without_the_option_wildcards_are_text_with_one_warning(folder, sd1, generate):
    result = generate(sd1.folder, "--prompt", "__colour__ __cat__", "--images_per_prompt", 2, "--dry_run", "--json")
    assert [each["prompt"] for each in facts(result)] == ["__colour__ __cat__"] * 2
    assert result.stderr.count("--wildcard_dir") == 1
    assert "warning: --prompt" not in result.stderr.replace("warning: __colour__ is taken as text", "")


def test_faults_are_told_before_a_model_is_loaded_each_once(folder, sd1, generate, tmp_path):
    write(folder, a_txt="x\n{y")
    prompts = tmp_path / "p.list"
    prompts.write_text("__a__\n__a__\n__colou__\n")
    result = generate(sd1.folder, "--from_file", prompts, "--wildcard_dir", folder)
    assert result.status == 2
    assert result.stderr == (
        f"error: {{ ({folder}/a.txt:2): is never closed; add the }} after the last variant\n"
        f"error: __colou__ ({prompts}:3, column 1): no such wildcard in {folder}; did you mean __colour__?\n"
    )
    missing = generate(sd1.folder, "--prompt", "a", "--wildcard_dir", folder / "none")
    assert missing.stderr.startswith(f"error: --wildcard_dir {folder / 'none'}: is no folder")


def test_a_run_is_gone_on_with_only_with_its_wildcards(folder, sd1, generate, tmp_path):
    prompts = tmp_path / "p.list"
    prompts.write_text("a __colour__\n__animals/d*__\n")
    command = (sd1.folder, "--from_file", prompts, "--wildcard_dir", folder, "--resume", "--seed", 3)
    assert len(generate(*command).files) == 2
    (folder / "unused.txt").write_text("x")
    (folder / "animals" / "bird.txt").write_text("wren")
    prompts.write_text(prompts.read_text() + "__animals/bird__\n")  # a file that the run has not had
    grown = generate(*command)
    assert (grown.status, len(grown.files)) == (0, 1)
    assert generate(*command).files == []
    (folder / "animals" / "bird.txt").write_text("owl")
    changed = generate(*command)
    assert changed.stderr.startswith(f"error: {folder}/animals/bird.txt: has changed since the run to resume was begun")
    (folder / "animals" / "bird.txt").write_text("wren")
    (folder / "animals" / "dodo.txt").write_text("x\ny\nz")
    assert generate(*command).stderr.startswith(f"error: {folder}/animals/dodo.txt: is no part of the run to resume")
    (folder / "animals" / "dodo.txt").unlink()
    other = tmp_path / "other"
    other.mkdir()
    assert "--wildcard_dir" in generate(*command[:4], other, *command[5:]).stderr
    assert generate(*command).files == []


# ---------------------------------------------------------------------------------------------------------------------
# Anything at all

PIECES = [
    "__a__",
    "__b__",
    "__c__",
    "__d/x__",
    "__*__",
    "__d/*__",
    "{",
    "}",
    "|",
    "e$$",
    "2$$",
    "0.5::",
    "0::",
    "__",
    "_",
]
PIECES += ["::", "$$", "#", "\n", " ", "*", "/", "--n ", "AND", "\\"]
marked = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=8).map("".join)
yaml_like = st.lists(
    st.one_of(
        st.sampled_from(["a:", "\n", "  ", "- ", "[", "]", "x", ": ", "&q ", "*q", "{", "}", "'", "!t ", "|", "\t"])
    ),
    max_size=16,
).map("".join)


@fuzz
@given(marked, st.lists(marked, min_size=3, max_size=3), yaml_like)
def test_no_file_and_no_line_raises_anything_else_or_hangs(tmp_path_factory, line, files, tree):
    folder = tmp_path_factory.getbasetemp() / "wild"
    (folder / "d").mkdir(parents=True, exist_ok=True)
    for name, content in zip(("a", "b", "d/x"), files):
        (folder / f"{name}.txt").write_bytes(content.encode("utf-8", "surrogatepass"))
    for tree_text in (None, tree):
        (folder / "c.yaml").write_text(tree_text or "c: [x, y]", encoding="utf-8")
        for wildcards in (Wildcards(), Wildcards(WildcardFolder(folder))):
            try:
                dynamic = wildcards.parse(line, "f:1")
            except InputError as problem:
                assert len(str(problem)) < 1000 + len(line) + len(str(folder)) * 2
                continue
            for variant, seed in zip(dynamic.combinations(), range(3)):
                text = variant.resolve(seed)
                assert text == variant.resolve(seed)
                if not dynamic.is_dynamic:
                    assert text == line


@fuzz
@given(st.text(string.ascii_letters + "_ *./-\\()[]:", max_size=60))
def test_what_is_text_stays_as_it_is(text):
    assert Wildcards().parse(text).resolve(0) == text
