"""The web UI's prompt syntax: prompt editing, composed parts, tags' texts, comments and the comma rule."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_fuzz import fuzz

from library.files.families import SD1
from library.files.tokenizers import SHIPPED_TOKENIZER, load_tokenizer
from library.plan.job import Job, JobSettings
from library.plan.line_text import prompt_line
from library.plan.prompt_editing import MAX_NESTING, Moment, parse_editing
from library.plan.prompt_syntax import SYNTAXES, WEB_UI, read_prompt, without_comments
from library.plan.tokens import PADDING, PromptTokens

WEBUI = ("--prompt_syntax", "webui")


def make_job(**settings) -> Job:
    usual = {"seed": 1, "raw_prompt": "", "where": "", "file": Path("a.png"), "width": 512, "height": 512}
    return Job(**usual | settings)


def schedule(prompt: str, steps: int = 10, before: int = 0) -> list[tuple[int, str]]:
    """The last step of each text, and the text."""
    edited = parse_editing(prompt)
    found: list[tuple[int, str]] = []
    for step in range(1, steps + 1):
        text = edited.at(Moment(step, steps, before))
        if found and found[-1][1] == text:
            found.pop()
        found.append((step, text))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Grammar


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        # the web UI's own documented examples
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        # each rule
        ("[a::4]b", [(4, "ab"), (10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:1]", [(1, "a"), (10, "b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-3]", [(10, "b")]),
        ("[a:b:0.29]", [(2, "a"), (10, "b")]),
        ("[a:b:1e1]", [(10, "a")]),
        ("[a:b:99]", [(10, "a")]),
        ("([a:b:2]:1.2)", [(2, "(a:1.2)"), (10, "(b:1.2)")]),
        ("[[a:b:2]]", [(2, "[a]"), (10, "[b]")]),
        ("[:x:0.5]", [(5, ""), (10, "x")]),
        # what does not parse is text
        ("[a:b]", [(10, "[a:b]")]),
        ("[a:b:c:2]", [(10, "[a:b:c:2]")]),
        ("[a|b:c]", [(10, "[a|b:c]")]),
        ("[x:(a:2]", [(10, "[x:(a:2]")]),
        ("[x:y):2]", [(10, "[x:y):2]")]),
        ("a | b : c", [(10, "a | b : c")]),
        # what is escaped is no mark
        ("\\[a:b:2]", [(10, "\\[a:b:2]")]),
        ("[a\\:b:c:2]", [(2, "a\\:b"), (10, "c")]),
        ("[a\\]:b:2]", [(2, "a\\]"), (10, "b")]),
        ("a\\", [(10, "a\\")]),
    ],
)
def test_text_changes_as_in_the_web_ui(prompt, texts):
    assert schedule(prompt) == texts


def test_shares_above_1_and_steps_beyond_the_first_stage_are_for_the_second():
    assert schedule("a [b:.5] c", before=10) == [(10, "a b c")]
    assert schedule("a [b:1.5] c", before=10) == [(5, "a  c"), (10, "a b c")]
    assert schedule("a [b:1.5] c") == [(10, "a  c")]
    assert schedule("[a:b:23]", before=20) == [(3, "a"), (10, "b")]
    assert schedule("[a:b:3]", before=20) == [(10, "b")]


def test_variants_take_turns():
    def turns(prompt):
        return [parse_editing(prompt).at(Moment(step, 10)) for step in range(1, 6)]

    assert turns("[a|(b:1.1)]") == ["a", "(b:1.1)", "a", "(b:1.1)", "a"]
    assert turns("[fe|]male") == ["female", "male", "female", "male", "female"]
    assert turns("[fe|||]male") == ["female", "male", "male", "male", "female"]
    assert turns("[|a]") == ["", "a", "", "a", ""]
    assert turns("[[a|b]|[c:d:3]]") == ["a", "c", "a", "d", "a"]


@fuzz
@given(st.text(alphabet="ab[]():|\\.5 AND<>lora,#", max_size=60), st.sampled_from(SYNTAXES))
def test_every_text_is_read_and_what_is_text_stays(text, syntax):
    """Nothing raises; what is said is made of the prompt's own characters; without marks it is the prompt itself."""
    said = read_prompt(text, syntax)
    assert said.parts
    for step in (1, 2, 7):
        for part in said.parts:
            left = iter(text)  # the text is a subsequence of the prompt
            assert all(character in left for character in part.text.at(Moment(step, 7)))
    edited = parse_editing(text)
    if not edited.changes:
        assert edited.at(Moment(1, 1)) == text


@pytest.mark.parametrize("unit", ["[", "([", "[a|", "[a:", "]", "a:b|c)("])
def test_long_nests_take_no_time_and_keep_their_text(unit):
    text = unit * 30_000
    assert parse_editing(text).at(Moment(1, 1)) == text


def test_deeper_brackets_than_anybody_needs_are_text():
    depth = MAX_NESTING + 50
    edited = parse_editing("[" * depth + "a|b" + "]" * depth)
    assert "a" in edited.at(Moment(1, 2))


def test_parts_have_weights_where_AND_joins_them():
    def parts(prompt):
        return [(part.text.at(Moment(1, 1)), part.weight) for part in read_prompt(prompt, WEB_UI).parts]

    assert parts("a cat AND a dog :0.6 AND a (bird:1.2):-1.5") == [("a cat", 1), ("a dog", 0.6), ("a (bird:1.2)", -1.5)]
    assert parts("a photo, 16:9") == [("a photo, 16:9", 1)]
    assert parts("BRAND and SAND") == [("BRAND and SAND", 1)]
    assert parts("a\tAND,b: 2 ") == [("a", 1), (",b", 2)]
    assert parts("AND") == [("", 1), ("", 1)]
    assert parts("a \\:2 AND b:x") == [("a \\:2", 1), ("b:x", 1)]
    assert len(parts("a" + " " * 300_000 + "b AND c")) == 2


def test_tags_are_taken_out_of_the_text():
    said = read_prompt("a <lora:my style:0.8> cat<LyCO:b> <x:y>", WEB_UI)
    assert said.parts[0].text.at(Moment(1, 1)) == "a  cat <x:y>"
    assert said.tags == (("my style", ("0.8",), "lora"), ("b", (), "LyCO"))
    assert read_prompt("a <lora:b:1>", "sd-scripts").tags == ()


def test_comments_end_with_their_line_or_at_the_next_option():
    assert without_comments("a cat # nice\n# whole line\nb #--x") == "a cat \n\nb "
    assert without_comments("a # note --n bad # more --s 20") == "a  --n bad  --s 20"
    assert without_comments("  # all of it --n bad\na") == "\na"
    assert without_comments("in \\#ff0000 # note") == "in #ff0000 "


def test_lines_for_drawing_again_keep_their_hashes(sd1, generate, tmp_path):
    """A picture's line gives its prompt again, and lines that are all comment give none."""
    (tmp_path / "failed.txt").write_text(
        "# Pictures that failed; --resume tries them again\n# a --n b\na \\# b --n c#d --d 4\n"
    )
    told = generate(sd1.folder, *WEBUI, "--from_file", tmp_path / "failed.txt", "--dry_run", "--json")
    assert told.status == 0, told.stderr
    (picture,) = map(json.loads, told.stdout.splitlines())
    assert (picture["prompt"], picture["negative_prompt"]) == ("a # b", "c")
    job = make_job(prompt="a # b", negative_prompt="c#d", prompt_syntax=WEB_UI)
    assert without_comments(prompt_line(job, JobSettings(), 512)) == "a # b --n c#d --d 1"


# ---------------------------------------------------------------------------------------------------------------------
# Commas


def tokens(**settings) -> PromptTokens:
    tokenizer = load_tokenizer(SHIPPED_TOKENIZER, SD1)
    return PromptTokens(tokenizer, SD1.encoders, 49408, max_chunks=9, **settings)


@pytest.mark.parametrize(("after", "moves"), [(1, True), (19, True), (20, False), (74, False)])
def test_what_follows_the_last_comma_goes_on_to_the_next_chunk(after, moves):
    """So many words follow the comma when the chunk is full; the web UI counts the comma among its 20 tokens."""
    prompt = " ".join(["a"] * (74 - after) + [","] + ["b"] * (after + 3))
    plain = tokens().tokenize(prompt).ids
    moved = tokens(moved_tokens=20).tokenize(prompt).ids
    if not moves:
        assert moved == plain
        return
    assert moved[:75] == plain[: 75 - after] + (PADDING,) * after
    assert moved[75:] == plain[75 - after :]


def test_commas_at_a_chunks_end_move_nothing():
    for prompt in (" ".join(["a"] * 74 + [",", "b"]), " ".join(["a"] * 75 + [",", "b"])):
        assert tokens(moved_tokens=20).tokenize(prompt).ids == tokens().tokenize(prompt).ids


def test_a_chunk_that_BREAK_ends_is_not_begun_again():
    prompt = " ".join(["a"] * 70 + [",", "b", "b", "b", "b", "BREAK", "c"])
    assert tokens(moved_tokens=20).tokenize(prompt).ids == tokens().tokenize(prompt).ids


def test_weights_move_with_their_words():
    prompt = " ".join(["a"] * 70) + ", (b b b b b b:1.5)"
    found = tokens(moved_tokens=20).tokenize(prompt)
    assert found.weights == (1.0,) * 75 + (1.5,) * 6


def test_long_prompts_are_whole_in_the_web_uis_syntax(sd1, generate):
    prompt = ", ".join(["a cat"] * 40)
    assert "cut off" not in generate(sd1.folder, *WEBUI, "--prompt", prompt, "--dry_run").stderr
    told = generate(sd1.folder, *WEBUI, "--prompt", prompt, "--max_embeddings_multiples", 1, "--dry_run")
    assert "cut off" in told.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def plain_loop(model, texts, negative, *, steps=4, scale=5.0, seed=1, size=128):
    """A plain loop over diffusers' U-Net: for each step parts of (text, weight), composed."""
    pipeline = StableDiffusionPipeline.from_pretrained(model.folder, safety_checker=None)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=True,
    )  # fmt: skip
    scheduler.set_timesteps(steps)

    def encode(text):
        return pipeline.encode_prompt(text, "cpu", 1, False)[0]

    latents = torch.randn((1, 4, size // 8, size // 8), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            base = pipeline.unet(latents, timestep, encode(negative[step])).sample
            joined = base
            for text, weight in texts[step]:
                part = pipeline.unet(latents, timestep, encode(text)).sample
                joined = joined + weight * scale * (part - base)
            latents = scheduler.step(joined, timestep, latents).prev_sample
        picture = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0]
    return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(int)


def furthest(picture, expected) -> int:
    return int(np.abs(picture - expected).max())


DRAWN = {
    "a [cat:dog:0.5] --n [fog:1]": (["a cat", "a cat", "a dog", "a dog"], ["", "fog", "fog", "fog"]),
    "a [cat|dog] --n fog": (["a cat", "a dog", "a cat", "a dog"], ["fog"] * 4),
    "a cat --n fog": (["a cat"] * 4, ["fog"] * 4),
}


def test_edited_prompts_are_drawn_as_a_plain_loop_draws_them(sd1, generate, tmp_path):
    """Alone and in a batch; within a level: sums in another order."""
    (tmp_path / "lines.txt").write_text("".join(f"{line} --d 1\n" for line in DRAWN))
    options = (*WEBUI, "--W", 128, "--H", 128, "--steps", 4, "--scale", 5, "--sequential_file_name")
    for batch_size in (1, 3):
        result = generate(sd1.folder, *options, "--from_file", tmp_path / "lines.txt", "--batch_size", batch_size)
        assert result.status == 0, result.stderr
        expected = [plain_loop(sd1, [[(t, 1)] for t in texts], negative) for texts, negative in DRAWN.values()]
        assert furthest(expected[0], expected[2]) > 3  # the editing shows
        for picture, wanted in zip(result.pictures, expected):
            assert furthest(picture, wanted) <= 1


def test_composed_parts_are_drawn_as_a_plain_loop_draws_them(sd1, generate, tmp_path):
    parts = [("a cat", 1), ("a dog", 0.6), ("a red hat", -0.5)]
    line = "a cat AND a dog :0.6 AND a red hat:-0.5 --n fog --d 1"
    options = (*WEBUI, "--W", 128, "--H", 128, "--steps", 3, "--sequential_file_name")
    result = generate(sd1.folder, *options, "--scale", 5, "--prompt", line)
    assert "no map of regions" not in result.stderr
    expected = plain_loop(sd1, [parts] * 3, ["fog"] * 3, steps=3)
    assert furthest(result.pictures[0], expected) <= 1  # sums in another order
    assert (
        furthest(generate(sd1.folder, *options, "--scale", 5, "--prompt", "a cat --n fog --d 1").pictures[0], expected)
        > 3
    )
    unguided = generate(sd1.folder, *options, "--scale", 1, "--prompt", line)
    assert furthest(unguided.pictures[0], plain_loop(sd1, [parts] * 3, ["fog"] * 3, steps=3, scale=1)) <= 1
    (tmp_path / "lines.txt").write_text(f"{line} --l 5\na dog AND a hat AND fog:0.3 --d 2 --l 3\n")
    both = generate(sd1.folder, *options, "--from_file", tmp_path / "lines.txt", "--batch_size", 2)
    assert furthest(both.pictures[0], expected) <= 1
    assert (
        furthest(
            both.pictures[1],
            plain_loop(sd1, [[("a dog", 1), ("a hat", 1), ("fog", 0.3)]] * 3, [""] * 3, steps=3, scale=3, seed=2),
        )
        <= 1
    )


def test_outside_guidances_steps_composed_parts_are_added_at_a_scale_of_1(sd1, generate):
    options = (*WEBUI, "--prompt", "a cat AND a dog:0.5 --n fog --d 1", "--W", 128, "--H", 128)
    never = generate(sd1.folder, *options, "--scale", 9, "--guidance_start", 0.6, "--steps", 1)
    once = generate(sd1.folder, *options, "--scale", 1, "--steps", 1)
    assert once.status == never.status == 0
    assert furthest(never.pictures[0], once.pictures[0]) == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--negative_scale", 3),
        ("--guidance_rescale", 0.7),
        ("--highres_fix_scale", 0.5),
        ("--sampler", "pndm", "--steps", 5),
    ],
)
def test_a_single_weighted_part_beside_nothing_is_the_part_itself(sd1, generate, options):
    """A second part of weight 0 changes nothing, whatever else steers; within a level: sums in another order."""
    alone = generate(sd1.folder, *WEBUI, "--prompt", "a cat --n fog --d 1", *options)
    composed = generate(sd1.folder, *WEBUI, "--prompt", "a cat AND a dog:0 --n fog --d 1", *options)
    assert composed.status == 0, composed.stderr
    assert furthest(composed.pictures[0], alone.pictures[0]) <= 1


def test_metadata_tells_the_syntax_and_draws_the_picture_again(sd1, generate):
    first = generate(sd1.folder, *WEBUI, "--prompt", "a [cat|dog] AND fog:0.5 # note\n --n dull --d 4")
    texts = Image.open(first.files[0]).text
    assert texts["prompt"] == "a [cat|dog] AND fog:0.5"
    assert "Prompt syntax: webui" in texts["parameters"]
    again = generate(sd1.folder, *WEBUI, "--prompt", texts["raw-prompt"])
    assert furthest(again.pictures[0], first.pictures[0]) == 0
    plain = generate(sd1.folder, "--prompt", "a cat --d 4")
    assert "Prompt syntax" not in Image.open(plain.files[0]).text["parameters"]


# ---------------------------------------------------------------------------------------------------------------------
# Messages


@pytest.mark.parametrize(
    "mark",
    ["a [red:blue:0.5] cat", "[a|b]", "<lora:x:0.8> a", "a:0.5 AND b", "a AND b :0.6", "a # note", "a --n [x::3]"],
)
def test_marks_of_the_other_syntax_are_warned_of_once(sd1, generate, tmp_path, mark):
    (tmp_path / "lines.txt").write_text(f"plain\n{mark}\n{mark} again\n")
    told = generate(sd1.folder, "--from_file", tmp_path / "lines.txt", "--dry_run").stderr
    assert told.count("--prompt_syntax webui gives it its meaning") == 1
    assert "lines.txt:2: " in told


@pytest.mark.parametrize("text", ["a (red:1.2) [cat]", "[a] (b|c)", "a: b AND c", "[a:b]", "x <3"])
def test_marks_of_both_syntaxes_are_not(sd1, generate, text):
    assert "prompt_syntax" not in generate(sd1.folder, "--prompt", text, "--dry_run").stderr


def test_what_cannot_be_is_refused(sd1, generate):
    for prompt, words in {
        "a <hypernet:x:1>": "hypernetworks are not read",
        "a --n <lora:x:1>": "put it before --n",
    }.items():
        result = generate(sd1.folder, *WEBUI, "--prompt", prompt)
        assert result.status == 2 and words in result.stderr
    assert "give sd-scripts or webui" in generate(sd1.folder, "--prompt_syntax", "comfy", "--prompt", "a").stderr
