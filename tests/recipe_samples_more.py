"""More metadata with invented contents: of Forge, of this program as it has written, and rarer layouts of others."""

import json

from tests import recipe_samples
from tests.recipe_samples import Sample, basic_graph, node

# ---------------------------------------------------------------------------------------------------------------------
# Forge

FORGE = (
    Sample(
        "forge-modules",
        {
            "parameters": "a copper kettle, steam <lora:etching_v2:0.7>\nNegative prompt: blurry, "
            "(lowres:1.2)\nSteps: 24, "
            "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1029384756, Size: 896x1152, Model hash: "
            '0123abcdef, Model: kettleXL_v1, Lora hashes: "etching_v2: aabbccddeeff", Version: '
            "f2.0.1v1.10.1-previous-593-g82eb7566, Module 1: sdxl_vae"
        },
        "a copper kettle, steam --n blurry, (lowres:1.2) --s 24 --l 6.5 --d 1029384756 --w 896 --h 1152 --sampler "
        "dpmsolver++ --schedule karras",
        {},
        ("network etching_v2",),
    ),
    Sample(
        "forge-hires-adetailer",
        {
            "parameters": "a portrait of a baker\nNegative prompt: hat\nSteps: 30, Sampler: DPM++ "
            "2M SDE, Schedule type: "
            "Exponential, CFG scale: 5, Seed: 4040404040, Size: 512x768, Model hash: aa, Model: bake15, Denoising "
            "strength: 0.35, Clip skip: 2, ADetailer model: face_yolov8n.pt, ADetailer confidence: 0.3, ADetailer "
            "dilate erode: 4, ADetailer version: 24.9.0, Hires Module 1: Use same choices, Hires CFG Scale: 5, Hires "
            "schedule type: Exponential, Hires upscale: 2, Hires steps: 15, Hires upscaler: 4x-UltraSharp, Version: "
            "f2.0.1v1.10.1-previous-659-gc055f2d4"
        },
        "a portrait of a baker --n hat --s 15 --l 5 --t 0.35 --d 4040404040 --w 1024 --h 1536 --sampler "
        "dpmsolver++_sde --schedule exponential",
        {"clip_skip": 2, "highres_fix_scale": 0.5, "highres_fix_steps": 30},
        ("upscaler 4x-UltraSharp", "ADetailer model and 3 more of its settings"),
    ),
    Sample(
        "forge-distilled",
        {
            "parameters": "a paper crane\nSteps: 20, Sampler: Euler, Schedule type: Simple, CFG "
            "scale: 1, Distilled CFG "
            "Scale: 3.2, Seed: 77001, Size: 896x1152, Model hash: fef3, Model: flux1-dev-bnb-nf4-v2, Diffusion in Low "
            "Bits: bnb-nf4 (fp16 LoRA), Version: f2.0.1v1.10.1-previous-313-g8a042934, Module 1: ae, Module 2: clip_l, "
            "Module 3: t5xxl_fp8_e4m3fn"
        },
        "a paper crane --s 20 --l 1 --d 77001 --w 896 --h 1152 --sampler euler --schedule trailing",
        {},
        ("Distilled CFG Scale",),
    ),
    Sample(
        "forge-latent-hires",
        {
            "parameters": "a jar\nSteps: 20, Sampler: Euler a CFG++, Schedule type: Automatic, CFG "
            "scale: 1.2, Seed: 12, "
            "Size: 512x640, Model: jars, Denoising strength: 0.7, RNG: CPU, Hires CFG Scale: 2, "
            "Hires resize: 1024x1280, "
            "Hires upscaler: Latent (nearest-exact), freeu_enabled: True, freeu_b1: 1.01, Version: f2.0.1"
        },
        "a jar --s 20 --l 1.2 --t 0.7 --d 12 --w 1024 --h 1280 --sampler euler_a",
        {"highres_fix_scale": 0.5, "highres_fix_latents_upscaling": True},
        (
            *("sampler Euler a CFG++, for which euler_a draws", "upscaler Latent (nearest-exact), for which bilinear"),
            *("Hires CFG Scale", "freeu_enabled and 1 more of its settings"),
        ),
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# This program, as it has written: what stands here must stay readable

OWN = (
    Sample(
        "own-1",
        {
            **{"prompt": "a (red:1.2) circle,", "negative-prompt": "blurry", "seed": "31", "sampler": "dpmsolver++"},
            **{"steps": "4", "scale": "5.5", "raw-prompt": "a (red:1.2) circle, --n blurry --d 31"},
            "parameters": "a (red:1.2) circle,\nNegative prompt: blurry\nSteps: 4, Sampler: DPM++ 2M Karras, Schedule "
            "type: Karras, CFG scale: 5.5, Seed: 31, Size: 128x128, Model: shapes, Clip skip: 2",
        },
        "a (red:1.2) circle, --n blurry --s 4 --l 5.5 --d 31 --w 128 --h 128 --sampler dpmsolver++ --schedule karras",
        {"clip_skip": 2},
    ),
    Sample(
        "own-highres",
        {
            **{"prompt": "a triangle", "seed": "33", "sampler": "ddim", "steps": "4", "scale": "7.5"},
            "parameters": "a triangle\nSteps: 4, Sampler: DDIM, CFG scale: 7.5, Seed: 33, Size: "
            "128x256, Model: shapes, "
            "Denoising strength: 0.6, First stage: 64x128, First stage steps: 3, Upscaler: Latent (bilinear), Eta: 0.3",
        },
        "a triangle --s 4 --l 7.5 --t 0.6 --d 33 --w 128 --h 256 --sampler ddim --eta 0.3",
        {"highres_fix_scale": 0.5, "highres_fix_steps": 3, "highres_fix_latents_upscaling": True},
    ),
    Sample(
        "own-timesteps",
        {
            **{"prompt": "a circle", "negative-prompt": "x", "seed": "34", "sampler": "euler", "steps": "3"},
            **{"scale": "7.5", "negative-scale": "3.0"},
            "parameters": "a circle\nNegative prompt: x\nSteps: 3, Sampler: Euler, CFG scale: 7.5, Seed: 34, Size: "
            "128x128, Model: shapes, Postprocess upscale by: 2, Postprocess upscaler: Lanczos, Negative scale: 3, "
            'Guidance end: 0.8, Guidance rescale: 0.4, Timesteps: "999, 500, 20"',
        },
        "a circle --n x --s 3 --l 7.5 --d 34 --w 128 --h 128 --sampler euler --nl 3.0 --timesteps 999, 500, 20",
        {"upscale": 2, "guidance_end": 0.8, "guidance_rescale": 0.4},
        size=(256, 256),
    ),
    Sample(
        "own-webui-syntax",
        {
            **{"prompt": "a [blue:red:0.5] square BREAK on grey", "negative-prompt": "(text:1.1)", "seed": "32"},
            **{"sampler": "euler_a", "steps": "2", "scale": "7.5", "networks": "dotted: 0.5, zorb: 0.3/1@0.2-1"},
            "parameters": "a [blue:red:0.5] square BREAK on grey\nNegative prompt: "
            "(text:1.1)\nSteps: 2, Sampler: Euler "
            'a, CFG scale: 7.5, Seed: 32, Size: 128x128, Model: shapes, Prompt syntax: webui, Networks: "dotted: 0.5, '
            'zorb: 0.3/1@0.2-1"',
        },
        "a [blue:red:0.5] square BREAK on grey --n (text:1.1) --s 2 --l 7.5 --d 32 --w 128 --h 128 --sampler euler_a",
        {"prompt_syntax": "webui"},
        ("network dotted", "network zorb"),
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# Rarer layouts

_DRAWS = {"seed": 9090, "steps": 22, "cfg": 6, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1}
_BUNDLED = {  # settings, texts and size come through pipes; a switch chooses the text; networks stand in a stack
    "1": node("easy a1111Loader", ckpt_name="m.safetensors", clip_skip=-2, lora_name="None", resolution="832 x 1216",
              empty_latent_width=512, empty_latent_height=512, positive=["4", 0], negative="blur", batch_size=1,
              optional_lora_stack=["7", 0]),
    "2": node("easy preSampling", pipe=["1", 0], **_DRAWS),
    "3": node("easy kSampler", pipe=["2", 0], model=["1", 1], image_output="Save"),
    "4": node("CR Text Input Switch", Input=2, text1=["5", 0], text2=["6", 0]),
    "5": node("CR Text", text="a hill"),
    "6": node("CR Text", text="a (barn:1.2)"),
    "7": node("CR LoRA Stack", switch_1="On", lora_name_1="ink.safetensors", model_weight_1=0.7, clip_weight_1=0.5,
              switch_2="Off", lora_name_2="off.safetensors", model_weight_2=1, clip_weight_2=1),
}  # fmt: skip
_CONTEXT = basic_graph(
    n3=node(
        "KSampler",
        **{"seed": ["30", 0], "steps": ["31", 0], "cfg": ["31", 2], "sampler_name": ["31", 3], "scheduler": ["31", 4]},
        **{"denoise": 1, "model": ["33", 1], "positive": ["33", 4], "negative": ["33", 5], "latent_image": ["33", 6]},
    ),
    n5=node("EmptyLatentImage", width=["32", 0], height=["32", 1], batch_size=1),
    n6=node("ImpactWildcardEncode", wildcard_text="a {red|blue} barn <lora:tin:1>", model=["4", 0], clip=["4", 1],
            populated_text="a blue barn <lora:tin:1>", mode="populate", seed=3),
    n30=node("Seed (rgthree)", seed=4455),
    n31=node("KSampler Config (rgthree)", steps_total=28, cfg=6.5, sampler_name="heun", scheduler="exponential"),
    n32=node("CR SDXL Aspect Ratio", width=1024, height=1024, aspect_ratio="3:4 portrait 896x1152",
             swap_dimensions="Off"),
    n33=node("Context (rgthree)", model=["6", 0], clip=["4", 1], positive=["6", 2], negative=["7", 0],
             latent=["5", 0]),
)  # fmt: skip
_RUINED = {
    **{"Prompt": "a bay", "Negative": "fog", "steps": 30, "cfg": 8.5, "width": 1152, "height": 896, "seed": 3864674281},
    **{"sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "karras", "base_model_name": "bay.safetensors"},
    **{"base_model_hash": "be9e", "loras": [["4852", "0.1 - sea\\offset.safetensors"]], "start_step": 0},
    **{"denoise": None, "clip_skip": 1, "software": "RuinedFooocus"},
}
_FIRST_FOOOCUS = {
    **{"Prompt": "a reef", "Negative Prompt": "dull", "Styles": "['Fooocus V2']", "Performance": "Quality"},
    **{"Resolution": "(1152, 896)", "Sharpness": 2, "Guidance Scale": 4, "Base Model": "reef.safetensors"},
    **{"Refiner Model": "None", "Sampler": "dpmpp_2m_sde_gpu", "Scheduler": "karras", "Seed": 321234567890123},
    **{"LoRA 1": "sea-offset.safetensors : 0.1", "Version": "v2.1.865"},
}
_CANVAS = {
    **{
        "app_version": "5.6.0",
        "generation_mode": "sdxl_txt2img",
        "width": 1024,
        "height": 832,
        "seed": 12,
        "steps": 30,
    },
    **{"positive_prompt": '("a (quay)", "boats++").blend(1, 3)', "negative_prompt": "", "cfg_scale": 5.5},
    **{"scheduler": "dpmpp_3m_k", "vae": {"name": "soft", "type": "vae"}, "model": {"name": "quay", "base": "sdxl"}},
    "canvas_v2_metadata": {"inpaintMasks": [{"objects": []}], "controlLayers": [{"id": "1"}], "referenceImages": []},
}
_TWO_STAGES = {
    **{"c": "a clay pot", "uc": "crack", "model": "pots.ckpt", "sampler": "DPM++ 2M AYS", "scale": 7.5, "seed": 42},
    **{"seed_mode": "Scale Alike", "size": "512x640", "steps": 22, "strength": 1, "profile": {"duration": 20.1}},
    "v2": {
        **{"hiresFix": True, "hiresFixWidth": 256, "hiresFixHeight": 320, "hiresFixStrength": 0.7, "clipSkip": 2},
        **{"loras": [{"file": "glaze.ckpt", "weight": 0.6, "mode": "all"}], "width": 512, "height": 640},
    },
}
MORE = (
    Sample(
        "comfyui-bundled",
        {"prompt": json.dumps(_BUNDLED)},
        "a (barn:1.2) --n blur --s 22 --l 6 --d 9090 --w 832 --h 1216 --sampler dpmsolver++ --schedule karras",
        {"clip_skip": 2},
        ("network ink",),
    ),
    Sample(
        "comfyui-context",
        {"prompt": json.dumps(_CONTEXT)},
        "a blue barn --n text, watermark --s 28 --l 6.5 --d 4455 --w 896 --h 1152 --sampler heun "
        "--schedule exponential",
        {},
        ("network tin",),
    ),
    Sample(
        "civitai",
        {
            "parameters": "lighthouse, oil\nNegative prompt: frame\nSteps: 30, Sampler: DPM++ 2M Karras, CFG scale: 5, "
            "Seed: 3088812, Size: 832x1216, Clip skip: 2, Created Date: 2024-10-01T10:11:12.1234567Z, Civitai "
            'resources: [{"type":"checkpoint","modelVersionId":290640,"modelName":"Lamp: day, '
            'night","modelVersionName":'
            '"V6"},{"type":"lora","weight":0.8,"modelVersionId":3,"modelName":"Keepers","modelVersionName":"v1"}], '
            "Civitai metadata: {}"
        },
        "lighthouse, oil --n frame --s 30 --l 5 --d 3088812 --w 832 --h 1216 --sampler dpmsolver++ --schedule karras",
        {"clip_skip": 2},
        ("network Keepers",),
    ),
    Sample(
        "web-ui-hashes",
        {
            "parameters": "a mask (gold:1.2)\nNegative prompt: bad-hands\nSteps: 20, Sampler: DPM++ 2S a Karras, CFG "
            "scale: 6, Seed: 99, Size: 768x512, Model: m, Denoising strength: 0.4, Mask blur: 4, Inpaint area: Only "
            'masked, ENSD: 31337, Eta: 0.67, NGMS: 0.7, TI hashes: "bad-hands: aa76, bad-hands: '
            'aa76", Hashes: {"model": '
            '"x1", "embed:bad-hands": "aa"}, Version: v1.9.4'
        },
        "a mask (gold:1.2) --n bad-hands --s 20 --l 6 --d 99 --w 768 --h 512 --sampler dpm_2_a --schedule karras",
        {},
        (
            *("sampler DPM++ 2S a Karras, for which dpm_2_a draws", "eta 0.67 of dpm_2_a", "embedding bad-hands"),
            *("the mask: give --mask_path", "NGMS"),
        ),
    ),
    Sample(
        "fooocus-ruined",
        {"parameters": json.dumps(_RUINED)},
        "a bay --n fog --s 30 --l 8.5 --d 3864674281 --w 1152 --h 896 --sampler dpmsolver++_sde --schedule karras",
        {},
        ("network offset",),
    ),
    Sample(
        "fooocus-first",
        {"parameters": json.dumps(_FIRST_FOOOCUS)},
        "a reef --n dull --s 60 --l 4 --d 321234567890123 --w 1152 --h 896 --sampler dpmsolver++_sde --schedule karras",
        {},
        ("styles Fooocus V2", "network sea-offset"),
    ),
    Sample(
        "invokeai-canvas",
        {"invokeai_metadata": json.dumps(_CANVAS)},
        "a quay :0.25 AND (boats:1.21) :0.75 --s 30 --l 5.5 --d 12 --w 1024 --h 832 --sampler dpmsolver++_3m "
        "--schedule karras",
        {},
        ("control layers", "VAE soft", "prompt functions"),
    ),
    Sample(
        "swarmui-sections",
        recipe_samples.swarm(
            prompt="a <weight[1.5]:big> globe <break> snow <segment:face,0.6,0.5> a smile "
            "<region:0,0,1,1> sky <base> dusk",
            **{"sampler": "euler_ancestral", "scheduler": "sgm_uniform", "refinerupscale": 1.5},
        ),
        "a (big:1.5) globe BREAK snow  dusk --s 20 --l 7 --d 1 --w 512 --h 512 --sampler euler_a --schedule trailing",
        {},
        ("<region:…>", "<segment:…>", "refinerupscale"),
    ),
    Sample(
        "novelai-exif",
        {
            "parameters": json.dumps(
                recipe_samples.novelai("{a} pond", request_type="NativeInfillingRequest", strength=0.7)
            )
        },
        f"(a:1.05) pond {recipe_samples.NAI_LINE}",
        {},
        ("the picture that it was drawn over", "the mask: give --mask_path"),
    ),
    Sample(
        "draw-things-two-stages",
        {"parameters": json.dumps(_TWO_STAGES)},
        "a clay pot --n crack --s 22 --l 7.5 --t 0.7 --d 42 --w 512 --h 640 --sampler dpmsolver++",
        {"clip_skip": 2, "highres_fix_scale": 0.5, "highres_fix_steps": 22, "highres_fix_latents_upscaling": True},
        ("schedule AYS of dpmsolver++", "network glaze"),
    ),
    Sample(
        "draw-things-description",
        {
            "XML:com.adobe.xmp": "<x:xmpmeta><rdf:RDF><rdf:Description><xmp:CreatorTool>Draw Things</xmp:CreatorTool>"
            "<dc:description><rdf:Alt><rdf:li>a jug &amp; a cup\n-crack\nSteps: 9, Sampler: Euler "
            "A, Guidance Scale: 4.5, "
            "Seed: 3, Size: 448x384, Model: pots.ckpt, Strength: 1.0</rdf:li></rdf:Alt></dc:description>"
            "</rdf:Description></rdf:RDF></x:xmpmeta>"
        },
        "a jug & a cup --n crack --s 9 --l 4.5 --d 3 --w 448 --h 384 --sampler euler_a",
    ),
)

ALL = (*recipe_samples.ALL, *FORGE, *OWN, *MORE)
