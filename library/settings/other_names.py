"""What other programs call this one's options and samplers, and which known name somebody may have meant.

The names are those of AUTOMATIC1111's web UI (options, API), ComfyUI's nodes, k-diffusion, Diffusers, sd-scripts,
InvokeAI and Fooocus.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

# An option of the command line → what others call it, in lower case and with underscores
_CALLED: Mapping[str, str] = {
    "ckpt": "model checkpoint ckpt_name ckpt_path model_path model_id model_name base_model sd_model weights "
    "sd_model_checkpoint pretrained_model_name_or_path",
    "vae": "vae_path vae_name sd_vae",
    "clip_skip": "clipskip stop_at_clip_layer clip_stop_at_last_layers",
    "prompt": "text positive positive_prompt",
    "from_file": "prompt_file prompts_file prompts_from_file input_file sample_prompts file prompts",
    "from_pictures": "png_info from_image from_images from_metadata from_picture redraw",
    "wildcard_dir": "wildcards wildcards_dir",
    "negative_prompt": "negative negativeprompt neg_prompt uncond",
    "W": "width image_width",
    "H": "height image_height",
    "steps": "num_inference_steps num_steps inference_steps sample_steps sampling_steps ddim_steps",
    "scale": "cfg cfg_scale guidance guidance_scale",
    "image_guidance": "image_cfg_scale image_guidance_scale",
    "sampler": "sampler_name sampler_index sampling_method sample_sampler",
    "schedule": "scheduler schedule_type",
    "timesteps": "sigmas",
    "seed": "seeds noise_seed manual_seed random_seed generator",
    "images_per_prompt": "batch_count num_images num_images_per_prompt num_outputs image_number iterations count "
    "n_samples samples",
    "outdir": "output out output_dir output_path output_folder outdir_samples save_path",
    "format": "output_format image_format",
    "network_weights": "lora loras lora_path lora_name lora_model lora_weights network networks lycoris",
    "network_mul": "lora_scale lora_strength lora_weight lora_multiplier lora_multipliers strength_model "
    "network_multiplier network_multipliers",
    "network_dir": "lora_dir loras_dir lyco_dir",
    "textual_inversion_embeddings": "embedding embeddings embeddings_dir textual_inversion",
    "image_path": "image img i2i img2img init_image init_images init_img input_image source_image",
    "mask_path": "mask init_mask inpaint_mask",
    "strength": "denoise denoising denoising_strength denoise_strength",
    "fill": "inpainting_fill masked_content",
    "inpaint_area": "inpaint_full_res only_masked",
    "inpaint_padding": "inpaint_full_res_padding padding_mask_crop",
    "mask_invert": "inpainting_mask_invert invert_mask",
    "highres_fix_scale": "hires hires_fix highres_fix enable_hr hr_scale hires_upscale",
    "highres_fix_steps": "hr_second_pass_steps hires_steps",
    "highres_fix_upscaler": "hr_upscaler hires_upscaler upscaler",
    "control_net_models": "controlnet control_net controlnets controlnet_model",
    "control_net_weights": "controlnet_conditioning_scale control_weight",
    "control_net_preps": "preprocessor control_net_preprocessors",
    "control_net_starts": "control_guidance_start",
    "control_net_ratios": "control_guidance_end",
    "guide_image_path": "control_image controlnet_image guide_image",
    "original_width": "original_size",
    "crop_top": "crops_coords_top_left",
    "fp16": "half float16 mixed_precision",
    "lowvram": "medvram low_vram medvram_sdxl",
    "sdpa": "opt_sdp_attention opt_sdp_no_mem_attention",
    "opt_channels_last": "opt_channelslast channels_last",
    "compile": "torch_compile",
    "resume": "skip_existing",
    "upscale": "upscale_by upscaling_resize",
}
_OTHER_OPTIONS = {other: name for name, others in _CALLED.items() for other in others.split()}

# An option of the command line → what it is in a prompt line
IN_LINES: Mapping[str, str] = {
    **{"negative_prompt": "n", "W": "w", "H": "h", "steps": "s", "seed": "d", "scale": "l", "strength": "t"},
    **{"network_mul": "am", "negative_scale": "nl", "image_guidance": "ig", "file_name": "f"},
    **{name: name for name in ("sampler", "schedule", "timesteps", "eta", "s_churn")},
    **{"original_width": "ow", "original_height": "oh", "crop_top": "ct", "crop_left": "cl"},
    **{"original_width_negative": "nw", "original_height_negative": "nh"},
    **{"gradual_latent_timesteps": "glt", "gradual_latent_ratio": "glr", "gradual_latent_ratio_step": "gls"},
    **{"gradual_latent_every_n_steps": "gle", "gradual_latent_s_noise": "glsn"},
    **{"gradual_latent_unsharp_params": "glus", "ds_ratio": "dsr"},
    **{"ds_depth_1": "dsd1", "ds_timesteps_1": "dst1", "ds_depth_2": "dsd2", "ds_timesteps_2": "dst2"},
}
_OF_LINES = {line: name for name, line in IN_LINES.items()}

# Samplers of ComfyUI, k-diffusion and Diffusers, in lower case and without "sample_", "k_" and "Scheduler" → this
# program's; where they are not here, the nearest
_OTHER_SAMPLERS: Mapping[str, str] = {
    **dict.fromkeys(
        ("dpmpp_2m", "dpmpp2m", "dpmpp", "dpm++", "dpmpp_2", "dpmsolvermultistep"),
        "dpmsolver++",
    ),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_sde_2m"), "dpmsolver++_sde"),
    **dict.fromkeys(("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"), "dpmsolver++_sde_heun"),
    "dpmpp_3m": "dpmsolver++_3m",
    **dict.fromkeys(("dpmpp_3m_sde", "dpmpp_3m_sde_gpu"), "dpmsolver++_3m_sde"),
    **dict.fromkeys(("dpmpp_2s", "dpmsolversinglestep"), "dpmsingle"),
    **dict.fromkeys(("dpmpp_sde", "dpmpp_sde_gpu", "dpmsolversde"), "dpmsingle_sde"),
    **dict.fromkeys(
        ("dpmpp_2s_ancestral", "dpmpp_2s_a", "dpmpp_2_a", "dpm_2_ancestral", "dpm2_a", "dpm2_ancestral"), "dpm_2_a"
    ),
    **dict.fromkeys(("kdpm2ancestraldiscrete", "kdpm_2_a"), "dpm_2_a"),
    **dict.fromkeys(("dpm2", "kdpm_2", "kdpm2discrete"), "dpm_2"),
    **dict.fromkeys(("dpm_fast", "dpm_adaptive"), "dpmsolver"),
    **dict.fromkeys(("euler_ancestral", "eulerancestral", "eulerancestraldiscrete"), "euler_a"),
    **dict.fromkeys(("eulerdiscrete", "euler_cfg_pp"), "euler"),
    "euler_ancestral_cfg_pp": "euler_a",
    **dict.fromkeys(("heundiscrete", "heunpp2"), "heun"),
    "lmsdiscrete": "lms",
    **dict.fromkeys(("uni_pc", "uni_pc_bh2", "unipcmultistep"), "unipc"),
    **dict.fromkeys(("deismultistep", "ipndm", "ipndm_v"), "deis"),
    **dict.fromkeys(("dpmpp_2m_cfg_pp", "res_multistep"), "dpmsolver++"),
    "dpmpp_fooocus_2m_sde_inpaint_seamless": "dpmsolver++_sde",
    "dpmpp_2s_ancestral_cfg_pp": "dpm_2_a",
    "ddim_v3": "ddim",
    "sa_solver_pece": "sa_solver",
    "plms": "pndm",
    "sasolver": "sa_solver",
}
# Those of them that are not here
_ONLY_NEAR = {
    *("dpmpp_sde", "dpmpp_sde_gpu", "dpmsolversde", "dpmpp_2s_ancestral", "dpmpp_2s_a", "dpm_fast", "dpm_adaptive"),
    *("euler_cfg_pp", "euler_ancestral_cfg_pp", "heunpp2", "ipndm"),
    *("dpmpp_2m_cfg_pp", "res_multistep", "ipndm_v", "dpmpp_fooocus_2m_sde_inpaint_seamless", "ddim_v3"),
    *("dpmpp_2s_ancestral_cfg_pp", "sa_solver_pece", "dpmpp_2_a"),
}
_SAMPLER_ENDINGS = {"_karras": "karras", "_k": "karras", "_exponential": "exponential", "_beta": "beta"}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that somebody may have meant; None where none is near.

    A few letters tell little, so that a longer name has to agree in more of them.
    """
    plain = {_plain(each): each for each in known}
    close = get_close_matches(_plain(name), plain, n=1, cutoff=0.65 if len(_plain(name)) < 4 else 0.75)
    return plain[close[0]] if close else None


def meant_option(name: str, known: Iterable[str]) -> str | None:
    """The option that another program calls so, or the nearest known or other name; without hyphens.

    Args:
        name: what was written, without hyphens at its beginning.
        known: the options that may be meant.
    """
    plain = {_plain(each): each for each in known}
    others = {other: option for other, option in _OTHER_OPTIONS.items() if _plain(option) in plain}
    here = {each: each for each in plain.values()}
    for said in (_plain(name), _plain(nearest(name, [*others, *here]) or "")):
        if (found := plain.get(said) or others.get(said)) is not None:
            return found
    return None


def is_same_thing(name: str, option: str) -> bool:
    """Whether a name is another program's for an option, not a misspelt one of this program's."""
    return _OTHER_OPTIONS.get(_plain(name)) == option


def of_line(name: str) -> str | None:
    """The command line's option of what prompt lines call so."""
    return _OF_LINES.get(name)


def meant_in_line(name: str) -> str | None:
    """A hint on an option that a prompt line does not have; None where none is near."""
    if (line := nearest(name, _OF_LINES)) is not None and len(name) <= len(line) + 1:
        return f"did you mean --{line}?"
    option = meant_option(name, [*_CALLED, *IN_LINES])
    if option is None:
        return None
    if option in IN_LINES:
        return f"in a line it is --{IN_LINES[option]}"
    return f"it is an option of the command line, --{option}; write it outside the prompt's quotes"


def split_sampler(name: str) -> tuple[str, str]:
    """Another program's name of a sampler, without what differs from program to program, and the schedule in it."""
    plain, schedule = _plain(name).removeprefix("sample_").removeprefix("k_").removesuffix("scheduler"), ""
    for ending, its in _SAMPLER_ENDINGS.items():
        if plain not in _OTHER_SAMPLERS and plain.endswith(ending):
            plain, schedule = plain.removesuffix(ending), f" {its}"
    return plain, schedule


def is_only_near(name: str) -> bool:
    """Whether `meant_sampler` gives the nearest sampler, not the same one."""
    return split_sampler(name)[0] in _ONLY_NEAR


def meant_sampler(name: str) -> str | None:
    """This program's name of another one's sampler, with its schedule; None where it is not known."""
    plain, schedule = split_sampler(name)
    return f"{_OTHER_SAMPLERS[plain]}{schedule}" if plain in _OTHER_SAMPLERS else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
