"""Options and samplers called as other programs call them, or misspelt: what the refusal names."""

import pytest

import gen_img_diffusers
from library.plan.prompt_lines import PROMPT_OPTIONS
from library.settings import other_names
from library.settings.samplers import SAMPLERS


def refusal(generate, *options: object) -> str:
    result = generate("examples/shapes", *options)
    assert result.status == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--width", "here it is --W"),
        ("--height=512", "here it is --H"),
        ("--heigth", "did you mean --H?"),
        ("--cfg-scale", "here it is --scale"),
        ("--guidance_scale", "here it is --scale"),
        ("--lora", "here it is --network_weights"),
        ("--model", "here it is --ckpt"),
        ("--num_inference_steps", "here it is --steps"),
        ("--sampler_name", "here it is --sampler"),
        ("--batch_count", "here it is --images_per_prompt"),
        ("--denoising_strength", "here it is --strength"),
        ("--no-half-vae", "did you mean --no_half_vae?"),
        ("--w", "did you mean --W?"),
        ("--n", "it is for prompt lines, within their quotes; here it is --negative_prompt"),
        ("--glt", "it is for prompt lines, within their quotes; here it is --gradual_latent_timesteps"),
        ("--d", "it is for prompt lines, within their quotes; here it is --seed"),
        ("--zzzz", "--help lists them all"),
        ("--tiling", "--help lists them all"),  # the web UI's are seamless, and not here
    ],
)
def test_options_of_the_command_line(generate, option, hint):
    assert refusal(generate, "--prompt", "a", option, 3) == f"error: {option}: no such option; {hint}\n"


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--steps 10", "in a line it is --s"),
        ("--width 64", "in a line it is --w"),
        ("--cfg_scale 7", "in a line it is --l"),
        ("--seed 1", "in a line it is --d"),
        ("--negative_prompt bad", "in a line it is --n"),
        ("--lora x", "it is an option of the command line, --network_weights; write it outside the prompt's quotes"),
        ("--zzzz x", "--help lists them"),
    ],
)
def test_options_of_prompt_lines(generate, option, hint):
    message = refusal(generate, "--prompt", f"a {option}")
    assert message == f"error: {option.split()[0]} (column 3): no such prompt option; {hint}\n"


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("dpmpp_2m", "dpmsolver++"),
        ("dpmpp_2m_sde_karras", "dpmsolver++_sde karras"),
        ("k_dpmpp_2m", "dpmsolver++"),
        ("sample_dpmpp_sde", "dpmsingle_sde"),
        ("uni_pc", "unipc"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
    ],
)
def test_samplers(generate, name, here):
    message = f"no such sampler; the nearest here is {here}"
    assert refusal(generate, "--prompt", "a", "--sampler", name) == f"error: --sampler {name}: {message}\n"


def test_names_in_a_file_of_options_and_in_a_table(generate, tmp_path):
    (tmp_path / "run.toml").write_text("cfg_scale = 3\n")
    assert refusal(generate, "--config", tmp_path / "run.toml").endswith("'cfg_scale' is no option; here it is scale\n")
    (tmp_path / "rows.csv").write_text("prompt,cfg_scale\na,3\n")
    assert "no such column; did you mean l?" in refusal(generate, "--from_file", tmp_path / "rows.csv")


def test_the_tables_name_what_there_is():
    known = gen_img_diffusers.make_parser().table.keys()
    assert set(other_names._CALLED) <= known
    assert not set(other_names._OTHER_OPTIONS) & {name for name in known if name.islower()}
    assert set(other_names.IN_LINES) <= known
    assert set(other_names.IN_LINES.values()) == set(PROMPT_OPTIONS) - {"c"}  # which is a line's alone
    assert set(other_names._OTHER_SAMPLERS.values()) <= SAMPLERS.keys()
