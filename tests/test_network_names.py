"""How network files name their layers and say what they are for: every naming, PEFT's settings, other families."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from loading import load_one, prompt_encoder
from network_runs import find, networks, refused, same
from safetensors.torch import save_file

from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.checkpoint_layout import original_name, unet_modules
from library.files.families import SD1, SD2, SDXL
from library.files.model_files import Component
from library.models.models import load_unet
from networks.files import open_network
from networks.keys import UNET, LayerNames, layer_shapes, split_key
from networks.lora import LoraNetwork
from networks.origins import made_for
from networks.states import read_state
from tools.random_network import kohya_name, random_lora

# ---------------------------------------------------------------------------------------------------------------------
# Ways of naming

DIFFUSERS = {"lora_down": "down", "lora_up": "up"}
PEFT = {"lora_down": "lora_A", "lora_up": "lora_B"}
CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
Target = tuple[str, str]


def full_path(target: Target) -> str:
    """A layer's path as files have it."""
    network, path = target
    return path if network == UNET or path == "text_projection" else f"text_model.{path}"


def is_attention(target: Target) -> bool:
    return ".attn" in target[1] and ".to_" in target[1]


class Namings:
    """Ways of naming a model's layers, each a function of a layer and a part of its LoRA."""

    def __init__(self, models) -> None:
        model = find(models)
        self.several = len(model.texts) > 1
        self.originals = unet_modules(model.unet.config)

    def kohya(self, target: Target, part: str) -> str:
        return f"{kohya_name(target, several=self.several)}.{part}.weight"

    def kohya_te1(self, target: Target, part: str) -> str:
        return self.kohya(target, part).replace("lora_te_", "lora_te1_")

    def original(self, target: Target, part: str) -> str:
        if target[0] != UNET:
            return self.kohya(target, part)
        return f"lora_unet_{self._original(target).replace('.', '_')}.{part}.weight"

    def one_trainer_original(self, target: Target, part: str) -> str:
        if target[0] != UNET:
            return self.kohya(target, part)
        return f"{self._original(target)}.{PEFT[part]}.weight"

    def one_trainer_omi(self, target: Target, part: str) -> str:
        if target[0] != UNET:
            return f"lora_{CLIP[target[0]]}.{full_path(target)}.{part}.weight"
        return f"lora_unet.{self._original(target)}.{part}.weight"

    def comfy(self, target: Target, part: str) -> str:
        if target[0] != UNET:
            return f"text_encoders.{CLIP[target[0]]}.transformer.{full_path(target)}.{part}.weight"
        return f"diffusion_model.{self._original(target)}.{part}.weight"

    def first_diffusers(self, target: Target, part: str) -> str:
        """Of attention; the oldest names of text encoders' projections."""
        network, path = target
        old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
        block, _, last = path.rpartition(".")
        if last in old and network != UNET:
            return f"{network}.text_model.{block}.{old[last]}_lora.{DIFFUSERS[part]}.weight"
        return self.old_diffusers(target, part)

    def old_diffusers(self, target: Target, part: str) -> str:
        """Attention's processors; text encoders' linear layers."""
        if target[0] != UNET:
            return f"{target[0]}.{full_path(target)}.lora_linear_layer.{DIFFUSERS[part]}.weight"
        if not is_attention(target):
            return self.diffusers(target, part)
        block, _, projection = target[1].removesuffix(".0").rpartition(".")
        return f"unet.{block}.processor.{projection}_lora.{DIFFUSERS[part]}.weight"

    def bare_processors(self, target: Target, part: str) -> str:
        name = self.old_diffusers(target, part)
        return name.removeprefix("unet.") if is_attention(target) else self.diffusers(target, part)

    def diffusers(self, target: Target, part: str) -> str:
        return f"{target[0]}.{full_path(target)}.lora.{DIFFUSERS[part]}.weight"

    def peft_in_diffusers(self, target: Target, part: str) -> str:
        return f"{target[0]}.{full_path(target)}.{PEFT[part]}.weight"

    def peft_whole(self, target: Target, part: str) -> str:
        """A file for each component; of two text encoders the names are the same."""
        if target[0] != UNET and self.several:
            return self.kohya(target, part)
        return f"base_model.model.{full_path(target)}.{PEFT[part]}.default.weight"

    def any_adapter(self, target: Target, part: str) -> str:
        return f"{target[0]}.base_model.model.{full_path(target)}.{PEFT[part]}.my_style.weight"

    def lycoris(self, target: Target, part: str) -> str:
        if target[0] != UNET:
            return self.kohya(target, part)
        return f"lycoris_{target[1].replace('.', '_')}.{part}.weight"

    def mixed(self, target: Target, part: str) -> str:
        """Another one for each layer, the same for its parts."""
        ways = (self.original, self.kohya, self.peft_in_diffusers, self.comfy, self.lycoris, self.diffusers)
        return ways[len(target[1]) % len(ways)](target, part)

    def _original(self, target: Target) -> str:
        name = original_name(target[1], self.originals)
        assert name is not None
        return name


WAYS = [name for name in vars(Namings) if not name.startswith("_") and name != "kohya"]
TEXT_PREFIXES_OF_ONE = [  # SD 2.x's among them
    *("lora_te1_", "lora_clip_l.", "clip_l.", "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
    *("conditioner.embedders.0.transformer.", "lycoris_", "text_encoder."),
]


def make_lora(models, *, alpha: float | None = None) -> dict[tuple[Target, str], torch.Tensor]:
    """A LoRA for all linear layers and convolutions of a model, its parts by layer."""
    layers = layer_shapes(find(models))
    several = ("text_encoder_2", "text_projection") in layers
    targets = {kohya_name(target, several=several): target for target in layers}
    state = random_lora(layers, 4, alpha=alpha, convolutions=True, seed=1)
    return {(targets[key.partition(".")[0]], key.split(".")[1]): tensor for key, tensor in state.items()}


def write(state, name, file):
    save_file({name(*key): tensor for key, tensor in state.items()}, file)
    return file


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_one_network_in_every_naming_is_one_picture(request, generate, tmp_path, family):
    models = request.getfixturevalue(family)
    state, namings = make_lora(models), Namings(models)
    options = (models.folder, "--prompt", "a cat --d 1", *models.options)
    expected = generate(*options, *networks(write(state, namings.kohya, tmp_path / "kohya.safetensors"))).pictures
    assert not same(generate(*options).pictures, expected)
    for way in WAYS:
        result = generate(*options, *networks(write(state, getattr(namings, way), tmp_path / f"{way}.safetensors")))
        assert "keys fit" not in result.stderr, way  # all of them do
        assert same(expected, result.pictures), way


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("prefix", TEXT_PREFIXES_OF_ONE)
def test_every_name_of_the_only_text_encoder(request, family, prefix):
    model = find(request.getfixturevalue(family))
    names = LayerNames(layer_shapes(model), model.unet.config, model.family.encoders)
    module, part = split_key(f"{prefix}text_model.encoder.layers.1.mlp.fc1.lora_down.weight")
    assert (names.find(module).targets, part) == ((("text_encoder", "encoder.layers.1.mlp.fc1"),), "lora_down")
    module, _ = split_key("cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.lora_down.weight")
    assert names.find(module).targets == (("text_encoder", "encoder.layers.1.mlp.fc1"),)


def test_of_two_namings_of_a_layer_that_of_diffusers_counts_whole(sdxl, generate, tmp_path):
    """Its own alpha, too: none, where the other has one."""
    state, namings = make_lora(sdxl), Namings(sdxl)
    right = {namings.peft_in_diffusers(*key): tensor for key, tensor in state.items()}
    wrong = {namings.original(*key): tensor * 3 for key, tensor in state.items() if key[0][0] == UNET}
    wrong |= {f"{key.partition('.')[0]}.alpha": torch.tensor(1.0) for key in wrong}
    save_file(right, tmp_path / "right.safetensors")
    save_file(wrong | right, tmp_path / "both.safetensors")
    results = [
        generate(sdxl.folder, "--prompt", "a cat --d 1", *networks(tmp_path / f"{name}.safetensors"))
        for name in ("right", "both")
    ]
    assert np.array_equal(results[0].pictures, results[1].pictures)
    assert f"{len(right)} of {len(right) + len(wrong)} keys fit" in results[1].stderr


def test_projections_as_convolutions_and_notes_and_alphas(sdxl, generate, tmp_path):
    """`proj_in` and `proj_out` are linear in XL, and convolutions in some files; OneTrainer's notes are left aside."""
    state, namings = make_lora(sdxl, alpha=2), Namings(sdxl)
    plain = {namings.original(*key).replace("alpha.weight", "alpha"): tensor for key, tensor in state.items()}
    save_file(plain, tmp_path / "plain.safetensors")
    tailed = {key: t[:, :, None, None] if ".lora" in key and "_proj_" in key else t for key, t in plain.items()}
    assert sum(tensor.dim() == 4 for tensor in tailed.values()) > sum(tensor.dim() == 4 for tensor in plain.values())
    noted = {key.replace(".lora", "._aux.lora"): torch.ones(1) for key in plain if "lora_down" in key}
    save_file(tailed | noted, tmp_path / "tailed.safetensors")
    results = [
        generate(sdxl.folder, "--prompt", "a cat --d 1", *networks(tmp_path / f"{name}.safetensors"))
        for name in ("plain", "tailed")
    ]
    assert "keys fit" not in results[1].stderr
    assert np.array_equal(results[0].pictures, results[1].pictures)


def test_norms_and_biases_as_differences(sd1, generate, tmp_path):
    """As ComfyUI extracts them; a bias's difference alone and beside a LoRA."""
    norm, layer = "input_blocks.1.0.in_layers.0", "middle_block.1.transformer_blocks.0.attn1.to_out.0"
    text = "text_model.encoder.layers.1.layer_norm1"
    ones, bias = torch.full((32,), 0.3), torch.full((4,), 0.3)
    pair = {"lora_down.weight": torch.ones(1, 64) * 0.1, "lora_up.weight": torch.ones(64, 1)}
    extracted = {f"diffusion_model.{layer}.{part}": tensor for part, tensor in pair.items()}
    extracted |= {f"diffusion_model.{norm}.diff": ones, f"diffusion_model.{norm}.diff_b": -ones}
    extracted |= {f"diffusion_model.{layer}.diff_b": torch.full((64,), 0.2), "diffusion_model.out.2.diff_b": bias}
    extracted |= {f"text_encoders.clip_l.transformer.{text}.diff": torch.full((64,), 0.4)}
    flat = "lora_unet_down_blocks_0_resnets_0_norm1"
    path = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    plain = {f"{flat}.w_norm": ones, f"{flat}.b_norm": -ones, f"{path}.diff": torch.full((64, 64), 0.1)}
    plain |= {f"{path}.diff_b": torch.full((64,), 0.2), "lora_unet_conv_out.diff_b": bias}
    plain |= {f"lora_te_{text.replace('.', '_')}.w_norm": torch.full((64,), 0.4)}
    plain |= {f"lora_te_{text.replace('.', '_')}.b_norm": torch.zeros(64)}
    pictures = [generate(sd1.folder, "--prompt", "a cat --d 1").pictures]
    for name, state in (("extracted", extracted), ("plain", plain)):
        save_file(state, tmp_path / f"{name}.safetensors")
        result = generate(sd1.folder, "--prompt", "a cat --d 1", *networks(tmp_path / f"{name}.safetensors"))
        assert "keys fit" not in result.stderr
        pictures.append(result.pictures)
    assert same(*pictures[1:])
    assert not same(*pictures[:2])


@pytest.mark.parametrize("kept", ["outputs", "inputs", "PEFT", "ai-toolkit"])
def test_norms_of_dora_are_kept(sdxl, generate, tmp_path, kept):
    """Against the same change as plain differences; also of linear layers in the shape of convolutions."""
    state, namings, model = make_lora(sdxl), Namings(sdxl), find(sdxl)
    weights = {UNET: load_one(load_unet, model.unet)}
    dora, full = {}, {}
    for (target, part), up in state.items():
        if part != "lora_up" or target[0] != UNET:
            continue
        weight, down = weights[UNET].get_submodule(target[1]).weight, state[target, "lora_down"]
        direction = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        axis = int(kept == "inputs")
        norm = direction.transpose(0, axis).flatten(1).norm(dim=1)
        size = norm * (1 + 0.3 * torch.rand(norm.shape, generator=torch.Generator().manual_seed(len(norm))))
        shape = [1] * weight.dim()
        shape[axis] = -1
        full[f"{namings.kohya(target, 'x').partition('.')[0]}.diff"] = direction * (size / norm).reshape(shape) - weight
        names = namings.peft_in_diffusers if kept in ("PEFT", "ai-toolkit") else namings.original
        dora |= {names(target, "lora_up"): up, names(target, "lora_down"): down}
        module = names(target, "lora_up").removesuffix(".lora_B.weight").removesuffix(".lora_up.weight")
        if kept == "PEFT":
            dora[f"{module}.lora_magnitude_vector.weight"] = size if len(shape) == 2 else size.reshape(1, -1, 1, 1)
        elif kept == "ai-toolkit":
            dora[f"{module}.magnitude"] = size
        else:
            dora[f"{module}.dora_scale"] = (
                size.reshape(shape)[..., None, None] if "proj_" in module else size.reshape(shape)
            )
    save_file({key: tensor.detach().contiguous() for key, tensor in dora.items()}, tmp_path / "dora.safetensors")
    save_file({key: tensor.detach().contiguous() for key, tensor in full.items()}, tmp_path / "full.safetensors")
    results = [
        generate(sdxl.folder, "--prompt", "a cat --d 1", *networks(tmp_path / f"{name}.safetensors"))
        for name in ("full", "dora")
    ]
    assert "keys fit" not in results[1].stderr
    assert same(*(result.pictures for result in results))


def test_the_projection_changes_the_pooled_vector_alone(sdxl):
    """Its two factors as for any linear layer, with the projection as (vector, features)."""
    files = find(sdxl)
    encoder = prompt_encoder(files)
    before = encoder.encode(["a cat"], 1)
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    unet, models = load_one(load_unet, files.unet), [text.model for text in encoder.texts]
    network = LoraNetwork(models, unet, 0.5)
    name = "lora_te2_text_projection"
    network.load_state_dict({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, strict=True)
    features = torch.linalg.lstsq(models[1].text_projection.weight, before.pooled[0])[0]
    network.apply_to(models, unet)
    after = prompt_encoder(files)
    after.texts = encoder.texts
    after = after.encode(["a cat"], 1)
    assert torch.equal(before.embeddings, after.embeddings)
    torch.testing.assert_close(after.pooled[0], before.pooled[0] + 0.5 * up @ down @ features, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's settings


@pytest.mark.parametrize("place", ["folder", "metadata"])
def test_peft_keeps_alpha_apart(tmp_path, place):
    state = {f"unet.mid.{name}.lora_A.weight": torch.ones(4, 8) for name in ("a", "b")}
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"b": 2}}
    if place == "folder":
        save_file(state, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
        expected = (16, 4)  # alpha * sqrt(r)
        read = read_state(open_network(tmp_path))
    else:
        text = json.dumps({f"unet.{name}": value for name, value in config.items()})
        save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": text})
        expected = (8, 2)
        read = read_state(open_network(tmp_path / "x.safetensors"))
    assert (float(read["unet.mid.a.alpha"]), float(read["unet.mid.b.alpha"])) == expected


def test_patterns_are_regular_expressions_that_end_a_path(tmp_path):
    """As PEFT matches them; the first that fits counts."""
    paths = ("down.0.attn.to_q", "down.1.attn.to_q", "down.1.attn.to_k", "down.1.to_kk", "proj")
    state = {f"base_model.model.{path}.lora_A.weight": torch.ones(4, 8) for path in paths}
    save_file(state, tmp_path / "adapter_model.safetensors")
    patterns = {r"1\.attn\.to_[qk]": 2, "attn.to_q": 3, "to_k": 5, "down.*proj": 7}
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read = read_state(open_network(tmp_path))
    assert [float(read[f"base_model.model.{path}.alpha"]) for path in paths] == [3, 2, 2, 8, 8]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"(": 1}}))
    with pytest.raises(InputError, match="its adapter configuration has a wrong pattern"):
        read_state(open_network(tmp_path))


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "LOKR full", "OFT"])
def test_the_strength_of_other_networks_of_peft_stands_in_their_configuration(sd1, generate, tmp_path, kind):
    """alpha / r, also of a LoKr without a rank; OFT's series is exact or not. Against the plain difference."""
    layer, weight = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 32
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator) * 0.3

    config = {"peft_type": kind.split()[0], "r": 2, "alpha": 16, "alpha_pattern": {r".*attn1\.to_q": 6}}
    if kind == "LOHA":
        parts = {f"hada_w{n}_{side}": randn(*size) for n in (1, 2) for side, size in (("a", (32, 2)), ("b", (2, 32)))}
        change = 3 * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    elif kind == "LOKR":
        parts = {"lokr_w1": randn(4, 4), "lokr_w2_a": randn(8, 2), "lokr_w2_b": randn(2, 8)}
        change = 3 * torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    elif kind == "LOKR full":
        parts = {"lokr_w1": randn(4, 4), "lokr_w2": randn(8, 8)}
        change = 3 * torch.kron(parts["lokr_w1"], parts["lokr_w2"])
    else:
        parts = {"oft_R.weight": randn(16, 1)}
        config = {"peft_type": "OFT", "use_cayley_neumann": False}
        unet = load_one(load_unet, find(sd1).unet)
        q = torch.zeros(weight, weight)
        for block, number in enumerate(parts["oft_R.weight"]):
            q[2 * block, 2 * block + 1] = number
            q[2 * block + 1, 2 * block] = -number
        rotation = (torch.eye(weight) - q) @ torch.linalg.inv(torch.eye(weight) + q)
        change = unet.get_submodule(layer).weight @ (rotation.T - torch.eye(weight))
    (tmp_path / "adapter").mkdir()
    state = {f"base_model.model.{layer}.{part}": tensor for part, tensor in parts.items()}
    save_file(state, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    full = {f"lora_unet_{layer.replace('.', '_')}.diff": change.detach().contiguous()}
    save_file(full, tmp_path / "full.safetensors")
    options = (sd1.folder, "--prompt", "a cat --d 1")
    expected = generate(*options, *networks(tmp_path / "full.safetensors")).pictures
    assert not same(generate(*options).pictures, expected)
    assert same(expected, generate(*options, *networks(tmp_path / "adapter")).pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Other families, and files of other kinds


def test_files_for_widths_that_no_layer_here_has(sd1, generate, tmp_path):
    def of_width(width, prefix="lora_te_text_model_encoder_layers_0"):
        down, up = torch.ones(2, width), torch.ones(width, 2)
        name = f"{prefix}_self_attn_q_proj"
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}

    for state, family in (
        (of_width(768), "it is made for Stable Diffusion 1.x,"),
        (of_width(1024), "it is made for Stable Diffusion 2.x,"),
        (of_width(1280, "lora_te2_text_model_encoder_layers_0"), "it is made for Stable Diffusion XL,"),
        (of_width(1280, "text_model_encoder_layers_0"), "it is made for Stable Diffusion XL,"),
        (of_width(64, "lora_unet_double_blocks_0"), "it is made for a Flux model"),
    ):
        save_file(state, tmp_path / "other.safetensors")
        assert family in refused(generate, sd1.folder, *networks(tmp_path / "other.safetensors"))


def relative_of_lora(kind: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A network's parts for a weight of a shape."""
    outputs, inputs, columns = shape[0], shape[1], int(np.prod(shape[1:]))
    window = shape[2:]
    if kind == "LoRA":
        parts = {"lora_down.weight": (2, *shape[1:]), "lora_up.weight": (outputs, 2, *[1] * len(window))}
    elif kind == "LoHa":
        parts = {f"hada_w{n}_{side}": size for n in (1, 2) for side, size in (("a", (outputs, 2)), ("b", (2, columns)))}
    elif kind == "LoKr":
        parts = {"lokr_w1": (2, 2), "lokr_w2": (outputs // 2, inputs // 2, *window)}
    else:
        parts = {"diff": shape}
    return {name: torch.full(size, 0.01) for name, size in parts.items()}


SHARES = {  # of a network's layers
    "all": lambda target: True,
    "U-Net": lambda target: target[0] == UNET,
    "attention": is_attention,
    "self-attention": lambda target: is_attention(target) and ".attn1." in target[1],
    "convolutions": lambda target: "resnets" in target[1] or "samplers" in target[1],
    "text encoders": lambda target: target[0] != UNET,
}


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "full"])
@pytest.mark.parametrize("naming", ["kohya", "original", "peft_in_diffusers"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_network_of_another_family_is_refused_by_name(request, sd1, sdxl, tmp_path, family, share, naming, kind):
    """Whatever part of a family's layers it is for, told before the model is loaded; its own are not."""
    models = request.getfixturevalue(family)
    namings, model = Namings(models), find(models)
    shapes = {}
    for target, shape in layer_shapes(model).items():
        if not SHARES[share](target) or len(shape) < 2 or "embeddings." in target[1]:
            continue
        if 4 in shape[:2]:  # latents; no factor of LoKr
            continue
        for part, tensor in relative_of_lora(kind, shape).items():
            name = getattr(namings, naming)(target, "lora_up")
            module = name.removesuffix(".lora_B.weight").removesuffix(".lora_up.weight")
            shapes[f"{module}.{part}"] = tuple(tensor.shape)
    other = find(sdxl if family == "sd1" else sd1)
    assert made_for(shapes, {}, model) is None
    if family == "sdxl":
        assert made_for(shapes, {}, other) == "Stable Diffusion XL"
    elif share != "text encoders" or naming != "peft_in_diffusers":  # which could be for XL's first one
        assert made_for(shapes, {}, other) == "Stable Diffusion 1.x or Stable Diffusion 2.x"


def test_the_first_of_two_text_encoders_may_be_named_as_if_there_were_one(sdxl):
    """Where other names tell the family."""
    text, unet = "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_up_blocks_0_attentions_0_proj_in"
    shapes = {f"{text}.lora_down.weight": (2, 64), f"{text}.lora_up.weight": (128, 2)}
    assert made_for(shapes, {}, find(sdxl)) == "Stable Diffusion 1.x or Stable Diffusion 2.x"
    shapes |= {f"{unet}.lora_down.weight": (2, 64), f"{unet}.lora_up.weight": (64, 2)}
    assert made_for(shapes, {}, find(sdxl)) is None


@dataclass
class Headers:
    """A weight file that has names and shapes alone."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)


def published(family, sd1_files):
    """A family's published U-Net in place of a small one, as far as its convolutions."""
    config = family.config("unet")
    shapes = {f"{path}.weight": shape for path, shape in layout.unet_convolutions(config).items()}
    return replace(sd1_files, family=family, unet=Component(config, Headers(shapes)))


@pytest.mark.parametrize("original", [False, True])
def test_convolutions_alone_tell_the_published_families(sd1, original):
    models = {family: published(family, find(sd1)) for family in (SD1, SD2, SDXL)}
    for family, its_model in models.items():
        names = unet_modules(its_model.unet.config)
        files = {}
        for path, (outputs, inputs, *window) in layout.unet_convolutions(its_model.unet.config).items():
            name = (original_name(path, names) if original else path).replace(".", "_")
            files[f"lora_unet_{name}.lora_down.weight"] = (4, inputs, *window)
            files[f"lora_unet_{name}.lora_up.weight"] = (outputs, 4, *[1] * len(window))
        for other, model in models.items():
            told = made_for(files, {}, model)
            if (family is SDXL) == (other is SDXL):
                assert told is None  # SD 1.x and 2.x share them
            else:
                assert family.name in told


def test_a_network_of_few_layers_is_told_by_its_metadata(sd1, sdxl):
    shapes = {"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (2, 64)}
    shapes |= {"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": (64, 2)}
    for metadata, family in (
        ({}, None),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "Stable Diffusion XL"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "Stable Diffusion XL"),
        ({"ss_base_model_version": "sd_v1"}, None),
        ({"ss_base_model_version": "something else"}, None),
    ):
        assert made_for(shapes, metadata, find(sd1)) == family
    assert made_for(shapes, {"ss_base_model_version": "sd_v1"}, find(sdxl)) == "Stable Diffusion 1.x"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x.weight": (1,)}, "0 of 1 keys fit; it is no network for Stable Diffusion, which networks.lora cannot read"),
        ({"emb_params": (1, 64)}, "embedding, not a network; give it with --textual_inversion_embeddings"),
        ({"<zorb>": (768,)}, "embedding, not a network; give it with --textual_inversion_embeddings"),
        ({"clip_l": (1, 64)}, "embedding, not a network; give it with --textual_inversion_embeddings"),
        ({"zero_convs.0.0.weight": (4, 4, 1, 1)}, "a ControlNet, not a network; give it with --control_net_models"),
        ({"model.diffusion_model.out.2.weight": (4, 32, 3, 3)}, "a checkpoint, not a network; give it with --ckpt"),
        ({"encoder.conv_in.weight": (4, 3, 3, 3)}, "it is a VAE, not a network; give it with --vae"),
        ({"base_model.model.mid.oft_r": (4, 4, 4)}, "it is an OFT of the first versions of PEFT, which networks.lora"),
        ({"base_model.model.mid.ia3_l": (4, 1)}, "it is an IA³ of PEFT, which networks.lora cannot read"),
        ({"lora_unet_x.a1.weight": (4, 2), "lora_unet_x.a2.weight": (2, 4), "lora_unet_x.b1.weight": (4, 2),
          "lora_unet_x.b2.weight": (2, 4)}, "it is a network (GLoRA) for other layers than this model's"),
        ({"bundle_emb.zorb.clip_l": (1, 64)}, "0 of 0 keys fit; it is a file of embeddings alone"),
    ],
)  # fmt: skip
def test_what_a_file_is_that_no_key_fits(sd1, generate, tmp_path, state, message):
    save_file({key: torch.zeros(shape) for key, shape in state.items()}, tmp_path / "other.safetensors")
    assert message in refused(generate, sd1.folder, *networks(tmp_path / "other.safetensors"))
