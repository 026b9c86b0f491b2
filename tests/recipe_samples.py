"""Metadata as nine programs write it, with invented contents, and what each means as a prompt line.

A sample: its name; the texts of its PNG; the line; options of the run; what is named as not taken over (in part).
"""

import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    """One picture's metadata and what is to be made of it."""

    name: str
    texts: dict[str, str]
    line: str
    run: dict[str, object] = field(default_factory=dict)
    untold: tuple[str, ...] = ()
    size: tuple[int, int] = (64, 64)  # of the picture's file


def _json(value: object) -> str:
    return json.dumps(value)


# ---------------------------------------------------------------------------------------------------------------------
# sd-scripts, which tells no size

SD_SCRIPTS = (
    Sample(
        "sd-scripts-1",
        {
            **{"prompt": "a lighthouse at dusk", "seed": "1203", "sampler": "ddim", "steps": "40", "scale": "7.5"},
            **{"negative-prompt": "fog, rain"},
        },
        "a lighthouse at dusk --n fog, rain --s 40 --l 7.5 --d 1203 --w 192 --h 128 --sampler ddim",
        size=(192, 128),
    ),
    Sample(
        "sd-scripts-2",
        {
            **{"prompt": "two (tall:1.3) trees", "seed": "7", "sampler": "k_euler_a", "steps": "28", "scale": "8.0"},
            **{"raw-prompt": "two (tall:1.3) {trees|bushes} --d 7"},
        },
        "two (tall:1.3) trees --s 28 --l 8.0 --d 7 --w 64 --h 64 --sampler euler_a",
    ),
    Sample(
        "sd-scripts-3",
        {
            **{"prompt": "a well", "seed": "99", "sampler": "dpmsolver++", "steps": "20", "scale": "6"},
            **{"negative-prompt": "dry", "negative-scale": "4.0", "clip-prompt": "a deep well"},
        },
        "a well --n dry --s 20 --l 6 --d 99 --w 64 --h 64 --sampler dpmsolver++ --nl 4.0 --c a deep well",
    ),
    Sample(
        "sd-scripts-xl",
        {
            **{"prompt": "a bridge", "seed": "4294967297", "sampler": "pndm", "steps": "50", "scale": "5.0"},
            **{"original-height": "1024", "original-width": "832", "original-height-negative": "None"},
            **{"original-width-negative": "None", "crop-top": "0", "crop-left": "16"},
        },
        "a bridge --s 50 --l 5.0 --d 4294967297 --w 832 --h 1024 --sampler pndm --ow 832 --oh 1024 --ct 0 --cl 16",
        size=(832, 1024),
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# The web UI and Forge

_HIRES = (
    "a harbour at night\nNegative prompt: daylight\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6, "
    "Seed: 3141592653, Size: 512x384, Model hash: 0a1b2c3d4e, Model: harbourMix_v2, VAE hash: 99aa, VAE: "
    "soft.vae.safetensors, Denoising strength: 0.45, Clip skip: 2, Hires upscale: 1.5, Hires steps: 12, "
    "Hires upscaler: Latent, Version: v1.10.1"
)
WEB_UI = (
    Sample(
        "web-ui-1",
        {
            "parameters": "a brass (clock:1.2), [dust]\nNegative prompt: (rust:1.1), text\n"
            "Steps: 25, Sampler: Euler a, CFG scale: 7, Seed: 271828, Size: 512x768, Model hash: 6ce0161689, "
            "Model: clockwork, Version: 1.6.0"
        },
        "a brass (clock:1.2), [dust] --n (rust:1.1), text --s 25 --l 7 --d 271828 --w 512 --h 768 --sampler euler_a",
        {"prompt_syntax": "webui"},
    ),
    Sample(
        "web-ui-hires",
        {"parameters": _HIRES},
        "a harbour at night --n daylight --s 12 --l 6 --t 0.45 --d 3141592653 --w 768 --h 576 --sampler dpmsolver++ "
        "--schedule karras",
        {
            **{"clip_skip": 2, "highres_fix_steps": 20, "highres_fix_latents_upscaling": True},
            "highres_fix_scale": 0.7,  # of 768x576 gives 512x384, too
        },
        ("VAE soft.vae: give --vae",),
    ),
    Sample(
        "web-ui-lora",
        {
            "parameters": "a fox, <lora:inkBrush:0.8> <lora:foxTail:0.5:0.7>\nSteps: 30, Sampler: DPM++ 2M SDE Karras, "
            'CFG scale: 5.5, Seed: 8, Size: 640x640, Model: fox, Lora hashes: "inkBrush: 12ab, foxTail: 34cd", '
            'ControlNet 0: "Module: canny, Model: control_canny [9], Weight: 1", Version: v1.7.0'
        },
        "a fox, --s 30 --l 5.5 --d 8 --w 640 --h 640 --sampler dpmsolver++_sde --schedule karras",
        untold=("network inkBrush (give --network_dir)", "network foxTail", "ControlNet 0"),
    ),
    Sample(
        "forge-img2img",
        {
            "parameters": "a stone arch\nSteps: 20, Sampler: DPM++ 2S a, Schedule type: SGM Uniform, CFG scale: 7, "
            "Seed: 5, Size: 516x510, Model: arches, Denoising strength: 0.6, Variation seed: 9, "
            "Variation seed strength: 0.1, Version: f2.0.1v1.10.1-previous-665"
        },
        "a stone arch --s 20 --l 7 --d 5 --w 512 --h 504 --sampler dpm_2_a --schedule trailing",
        untold=(
            *("size 516x510, which is 512x504 here", "sampler DPM++ 2S a, for which dpm_2_a draws", "Variation seed"),
            "the picture that it was drawn over: give --image_path",
        ),
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# ComfyUI


def node(kind: str, **inputs: object) -> dict[str, object]:
    """A node of a graph."""
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def basic_graph(**changes: object) -> dict[str, object]:
    """The graph that ComfyUI begins with; `changes` are nodes by number, as `n4=node(…)`."""
    nodes: dict[str, object] = {
        "3": node(
            "KSampler",
            **{"seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal"},
            **{"denoise": 1, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]},
        ),
        "4": node("CheckpointLoaderSimple", ckpt_name="SD1.5/valley.safetensors"),
        "5": node("EmptyLatentImage", width=512, height=448, batch_size=1),
        "6": node("CLIPTextEncode", text="a green (valley:1.1) [mist] AND sun", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="text, watermark", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }
    return nodes | {name.removeprefix("n"): value for name, value in changes.items()}


_ADVANCED = {
    "1": node("UNETLoader", unet_name="base.safetensors"),
    "2": node("LoraLoader", model=["1", 0], clip=["3", 0], lora_name="ink.safetensors", strength_model=0.8,
              strength_clip=0.6),
    "3": node("CLIPLoader", clip_name="clip.safetensors"),
    "4": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["2", 1]),
    "5": node("CLIPTextEncode", text=["20", 0], clip=["4", 0]),
    "6": node("CLIPTextEncode", text="blur", clip=["4", 0]),
    "7": node("CFGGuider", model=["2", 0], positive=["5", 0], negative=["6", 0], cfg=5.5),
    "8": node("RandomNoise", noise_seed=42),
    "9": node("KSamplerSelect", sampler_name="dpmpp_2m"),
    "10": node("BasicScheduler", model=["2", 0], scheduler="karras", steps=24, denoise=1.0),
    "11": node("EmptyLatentImage", width=["21", 0], height=640, batch_size=1),
    "12": node("SamplerCustomAdvanced", noise=["8", 0], guider=["7", 0], sampler=["9", 0], sigmas=["10", 0],
               latent_image=["11", 0]),
    "13": node("VAEDecode", samples=["12", 0], vae=["1", 2]),
    "14": node("SaveImage", images=["13", 0]),
    "20": node("StringConcatenate", string_a="a paper boat", string_b=["22", 0], delimiter=", "),
    "21": node("PrimitiveInt", value=896),
    "22": node("Reroute", **{"": ["23", 0]}),
    "23": node("PrimitiveString", value="on a pond"),
}  # fmt: skip

_TWO_STAGES = basic_graph(
    n10=node("LatentUpscaleBy", samples=["3", 0], upscale_method="bilinear", scale_by=2),
    n11=node(
        "KSampler",
        **{"seed": 77, "steps": 14, "cfg": 7, "sampler_name": "dpmpp_2m_sde", "scheduler": "karras", "denoise": 0.5},
        **{"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["10", 0]},
    ),
    n8=node("VAEDecode", samples=["11", 0], vae=["4", 2]),
)
_OVER_A_PICTURE = basic_graph(
    n3=node(
        "KSamplerAdvanced",
        **{"add_noise": "enable", "noise_seed": 18446744073709551615, "steps": 30, "cfg": 6.5},
        **{"sampler_name": "euler_ancestral", "scheduler": "simple", "start_at_step": 0, "end_at_step": 10000},
        **{"model": ["4", 0], "positive": ["12", 0], "negative": ["12", 1], "latent_image": ["5", 0]},
    ),
    n5=node("VAEEncode", pixels=["10", 0], vae=["4", 2]),
    n10=node("LoadImage", image="valley.png", upload="image"),
    n11=node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["13", 0]),
    n12=node(
        "ControlNetApplyAdvanced",
        **{"positive": ["11", 0], "negative": ["7", 0], "control_net": ["14", 0], "image": ["10", 0], "strength": 0.9},
    ),
    n6=node("CLIPTextEncode", text="a valley", clip=["4", 1]),
    n13=node("CLIPTextEncode", text="a river", clip=["4", 1]),
    n14=node("ControlNetLoader", control_net_name="depth.safetensors"),
)
COMFYUI = (
    Sample(
        "comfyui-1",
        {"prompt": _json(basic_graph()), "workflow": _json({"nodes": [], "links": [], "version": 0.4})},
        "a green (valley:1.1) \\[mist\\] and sun --n text, watermark --s 20 --l 8 --d 156680208700286 --w 512 --h 448 "
        "--sampler euler",
        {"prompt_syntax": "webui"},
    ),
    Sample(
        "comfyui-custom",
        {"prompt": _json(_ADVANCED)},
        "a paper boat, on a pond --n blur --s 24 --l 5.5 --d 42 --w 896 --h 640 --sampler dpmsolver++ "
        "--schedule karras",
        {"clip_skip": 2},
        ("network ink (give --network_dir)",),
    ),
    Sample(
        "comfyui-two-samplers",
        {"prompt": _json(_TWO_STAGES)},
        "a green (valley:1.1) \\[mist\\] and sun --n text, watermark --s 14 --l 7 --t 0.5 --d 77 --w 1024 --h 896 "
        "--sampler dpmsolver++_sde --schedule karras",
        {"highres_fix_scale": 0.5, "highres_fix_steps": 20, "highres_fix_latents_upscaling": True},
        ("the first sampler's seed 156680208700286",),
    ),
    Sample(
        "comfyui-img2img",
        {"prompt": _json(_OVER_A_PICTURE)},
        "a valley :0.5 AND a river :0.5 --n text, watermark --s 30 --l 6.5 --d 9223372036854775807 --w 320 --h 256 "
        "--sampler euler_a --schedule trailing",
        {},
        (
            *("seed 18446744073709551615, which is 9223372036854775807 here", "ControlNet depth"),
            "picture valley.png that it was drawn over: give --image_path",
        ),
        size=(320, 256),
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# InvokeAI

INVOKEAI = (
    Sample(
        "invokeai-3",
        {
            "invokeai_metadata": _json(
                {
                    "generation_mode": "txt2img",
                    "positive_prompt": "a (red kite)1.3 over hills++, windy",
                    "negative_prompt": "rain-",
                    **{"width": 576, "height": 448, "seed": 2468, "rand_device": "cpu", "cfg_scale": 6.5, "steps": 26},
                    **{"cfg_rescale_multiplier": 0, "scheduler": "dpmpp_2m_k", "clip_skip": 1, "app_version": "3.7.0"},
                    "model": {"model_name": "kites", "base_model": "sd-1", "model_type": "main"},
                    "controlnets": [],
                    "loras": [{"lora": {"model_name": "windy", "base_model": "sd-1"}, "weight": 0.75}],
                }
            )
        },
        "a (red kite:1.3) over (hills:1.21), windy --n (rain:0.9) --s 26 --l 6.5 --d 2468 --w 576 --h 448 "
        "--sampler dpmsolver++ --schedule karras",
        {"clip_skip": 2},
        ("network windy (give --network_dir)",),
    ),
    Sample(
        "invokeai-5",
        {
            "invokeai_metadata": _json(
                {
                    "generation_mode": "sdxl_img2img",
                    **{"positive_prompt": "a kiln [old]", "negative_prompt": "", "strength": 0.55, "seed": 11},
                    **{"width": 1024, "height": 1024, "cfg_scale": 5, "steps": 30, "scheduler": "euler_a"},
                    "model": {"key": "1", "hash": "blake3:1", "name": "clay xl", "base": "sdxl", "type": "main"},
                    "loras": [],
                }
            ),
            "invokeai_graph": '{"id": "1", "nodes": {}, "edges": []}',
        },
        "a kiln \\[old\\] --s 30 --l 5 --d 11 --w 1024 --h 1024 --sampler euler_a",
        {},
        ("the picture that it was drawn over",),
    ),
    Sample(
        "invokeai-2",
        {
            "Dream": '"a mill [wheel]" -s 35 -S 97531 -W 512 -H 640 -C 7.0 -A k_lms',
            "sd-metadata": _json(
                {
                    **{"model": "stable diffusion", "model_weights": "mills-1", "app_id": "invoke-ai/InvokeAI"},
                    "app_version": "2.3.5",
                    "image": {
                        "prompt": [{"prompt": "a mill [wheel]", "weight": 1.0}],
                        **{"steps": 35, "cfg_scale": 7.0, "threshold": 0, "perlin": 0, "height": 640, "width": 512},
                        **{"seed": 97531, "seamless": False, "hires_fix": False, "type": "txt2img"},
                        **{"postprocessing": None, "sampler": "k_lms", "variations": []},
                    },
                }
            ),
        },
        "a mill --n wheel --s 35 --l 7 --d 97531 --w 512 --h 640 --sampler lms",
    ),
    Sample(
        "invokeai-dream",
        {"Dream": '"a moss garden" -s50 -S1234 -W512 -H512 -C7.5 -Addim'},
        "a moss garden --s 50 --l 7.5 --d 1234 --w 512 --h 512 --sampler ddim",
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# Fooocus

FOOOCUS = (
    Sample(
        "fooocus-json",
        {
            "fooocus_scheme": "fooocus",
            "parameters": _json(
                {
                    "adm_guidance": "(1.5, 0.8, 0.3)",
                    **{"base_model": "reefXL", "base_model_hash": "e6bb9ea85b", "clip_skip": 2, "created_by": ""},
                    **{"full_negative_prompt": ["grey", "dull"], "full_prompt": ["a coral reef, cinematic"]},
                    "guidance_scale": 4.0,
                    "loras": [["sea-offset.safetensors", 0.1, "4852686128"]],
                    **{"metadata_scheme": "fooocus", "negative_prompt": "grey", "performance": "Speed"},
                    **{
                        "prompt": "a coral reef",
                        "prompt_expansion": "",
                        "refiner_model": "None",
                        "refiner_switch": 0.5,
                    },
                    **{"resolution": "(1152, 896)", "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras"},
                    **{"seed": "4159895726312427221", "sharpness": 2.0, "steps": 30},
                    **{
                        "styles": "['Fooocus V2', 'Fooocus Sharp']",
                        "vae": "Default (model)",
                        "version": "Fooocus v2.5.5",
                    },
                }
            ),
        },
        "a coral reef --n grey --s 30 --l 4 --d 4159895726312427221 --w 1152 --h 896 --sampler dpmsolver++_sde "
        "--schedule karras",
        {"clip_skip": 2},
        ("styles Fooocus V2, Fooocus Sharp", "network sea-offset"),
    ),
    Sample(
        "fooocus-a1111",
        {
            "fooocus_scheme": "a1111",
            "parameters": "a coral arch\nNegative prompt: grey\nSteps: 60, Sampler: DPM++ 2M SDE Karras, Seed: 77, "
            'Size: 896x1152, CFG scale: 4.0, Sharpness: 2.0, ADM Guidance: "(1.5, 0.8, 0.3)", Base Model: reefXL, '
            "Model: reefXL, Model hash: e6bb9ea85b, Performance: Quality, Scheduler: karras, "
            'Lora hashes: "sea-offset: 4852686128", Lora weights: "sea-offset: 0.1", Version: Fooocus v2.5.5',
        },
        "a coral arch --n grey --s 60 --l 4.0 --d 77 --w 896 --h 1152 --sampler dpmsolver++_sde --schedule karras",
        {},
        ("network sea-offset", "Sharpness"),
    ),
    Sample(
        "fooocus-older",
        {
            "parameters": _json(
                {
                    **{"prompt": "a pearl <lora:shine:0.5>", "negative_prompt": "", "styles": "[]", "steps": "30"},
                    **{
                        "resolution": "(1024, 1024)",
                        "guidance_scale": 7,
                        "sampler": "euler",
                        "scheduler": "sgm_uniform",
                    },
                    **{"seed": 5, "base_model": "reefXL.safetensors", "lora_combined_1": "shine.safetensors : 0.5"},
                    "version": "Fooocus v2.2.1",
                }
            )
        },
        "a pearl --s 30 --l 7 --d 5 --w 1024 --h 1024 --sampler euler --schedule trailing",
        {},
        ("network shine",),
    ),
    Sample(
        "fooocus-unknown-schedule",
        {
            "fooocus_scheme": "fooocus",
            "parameters": _json(
                {
                    **{"prompt": "an (urchin:1.2) AND [sand]", "negative_prompt": "x", "steps": 8, "seed": "9"},
                    **{
                        "resolution": "(704, 1408)",
                        "guidance_scale": 1.5,
                        "sampler": "lcm",
                        "scheduler": "align_your_steps",
                    },
                    **{"styles": [], "base_model": "reefXL", "metadata_scheme": "fooocus", "loras": [], "clip_skip": 1},
                }
            ),
        },
        "an (urchin:1.2) and \\[sand\\] --n x --s 8 --l 1.5 --d 9 --w 704 --h 1408 --sampler lcm",
        {},
        ("schedule align_your_steps of lcm",),
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# SwarmUI


def swarm(**said: object) -> dict[str, str]:
    params = {
        "prompt": "a snow globe",
        "model": "globes",
        "seed": 1,
        "steps": 20,
        "cfgscale": 7.0,
        "aspectratio": "1:1",
    }
    params |= {"width": 512, "height": 512, "swarm_version": "0.9.3.1"}
    extra = {"sui_extra_data": {"date": "2025-01-25", "generation_time": "1 sec"}, "sui_models": []}
    return {"parameters": json.dumps({"sui_image_params": params | said} | extra, indent=2)}


SWARMUI = (
    Sample(
        "swarmui-1",
        swarm(negativeprompt="crack", sampler="euler", scheduler="normal", automaticvae=True),
        "a snow globe --n crack --s 20 --l 7 --d 1 --w 512 --h 512 --sampler euler",
    ),
    Sample(
        "swarmui-lora",
        swarm(
            prompt="a (snow:1.2) globe <lora:frost:0.7> <segment:globe> shiny",
            **{"loras": ["frost"], "loraweights": ["0.7"], "comfyuisampler": "dpmpp_3m_sde", "seed": 987654321012},
            comfyuischeduler="exponential",
        ),
        "a (snow:1.2) globe --s 20 --l 7 --d 987654321012 --w 512 --h 512 --sampler dpmsolver++_3m_sde "
        "--schedule exponential",
        {},
        ("network frost", "<segment:…>"),
    ),
    Sample(
        "swarmui-img2img",
        swarm(initimage="x", initimagecreativity=0.6, clipstopatlayer=-2, sampler="dpmpp_2m", refinersteps=40),
        "a snow globe --s 20 --l 7 --d 1 --w 512 --h 512 --sampler dpmsolver++",
        {"clip_skip": 2},
        ("the picture that it was drawn over", "refinersteps"),
    ),
    Sample(
        "swarmui-text-weights",
        swarm(loras="a/frost.safetensors,rim", loraweights="0.5,1", width=832, height=1216, sampler="ddim"),
        "a snow globe --s 20 --l 7 --d 1 --w 832 --h 1216 --sampler ddim",
        {},
        ("network frost", "network rim"),
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# NovelAI


def novelai(prompt: str, **said: object) -> dict[str, str]:
    comment = {"prompt": prompt, "steps": 28, "height": 768, "width": 512, "scale": 5.0, "seed": 3735928559}
    comment |= {"uc": "{{bad}}, blurry", "n_samples": 1, "noise_schedule": "native", "sampler": "k_euler_ancestral"}
    comment |= {"request_type": "PromptGenerateRequest", "signed_hash": "c2lnbmVk"} | said
    return {
        **{
            "Title": "AI generated image",
            "Description": prompt,
            "Software": "NovelAI",
            "Source": "Stable Diffusion 1D",
        },
        "Comment": json.dumps(comment),
    }


NAI_LINE = "--n (bad:1.103), blurry --s 28 --l 5 --d 3735928559 --w 512 --h 768 --sampler euler_a"
NOVELAI = (
    Sample("novelai-1", novelai("a {rowan} tree, [bare]"), f"a (rowan:1.05) tree, (bare:0.9524) {NAI_LINE}"),
    Sample(
        "novelai-2",
        novelai("{{{berries}}}, a (bowl)", sampler="k_dpmpp_2m", noise_schedule="karras"),
        f"(berries:1.158), a \\(bowl\\) {NAI_LINE.replace('euler_a', 'dpmsolver++')} --schedule karras",
    ),
    Sample(
        "novelai-4",
        novelai(
            "1.5::a wood::, fern",
            v4_prompt={"caption": {"base_caption": "a wood", "char_captions": [{"char_caption": "a girl"}]}},
            cfg_rescale=0.2,
        ),
        f"(a wood:1.5), fern {NAI_LINE}",
        {},
        ("characters' prompts", "cfg_rescale"),
    ),
    Sample(
        "novelai-img2img",
        novelai("a pond", request_type="Img2ImgRequest", strength=0.7, sampler="ddim", sm=True),
        f"a pond {NAI_LINE.replace('euler_a', 'ddim')}",
        {},
        ("the picture that it was drawn over", "sm "),
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# Draw Things


def _draw_things(**said: object) -> dict[str, str]:
    content = {"c": "a clay pot", "uc": "crack", "model": "pots_q8p.ckpt", "sampler": "DPM++ 2M Karras", "scale": 7.5}
    content |= {"seed": 424242, "seed_mode": "Scale Alike", "size": "512x640", "steps": 22, "strength": 1} | said
    written = json.dumps(content).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return {
        "XML:com.adobe.xmp": '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description>'
        "<xmp:CreatorTool>Draw Things</xmp:CreatorTool><exif:UserComment><rdf:Alt>"
        f'<rdf:li xml:lang="x-default">{written}</rdf:li></rdf:Alt></exif:UserComment>'
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    }


DRAW_THINGS = (
    Sample(
        "draw-things-1",
        _draw_things(),
        "a clay pot --n crack --s 22 --l 7.5 --d 424242 --w 512 --h 640 --sampler dpmsolver++ --schedule karras",
    ),
    Sample(
        "draw-things-lora",
        _draw_things(lora=[{"model": "glaze_lora_f16.ckpt", "weight": 0.6}], sampler="Euler A", c="a & (b:1.2) <pot>"),
        "a & (b:1.2) <pot> --n crack --s 22 --l 7.5 --d 424242 --w 512 --h 640 --sampler euler_a",
        {},
        ("network glaze_lora_f16",),
    ),
    Sample(
        "draw-things-img2img",
        _draw_things(strength=0.4, sampler="DDIM Trailing", v2={"clipSkip": 2, "upscaler": "ultra_4x.ckpt"}),
        "a clay pot --n crack --s 22 --l 7.5 --d 424242 --w 512 --h 640 --sampler ddim --schedule trailing",
        {"clip_skip": 2},
        ("the picture that it was drawn over", "upscaler ultra_4x"),
    ),
    Sample(
        "draw-things-exif",
        {
            "parameters": json.dumps(
                {"c": "a jug", "uc": "", "sampler": "UniPC", "seed": 3, "size": "448x448", "steps": 9}
            )
        },
        "a jug --s 9 --d 3 --w 448 --h 448 --sampler unipc",
    ),
)

ALL = (*SD_SCRIPTS, *WEB_UI, *COMFYUI, *INVOKEAI, *FOOOCUS, *SWARMUI, *NOVELAI, *DRAW_THINGS)
