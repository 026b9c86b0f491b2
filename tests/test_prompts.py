"""Prompt lines: options, dynamic variants, emphasis."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.errors import InputError
from library.plan.dynamic_prompts import parse_dynamic_prompt
from library.plan.emphasis import BREAK, MAX_WEIGHT, parse_emphasis
from library.plan.job import JobSettings
from library.plan.prompt_lines import PROMPT_OPTIONS, parse_prompt_line


def test_options_are_taken_apart():
    line = parse_prompt_line("a cat --n a dog, (bad:1.2) --w 640 --h 96 --s 7 --d 1,2,3 --l 5.5 --nl none")
    assert line.prompt == "a cat"
    assert line.settings == {
        "negative_prompt": "a dog, (bad:1.2)",
        "width": 640,
        "height": 96,
        "steps": 7,
        "seeds": (1, 2, 3),
        "guidance_scale": 5.5,
        "negative_scale": None,
    }


def test_every_option_sets_a_field_of_a_job():
    for option in PROMPT_OPTIONS.values():
        if option.sets != "seeds":
            JobSettings().override({option.sets: None})  # TypeError or AttributeError when there is no such field


@pytest.mark.parametrize(
    ("line", "prompt", "settings"),
    [
        ("--n bad --d 1", "", {"negative_prompt": "bad", "seeds": (1,)}),
        ("a cat --N bad --D 1", "a cat", {"negative_prompt": "bad", "seeds": (1,)}),
        ("a well-known cat--not an option", "a well-known cat--not an option", {}),
        ("a cat --n", "a cat", {"negative_prompt": ""}),
        ("a cat\t--w\t64", "a cat", {"width": 64}),
        ("a\u2028cat\x0b\x0cx --d 1", "a\u2028cat\x0b\x0cx", {"seeds": (1,)}),
    ],
)
def test_lines_with_unusual_options(line, prompt, settings):
    parsed = parse_prompt_line(line)
    assert (parsed.prompt, parsed.settings) == (prompt, settings)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --w abc", "--w abc (f.txt:3, column 7): not a whole number"),
        ("a cat --w 500", "must be a multiple of 8; use 496 or 504"),
        ("a cat --w 512x768", "--w 512x768"),
        ("a cat --h 512.9", "--h 512.9"),
        ("a cat --l -1", "out of range"),
        ("a cat --l nan", "not a finite number"),
        ("a cat --d 1,,2", "--d 1,,2"),
        ("a cat --s 0", "from 1 to 1000"),
        ("a cat --s", "needs a value"),
        ("a cat --q 5", "no such prompt option"),
        ("a cat --nn 5", "did you mean --n?"),
        ("a cat --d 1 --d 2", "given twice"),
        ("a cat -- d", "no such prompt option"),
    ],
)
def test_faults_in_options_name_line_and_column(line, message):
    with pytest.raises(InputError) as error:
        parse_prompt_line(line, "f.txt:3")
    assert message in str(error.value)
    assert "f.txt:3, column " in str(error.value)


def test_an_option_with_a_long_dash_is_text_with_a_warning():
    line = parse_prompt_line("a cat —w 512 wide")
    assert line.prompt == "a cat —w 512 wide"
    assert "two hyphens: --w" in line.warnings[0]


# ---------------------------------------------------------------------------------------------------------------------


def test_enumeration_multiplies_groups_first_slowest():
    dynamic = parse_dynamic_prompt("{e$$1-2$$ and $$a|b|c} x {e$$p|q}")
    texts = [variant.resolve(0) for variant in dynamic.combinations()]
    assert texts[:4] == ["a x p", "a x q", "b x p", "b x q"]
    assert texts[-2:] == ["b and c x p", "b and c x q"]
    assert len(texts) == dynamic.count() == 12


def test_random_choice_is_drawn_from_the_seed():
    dynamic = parse_dynamic_prompt("a {red|green|blue} {2$$cat|dog|cow}")
    for seed in range(20):
        rng = random.Random(seed)
        rng.randint(1, 1)
        colour = rng.sample(["red", "green", "blue"], 1)[0]
        rng.randint(2, 2)
        animals = ", ".join(rng.sample(["cat", "dog", "cow"], 2))
        assert dynamic.resolve(seed) == f"a {colour} {animals}"


@pytest.mark.parametrize("text", ["{}", "{a}", "{|a}", "{$$a|b}", "{2-1$$a|b}", "{2$$$$a|b}", "a } b", "{0$$a|b}"])
def test_odd_groups_have_a_meaning(text):
    parse_dynamic_prompt(text).resolve(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {5$$a|b}", "(f:1, column 3): picks 5 of 2 variants"),
        ("a {a|b", "(f:1, column 3): is never closed"),
        ("{a|{b|c}}", "(f:1, column 1): holds another {"),
        ("{e$$a|b|c|d|e|f|g|h|i|j}" * 7, "1,000,000 combinations or more, the limit is 100,000"),
        ("{e$$1-20000$$" + "|".join("a" * 20_000) + "}", "combinations or more"),
    ],
)
def test_faults_in_groups(text, message):
    with pytest.raises(InputError, match="error|column|combinations") as error:
        parse_dynamic_prompt(text, "f:1")
    assert message in str(error.value)


def test_an_unclosed_brace_of_many_variants_takes_linear_time():
    def seconds(count: int) -> float:
        text = "{" + "|".join(map(str, range(count)))
        start = time.process_time()
        for _ in range(20):
            with pytest.raises(InputError):
                parse_dynamic_prompt(text)
        return time.process_time() - start

    seconds(1000)
    # a quadratic parser takes 400 times as long for 20 times the text
    assert seconds(20_000) < 100 * max(seconds(1000), 1e-3)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("(x)", [("x", 1.1)]),
        ("[x]", [("x", 1 / 1.1)]),
        ("(x:1.3)", [("x", 1.3)]),
        ("((x))", [("x", pytest.approx(1.21))]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
        (r"\(x\) \[y\] \\", [(r"(x) [y] " + "\\", 1.0)]),
        (r"a\b", [("ab", 1.0)]),
        ("(x", [("x", 1.1)]),
        ("x))", [("x))", 1.0)]),
        ("[x:1.3]", [("x:1.3", 1 / 1.1)]),
        ("x:1.3)", [("x:1.3)", 1.0)]),
        ("(x:1.2.3)", [("x:1.2.3", 1.1)]),
        ("(x:1e44)", [("x:1e44", 1.1)]),
        ("[[", []),
        ("", []),
        ("a BREAK b", [("a ", 1.0), (BREAK, 1.0), (" b", 1.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("(a)(b)c", [("ab", 1.1), ("c", 1.0)]),
        ("([a)b]", [("a", pytest.approx(1.0)), ("b", 1 / 1.1)]),
    ],
)
def test_emphasis(text, pieces):
    assert parse_emphasis(text) == pieces


@given(st.text(alphabet="ab()[]\\:1.3 BREAK", max_size=300))
def test_weights_stay_finite_and_letters_are_kept(text):
    pieces = parse_emphasis(text)
    assert all(abs(weight) <= MAX_WEIGHT for _, weight in pieces)
    kept = "".join(piece or "BREAK" for piece, _ in pieces)
    assert [c for c in kept if c in "abREAK"] == [c for c in text if c in "abREAK"]


def test_deep_nesting_is_bounded():
    assert parse_emphasis("(" * 200 + "a") == [("a", MAX_WEIGHT)]
    assert parse_emphasis("(" * 200 + "a:0)") == [("a", 0.0)]
    assert parse_emphasis("(" * 10_000 + "a") == [("(" * (10_000 - 256) + "a", MAX_WEIGHT)]
    assert "a" in parse_emphasis("([" * 20_000 + "a" + ")]" * 20_000)[0][0]
