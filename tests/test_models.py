"""Finding and loading models: every layout gives the same networks, and what does not fit is refused by name."""

import json
import shutil
import socket

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from loading import load_all, load_one
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from library.errors import InputError
from library.files.checkpoint_layout import original_name, unet_modules
from library.files.families import SDXL
from library.files.model_files import find_model
from library.files.tokenizers import SHIPPED_TOKENIZER, load_tokenizer
from library.models.models import load_text_encoder, load_unet, load_vae
from tools import random_model

CPU = torch.device("cpu")


def find(models, path, **changes):
    v2 = "--v2" in models.options
    return find_model(str(path), **({"v2": v2, "v_parameterization": v2} | changes))


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def family(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("layout", ["folder", "safetensors", "ckpt"])
def test_every_layout_gives_the_published_networks(family, layout):
    loaded = load_all(find(family, getattr(family, layout)))
    expected = {
        "unet": UNet2DConditionModel.from_pretrained(family.folder / "unet"),
        "vae": AutoencoderKL.from_pretrained(family.folder / "vae"),
    }
    for text in loaded.texts:
        kind = CLIPTextModelWithProjection if text.kind.pooled else CLIPTextModel
        expected[text.kind.part] = kind.from_pretrained(family.folder / text.kind.part)
    ours_by_part = {text.kind.part: text.model for text in loaded.texts} | {"unet": loaded.unet, "vae": loaded.vae}
    for part, network in expected.items():
        component = ours_by_part[part]
        ours, theirs = component.state_dict(), network.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
    for name in ("transformer_layers_per_block", "projection_class_embeddings_input_dim", "addition_embed_type"):
        ours, theirs = loaded.unet.config[name], expected["unet"].config[name]
        assert ours == theirs or ours == [theirs] * 4, name
    for name in ("attention_head_dim", "use_linear_projection", "cross_attention_dim", "norm_num_groups"):
        ours, theirs = loaded.unet.config[name], expected["unet"].config[name]
        heads = len(expected["unet"].config.block_out_channels)
        assert ours == theirs or [ours] * heads == list(theirs) or list(ours) == [theirs] * heads
    for text in loaded.texts:
        for name in ("hidden_act", "num_attention_heads", "num_hidden_layers", "intermediate_size", "projection_dim"):
            if name != "projection_dim" or text.kind.pooled:
                assert getattr(text.model.config, name) == getattr(expected[text.kind.part].config, name)
    assert loaded.vae.config.scaling_factor == expected["vae"].config.scaling_factor
    assert not any(p.is_meta or p.requires_grad for p in loaded.unet.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_cast_as_they_are_read(sd1, dtype):
    unet = load_one(load_unet, find(sd1, sd1.safetensors).unet, dtype)
    whole = load_one(load_unet, find(sd1, sd1.folder).unet)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(unet.parameters(), whole.parameters()))


def test_variants_and_pickles_in_folders(sd1, tmp_path):
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        shutil.copytree(sd1.folder / part, tmp_path / part)
        file = tmp_path / part / f"{stem}.safetensors"
        state = load_file(file)
        file.unlink()
        if part == "text_encoder":
            torch.save(state, file.with_name("pytorch_model.bin"))
        else:
            save_file({k: v.half() for k, v in state.items()}, file.with_name(f"{stem}.fp16.safetensors"))
    found = find(sd1, tmp_path)
    assert load_one(load_unet, found.unet).dtype == torch.float32
    text_encoder = load_one(load_text_encoder, found.texts[0]).model
    expected = CLIPTextModel.from_pretrained(sd1.folder / "text_encoder").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in text_encoder.state_dict().items())
    assert load_tokenizer(found.tokenizer, found.family).pad_token_id == 49407


def test_checkpoints_without_the_text_model_level(sd1, tmp_path):
    state = {k.replace("transformer.text_model.", "transformer."): v for k, v in load_file(sd1.safetensors).items()}
    state["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77.0)[None]
    save_file(state, tmp_path / "x.safetensors")
    found = find(sd1, tmp_path / "x.safetensors")
    ours = load_one(load_text_encoder, found.texts[0]).model
    expected = load_one(load_text_encoder, find(sd1, sd1.folder).texts[0]).model
    ids = torch.tensor([[49406, 320, 2368, 49407]])
    assert torch.equal(ours(ids).last_hidden_state, expected(ids).last_hidden_state)


# ---------------------------------------------------------------------------------------------------------------------


def vae_files(sd1, folder):
    """The tiny model's VAE in the formats found in the wild."""
    original = {k: v for k, v in load_file(sd1.safetensors).items() if k.startswith("first_stage_model.")}
    bare = {k.removeprefix("first_stage_model."): v for k, v in original.items()}
    diffusers = load_file(sd1.folder / "vae" / "diffusion_pytorch_model.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = dict(diffusers)
    for new_name, old_name in names.items():
        old = {k.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}."): v for k, v in old.items()}
    assert old.keys() != diffusers.keys()
    for name, state in {"prefixed": original, "bare": bare, "diffusers": diffusers, "old": old}.items():
        save_file(state, folder / f"{name}.safetensors")
    torch.save({"state_dict": bare}, folder / "bare.ckpt")
    shutil.copytree(sd1.folder / "vae", folder / "folder")
    return [
        "prefixed.safetensors",
        "bare.safetensors",
        "diffusers.safetensors",
        "old.safetensors",
        "bare.ckpt",
        "folder",
    ]


def test_every_format_of_a_vae(sd1, tmp_path):
    expected = AutoencoderKL.from_pretrained(sd1.folder / "vae").state_dict()
    for name in [*vae_files(sd1, tmp_path), sd1.folder]:
        found = find(sd1, sd1.folder, vae=str(tmp_path / name))
        ours = load_one(load_vae, found.vae).state_dict()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[k], expected[k]) for k in expected), name


def test_vaes_of_other_families_are_refused(sd1, tmp_path):
    shutil.copytree(sd1.folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"scaling_factor": 0.13025}))
    with pytest.raises(InputError, match=r"is the VAE of Stable Diffusion XL; use one of Stable Diffusion 1\.x"):
        find(sd1, sd1.folder, vae=str(tmp_path / "vae"))
    path.write_text(json.dumps(config | {"latent_channels": 16}))
    with pytest.raises(InputError, match="16 latent channels"):
        find(sd1, sd1.folder, vae=str(tmp_path / "vae"))
    with pytest.raises(InputError, match="no VAE"):
        save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
        find(sd1, sd1.folder, vae=str(tmp_path / "x.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------


def test_a_wrong_family_option_is_refused(sd1, sd2):
    for layout in ("folder", "safetensors", "ckpt"):
        with pytest.raises(InputError, match="2.x model; add --v2"):
            find(sd2, getattr(sd2, layout), v2=False)
        with pytest.raises(InputError, match="1.x model; leave out --v2"):
            find(sd1, getattr(sd1, layout), v2=True)


def test_the_prediction_type_is_the_users_then_the_files(sd1, sd2, tmp_path):
    assert find(sd2, sd2.folder).prediction.type == "v_prediction"
    assert find(sd2, sd2.folder).prediction.warnings == ()
    unsaid = find(sd2, sd2.folder, v_parameterization=False)
    assert unsaid.prediction.type == "v_prediction"
    taken = "taken for a v-prediction model, according to sd2/scheduler; add --v_parameterization"
    assert taken in unsaid.prediction.warnings[0]
    overridden = find(sd1, sd1.folder, v_parameterization=True)
    assert overridden.prediction.type == "v_prediction"
    assert "overrides" in overridden.prediction.warnings[0]
    state = load_file(sd1.safetensors)
    save_file(state, tmp_path / "stated.safetensors", metadata={"modelspec.prediction_type": "v"})
    save_file(state | {"v_pred": torch.empty(0)}, tmp_path / "marked.safetensors")
    assert find(sd1, tmp_path / "stated.safetensors").prediction.type == "v_prediction"
    assert find(sd1, tmp_path / "marked.safetensors").prediction.type == "v_prediction"
    assert find(sd1, sd1.safetensors).prediction.type == "epsilon"


def test_a_schedule_that_is_not_followed_is_warned_of(sd1, sd2, tmp_path):
    for models, stated, message in (
        (
            sd2,
            {"rescale_betas_zero_snr": True},
            "has zero terminal SNR, according to sd2/scheduler; add --zero_terminal_snr to follow it",
        ),
        (
            sd1,
            {"rescale_betas_zero_snr": True},
            "has zero terminal SNR, according to sd1/scheduler; which is for models that predict v",
        ),
        (sd1, {"beta_schedule": "linear", "beta_end": 0.02}, "(beta_end 0.02, beta_schedule linear), which is not"),
        (sd1, {"trained_betas": [0.1]}, "another schedule of noise (trained_betas), which is not followed"),
    ):
        folder = tmp_path / "-".join(stated) / models.folder.name
        shutil.copytree(models.folder, folder)
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | stated))
        (warning,) = find(models, folder).prediction.warnings
        assert message in warning
    assert find(sd2, folder.parents[1] / "rescale_betas_zero_snr" / "sd2", zero_terminal_snr=True).prediction.zero_snr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 5}, r"a depth model \(a U-Net with 5 input channels\); use one with 4, 9 or 8"),
        ({"in_channels": 7}, "an upscaler"),
        ({"in_channels": 12}, "a model of another kind"),
        ({"cross_attention_dim": 1280}, "an SDXL refiner"),
        ({"addition_embed_type": "text_time"}, "is a Stable Diffusion XL model without its text_encoder_2"),
        ({"addition_embed_type": "text_time", "cross_attention_dim": 768}, "is told other things than its family's"),
        ({"class_embed_type": "projection"}, "unCLIP"),
        ({"time_cond_proj_dim": 256}, "latent consistency model"),
    ],
)
def test_unets_for_more_than_text_are_refused(sd1, tmp_path, changes, message):
    shutil.copytree(sd1.folder, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        find(sd1, tmp_path / "model")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["conditioner.embedders.1.x", "model.diffusion_model.x"], "has no text encoder and no VAE"),
        (["edm_mean", "model.diffusion_model.x"], r"a Playground 2\.5 model \(EDM\)"),
        (["edm_vpred.sigma_max", "model.diffusion_model.x"], r"a CosXL model \(EDM\)"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["double_blocks.0.x"], "Flux"),
        (["lora_unet_down.lora_up.weight"], "a LoRA"),
        (["control_model.zero_convs.0.0.weight"], "a ControlNet"),
        (["emb_params"], "a textual inversion"),
        (["something"], "no Stable Diffusion checkpoint"),
        (["conv_in.weight", "down_blocks.0.x"], "a U-Net without text encoders and VAE"),
        (["model.diffusion_model.x"], "has no text encoder and no VAE; give a whole checkpoint"),
        (["model.diffusion_model.x", "first_stage_model.x"], "has no text encoder"),
        (["model.diffusion_model.x", "first_stage_model.x", "cond_stage_model.transformer.x"], "no whole"),
    ],
)
def test_files_of_other_kinds_are_named(sd1, tmp_path, keys, message):
    save_file({key: torch.ones(1) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        find(sd1, tmp_path / "x.safetensors")


def test_a_depth_checkpoint_is_refused_from_its_header(sd1, tmp_path):
    state = load_file(sd1.safetensors)
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.ones(32, 5, 3, 3)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="depth model \\(a U-Net with 5 input channels"):
        find(sd1, tmp_path / "x.safetensors")


@pytest.mark.parametrize("pipeline", ["StableDiffusionLatentUpscalePipeline", "MarigoldDepthPipeline"])
def test_folders_of_other_uses_of_eight_channels_are_refused(sd1, tmp_path, pipeline):
    shutil.copytree(sd1.folder, tmp_path / "model")
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(InputError, match="an upscaler of latents|a Marigold model"):
        find(sd1, tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(sd1, tmp_path, value):
    state = load_file(sd1.safetensors)
    name = "model.diffusion_model.middle_block.0.in_layers.2.bias"
    state[name][3] = value
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"{name}.*NaN or infinite"):
        load_one(load_unet, find(sd1, tmp_path / "x.safetensors").unet)


def test_missing_and_misshapen_tensors_are_named(sd1, tmp_path):
    state = load_file(sd1.safetensors)
    shape = state["first_stage_model.decoder.conv_out.weight"].shape
    state["first_stage_model.decoder.conv_out.weight"] = torch.ones(5, *shape[1:])
    del state["model.diffusion_model.out.2.bias"]
    save_file(state, tmp_path / "x.safetensors")
    found = find(sd1, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="lacks 1 tensors of the UNet2DConditionModel, 'conv_out.bias' first"):
        load_one(load_unet, found.unet)
    with pytest.raises(InputError, match="conv_out.weight' has the shape"):
        load_one(load_vae, found.vae)


# ---------------------------------------------------------------------------------------------------------------------


def test_globs_match_one_file(sd1, tmp_path):
    (tmp_path / "[x] a").mkdir()
    for name in ("one.safetensors", "two.safetensors"):
        shutil.copy(sd1.safetensors, tmp_path / "[x] a" / name)
    assert find(sd1, tmp_path / "[x] a" / "one.safetensors").name == "one"  # a path that is there is no glob
    assert find(sd1, tmp_path / "*" / "o*.safetensors").name == "one"
    with pytest.raises(InputError, match="matches 2 paths: .*one.safetensors, .*two.safetensors"):
        find(sd1, tmp_path / "*" / "*.safetensors")
    with pytest.raises(InputError, match="matches nothing"):
        find(sd1, tmp_path / "*.ckpt")


@pytest.fixture
def no_network(monkeypatch):
    """Every connection fails; returns the list of those that were tried."""
    tried: list[object] = []

    def refuse(self, address, *rest):
        tried.append(address)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)

    def no_names(host, *rest, **named):
        tried.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    return tried


@pytest.mark.parametrize("path", ["./a/b", "a/b/c", "/nowhere/model", "nowhere", "a/b.safetensors", "~/x", "a\\b"])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(sd1, no_network, path):
    with pytest.raises(InputError, match="no such file or folder"):
        find(sd1, path)
    assert no_network == []


def test_local_files_open_no_socket(sd1, sd2, no_network, generate):
    for models in (sd1, sd2):
        for path in (models.folder, models.safetensors):
            assert generate(path, "--prompt", "a", *models.options).status == 0
    assert no_network == []


def test_a_model_of_the_hubs_cache_needs_no_network(sd1, no_network, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--shapes"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    blobs = repository / "blobs"
    blobs.mkdir()
    for number, file in enumerate(p for p in sd1.folder.rglob("*") if p.is_file()):
        link = snapshot / file.relative_to(sd1.folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        link.symlink_to(blobs / str(number))
    found = find(sd1, "someone/shapes")
    assert found.name == "shapes"
    load_one(load_unet, found.unet)
    assert no_network == []


def test_a_model_that_is_nowhere_names_the_file(sd1, no_network, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="model_index.json cannot be fetched"):
        find(sd1, "someone/nothing")
    assert no_network != []


def test_the_tokenizer_folder_is_filled_once_and_then_used(sd2, tmp_path):
    found = find(sd2, sd2.safetensors)
    assert found.tokenizer == SHIPPED_TOKENIZER
    tokenizer = load_tokenizer(found.tokenizer, found.family, tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 49406, 49407)
    kept = tmp_path / "stable-diffusion-2"
    config = next(kept.glob("tokenizer_config.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "?"}))
    assert load_tokenizer(found.tokenizer, found.family, tmp_path).pad_token == "?"


def test_random_models_write_what_their_options_say(tmp_path):
    networks = random_model.random_networks("sd2", tiny=True, seed=3)
    state = random_model.original_state_dict(networks, ema=True)
    assert any(name.startswith("model_ema.") for name in state)
    layers = {name.split(".")[4] for name in state if "resblocks" in name}
    assert len(layers) == networks["text_encoder"].config.num_hidden_layers + 1


# ---------------------------------------------------------------------------------------------------------------------


def test_heads_follow_the_family_and_not_the_kind_of_projection(sd1, sd2, tmp_path):
    """SD 1.x with linear projections and SD 2.x with 1×1 convolutions are the same models as without."""
    for models, change in ((sd1, lambda t: t.flatten(1)), (sd2, lambda t: t[:, :, None, None])):
        state = load_file(models.safetensors)
        for name in state:
            if name.endswith((".1.proj_in.weight", ".1.proj_out.weight")):
                state[name] = change(state[name]).contiguous()
        save_file(state, tmp_path / "x.safetensors")
        changed, usual = find(models, tmp_path / "x.safetensors"), find(models, models.safetensors)
        assert changed.family is usual.family
        assert changed.unet.config["attention_head_dim"] == usual.unet.config["attention_head_dim"]


def test_tokenizers_that_are_none(sd1, tmp_path, generate):
    shutil.copytree(sd1.folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(InputError, match="is no tokenizer: merges.txt is missing"):
        find(sd1, tmp_path / "model")
    (tmp_path / "cache" / "clip-vit-large-patch14").mkdir(parents=True)
    result = generate(sd1.safetensors, "--prompt", "a", "--tokenizer_cache_dir", tmp_path / "cache")
    assert result.status == 2
    assert "is no tokenizer: vocab.json is missing" in result.stderr
    (tmp_path / "file").touch()
    result = generate(sd1.safetensors, "--prompt", "a", "--tokenizer_cache_dir", tmp_path / "file")
    assert result.status == 2


def test_an_unclip_file_is_refused(sd2, tmp_path):
    state = load_file(sd2.safetensors)
    state["model.diffusion_model.label_emb.0.0.weight"] = torch.ones(4, 4)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="unCLIP"):
        find(sd2, tmp_path / "x.safetensors")


def test_a_flow_matching_model_is_refused(sdxl, tmp_path):
    shutil.copytree(sdxl.folder, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.5}))
    with pytest.raises(InputError, match="is a flow-matching model; its noise is scaled otherwise"):
        find(sdxl, tmp_path / "model")


def test_a_prediction_type_in_doubt_is_warned_of(sd2, tmp_path):
    assert "add --v_parameterization" in find(sd2, sd2.safetensors, v_parameterization=False).prediction.warnings[0]
    shutil.copytree(sd2.folder, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"prediction_type": "sample"}))
    with pytest.raises(InputError, match="prediction type 'sample'"):
        find(sd2, tmp_path / "model")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_encoder", {"num_hidden_layers": None}),
        ("text_encoder", {"hidden_size": 32}),
        ("text_encoder", {"vocab_size": None}),
        ("unet", {"block_out_channels": None}),
        ("unet", {"down_block_types": ["X", "X", "X", "X"]}),
        ("vae", {"block_out_channels": [32, 32]}),
        ("vae", {"norm_num_groups": "a"}),
    ],
)
def test_damaged_configurations_are_bad_input(sd1, tmp_path, generate, part, changes):
    shutil.copytree(sd1.folder, tmp_path / "model")
    path = tmp_path / "model" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    result = generate(tmp_path / "model", "--prompt", "a")
    assert result.status == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_a_configuration_leaves_out_is_as_transformers_and_diffusers_take_it(sd1, tmp_path, generate):
    """Or refused, where the weights are of another size."""
    shutil.copytree(sd1.folder, tmp_path / "model")
    for part, name in (("text_encoder", "vocab_size"), ("unet", "layers_per_block"), ("unet", "block_out_channels")):
        path = tmp_path / "model" / part / "config.json"
        config = json.loads(path.read_text())
        value = config.pop(name)
        usual = {"vocab_size": 49408, "layers_per_block": 2, "block_out_channels": [320, 640, 1280, 1280]}[name]
        path.write_text(json.dumps(config))
        result = generate(tmp_path / "model", "--prompt", "a", outdir=tmp_path / name)
        assert result.status == (0 if value == usual else 2), (name, result.stderr)
        path.write_text(json.dumps(config | {name: value}))


def test_float16_holds_large_weights_of_both_signs(sd1, tmp_path):
    state = load_file(sd1.safetensors)
    state["model.diffusion_model.out.2.weight"].flatten()[:2] = torch.tensor([40_000.0, -40_000.0])
    save_file(state, tmp_path / "x.safetensors")
    load_one(load_unet, find(sd1, tmp_path / "x.safetensors").unet, torch.float16)


def test_paths_that_are_none(sd1):
    for path in ("~nosuchuser/x", "x" * 300, "a/" + "b" * 300, "a\0b"):
        with pytest.raises(InputError):
            find(sd1, path)


def sharded(folder, stem, count=2, variant=""):
    """Put a component's tensors into several files with an index, as Diffusers and transformers write large ones."""
    (whole,) = folder.glob("*.safetensors")
    state = load_file(whole)
    whole.unlink()
    names, places = sorted(state), {}
    for part in range(count):
        own = names[part::count]
        file = f"{stem}{f'.{variant}' if variant else ''}-{part + 1:05}-of-{count:05}.safetensors"
        save_file({name: state[name] for name in own}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(own, file)
    index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_weights_in_several_files(sdxl, tmp_path, variant):
    folder = tmp_path / "model"
    shutil.copytree(sdxl.folder, folder)
    sharded(folder / "unet", "diffusion_pytorch_model", 3, variant)
    sharded(folder / "text_encoder_2", "model", 2, variant)
    found = find(sdxl, folder)
    loaded, whole = load_all(found), load_all(find(sdxl, sdxl.folder))
    for ours, expected in ((loaded.unet, whole.unet), (loaded.texts[1].model, whole.texts[1].model)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters()))
    assert len(found.unet.weights.files) == 3  # a run that is gone on with compares each


def test_an_index_that_is_not_right_names_what_is_wrong(sdxl, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sdxl.folder, folder)
    index = sharded(folder / "unet", "diffusion_pytorch_model")
    written = json.loads(index.read_text())
    for places, message in (
        (
            written["weight_map"] | {"x": "../other.safetensors"},
            r"names '\.\./other\.safetensors', which is not beside it",
        ),
        (written["weight_map"] | {"conv_in.x": min(written["weight_map"].values())}, "lacks 'conv_in.x'"),
        ({}, "its weight_map is missing"),
    ):
        index.write_text(json.dumps(written | {"weight_map": places}))
        with pytest.raises(InputError, match=message):
            find(sdxl, folder)
    index.unlink()
    with pytest.raises(InputError, match="in several files without their index"):
        find(sdxl, folder)


def test_a_refiner_is_refused_from_its_header(sdxl, tmp_path):
    """Its middle is as deep as the levels above it, and its last level has no attention."""
    config = SDXL.config("unet") | {"cross_attention_dim": 1280, "block_out_channels": [32, 64, 64, 64]}
    config |= {"down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"]}
    config |= {"up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"]}
    config |= {"transformer_layers_per_block": 4, "attention_head_dim": [1, 1, 1, 1]}
    config |= {"projection_class_embeddings_input_dim": 2560}
    unet = UNet2DConditionModel.from_config(config)
    modules = unet_modules(unet.config)
    names = {name: original_name(name, modules) for name in unet.state_dict()}
    state = {f"model.diffusion_model.{names[name]}": value for name, value in unet.state_dict().items()}
    state |= {k: v for k, v in load_file(sdxl.safetensors).items() if k.startswith("first_stage_model.")}
    save_file(state | {"conditioner.embedders.0.model.ln_final.bias": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"is an SDXL refiner; use the base model"):
        find(sdxl, tmp_path / "x.safetensors")


def test_a_folder_of_a_refiner_and_one_without_an_encoder_are_named(sdxl, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sdxl.folder, folder)
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(InputError, match="is a Stable Diffusion XL model without its text_encoder_2"):
        find(sdxl, folder)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 1280}))
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(InputError, match="is an SDXL refiner"):
        find(sdxl, folder)


def test_a_pooled_vector_of_another_width_is_refused(sdxl, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sdxl.folder, folder)
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"projection_dim": 16}))
    with pytest.raises(InputError, match=r"its U-Net is told 1568 numbers beside the text, .* have 16 and 1536"):
        find(sdxl, folder)
    state = load_file(sdxl.safetensors)
    state["model.diffusion_model.label_emb.0.0.weight"] = torch.ones(128, 1000)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="its U-Net is told 1000 numbers"):
        find(sdxl, tmp_path / "x.safetensors")


def test_a_whole_checkpoint_of_another_family_is_no_vae(sd1, sd2, sdxl):
    for models, other, message in (
        (sd1, sdxl, r"is a Stable Diffusion XL model, whose VAE is another; use one of Stable Diffusion 1\.x"),
        (sdxl, sd1, r"is a Stable Diffusion 1\.x model, whose VAE is another; use one of Stable Diffusion XL"),
    ):
        with pytest.raises(InputError, match=message):
            find(models, models.folder, vae=str(other.safetensors))
    assert find(sd1, sd1.folder, vae=str(sd2.safetensors)).vae.config["scaling_factor"] == 0.18215


def test_a_mark_of_zero_terminal_snr_alone_says_nothing_of_v(sdxl, tmp_path):
    save_file(load_file(sdxl.safetensors) | {"ztsnr": torch.empty(0)}, tmp_path / "x.safetensors")
    prediction = find(sdxl, tmp_path / "x.safetensors").prediction
    assert (prediction.type, prediction.zero_snr) == ("epsilon", False)
    assert (
        "has zero terminal SNR, according to its tensor 'ztsnr'; which is for models that predict v"
        in prediction.warnings[0]
    )


def test_a_misspelt_path_is_told_before_it_is_taken_for_an_id(generate):
    """The Hub would be asked for `exampels/shapes`."""
    for given, meant in (("exampels/shapes", "examples/shapes"), ("examples/shaps", "examples/shapes")):
        result = generate(given, "--prompt", "a")
        assert (result.status, result.stderr) == (
            2, f"error: --ckpt {given}: no such file or folder; did you mean {meant}?\n",
        )  # fmt: skip
