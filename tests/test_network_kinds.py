"""Each relative of LoRA: its effect on every kind of layer, against its formula in float64 and against LyCORIS."""

import numpy as np
import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

from networks.kinds import KINDS, LORA, weight_change
from networks.layers import LayerChange, adapter_of, remove_change

OUT, IN, RANK = 24, 16, 4
LAYERS = {"linear": (), "1x1": (1, 1), "3x3": (3, 3)}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def make_layer(layer: str) -> nn.Module:
    window = LAYERS[layer]
    module = nn.Conv2d(IN, OUT, window, padding=window[0] // 2) if window else nn.Linear(IN, OUT)
    with torch.no_grad():
        module.weight.copy_(random(OUT, IN, *window, seed=5))
        module.bias.copy_(random(OUT, seed=6))
    return module.requires_grad_(False)


def make_input(layer: str) -> torch.Tensor:
    return random(2, IN, 5, 6) if LAYERS[layer] else random(2, 7, IN)


def matrix(parts: dict[str, torch.Tensor], name: str) -> np.ndarray:
    return parts[name].double().numpy()


# Parts of each kind for a layer's window (k, k) or (), and the change of W that its paper's formula gives in float64


def lora(window):
    parts = {
        "lora_down.weight": random(RANK, IN, *window),
        "lora_up.weight": random(OUT, RANK, *[1] * len(window)),
        "alpha": torch.tensor(2.0),
    }
    up, down = matrix(parts, "lora_up.weight").reshape(OUT, RANK), matrix(parts, "lora_down.weight")
    return parts, lambda w: 2 / RANK * np.tensordot(up, down, 1)


def lora_without_alpha(window):
    parts, change = lora(window)
    del parts["alpha"]
    return parts, lambda w: RANK / 2 * change(w)


def lora_tucker(window):
    flat = [1] * len(window)
    parts = {
        "lora_down.weight": random(RANK, IN, *flat),
        "lora_mid.weight": random(RANK, RANK, *window),
        "lora_up.weight": random(OUT, RANK, *flat),
        "alpha": torch.tensor(1.0),
    }
    up, mid, down = (matrix(parts, f"lora_{name}.weight") for name in ("up", "mid", "down"))
    up, down = up.reshape(OUT, RANK), down.reshape(RANK, IN)
    return parts, lambda w: np.einsum("nmkl,in,mj->ijkl", mid, up, down) / RANK


def loha(window):
    size = int(np.prod(window, dtype=int)) * IN
    parts = {
        **{f"hada_w{n}_a": random(OUT, RANK, seed=n) for n in (1, 2)},
        **{f"hada_w{n}_b": random(RANK, size, seed=n) for n in (1, 2)},
        "alpha": torch.tensor(3.0),
    }
    first, second = (matrix(parts, f"hada_w{n}_a") @ matrix(parts, f"hada_w{n}_b") for n in (1, 2))
    return parts, lambda w: 3 / RANK * (first * second).reshape(w.shape)


def loha_tucker(window):
    parts = {
        **{f"hada_w{n}_a": random(RANK, OUT, seed=n) for n in (1, 2)},
        **{f"hada_w{n}_b": random(RANK, IN, seed=n) for n in (1, 2)},
        **{f"hada_t{n}": random(RANK, RANK, *window, seed=n) for n in (1, 2)},
        "alpha": torch.tensor(float(RANK)),
    }
    factors = [
        np.einsum("abkl,ao,bi->oikl", *(matrix(parts, f"hada_{name}") for name in (f"t{n}", f"w{n}_a", f"w{n}_b")))
        for n in (1, 2)
    ]
    return parts, lambda w: factors[0] * factors[1]


def kronecker(first: np.ndarray, second: np.ndarray, window) -> np.ndarray:
    """kron along outputs and inputs, the window untouched."""
    second = second.reshape(*second.shape[:2], -1)
    layers = [np.kron(first, second[:, :, place]) for place in range(second.shape[2])]
    return np.stack(layers, axis=2).reshape(OUT, IN, *window)


def lokr(window):
    """Both factors full: alpha means nothing."""
    parts = {"lokr_w1": random(6, 4), "lokr_w2": random(4, 4, *window), "alpha": torch.tensor(7.0)}
    return parts, lambda w: kronecker(matrix(parts, "lokr_w1"), matrix(parts, "lokr_w2"), window)


def lokr_low_rank(window):
    size = int(np.prod(window, dtype=int)) * 4
    parts = {
        **{"lokr_w1_a": random(6, 2), "lokr_w1_b": random(2, 4, seed=1)},
        **{"lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, size)},
        "alpha": torch.tensor(1.0),
    }
    first = matrix(parts, "lokr_w1_a") @ matrix(parts, "lokr_w1_b")
    second = (matrix(parts, "lokr_w2_a") @ matrix(parts, "lokr_w2_b")).reshape(4, 4, *window)
    return parts, lambda w: kronecker(first, second, window) / 2


def lokr_tucker(window):
    parts = {
        "lokr_w1": random(6, 4),
        **{"lokr_w2_a": random(2, 4), "lokr_w2_b": random(2, 4, seed=1), "lokr_t2": random(2, 2, *window)},
        "alpha": torch.tensor(2.0),
    }
    second = np.einsum("abkl,ao,bi->oikl", *(matrix(parts, f"lokr_{n}") for n in ("t2", "w2_a", "w2_b")))
    return parts, lambda w: kronecker(matrix(parts, "lokr_w1"), second, window)


def lokr_scaled(window):
    """PEFT scales two full factors, too."""
    parts, change = lokr(window)
    return parts | {"full_scale": torch.tensor(0.25)}, lambda w: change(w) / 4


def glora(window):
    """W·a1·a2 + b1·b2; a goes along the inputs."""
    flat = [1] * len(window)
    parts = {
        **{"a1.weight": random(IN, RANK, *flat), "a2.weight": random(RANK, IN, *flat)},
        **{"b1.weight": random(OUT, RANK, *flat), "b2.weight": random(RANK, IN, *window)},
        "alpha": torch.tensor(2.0),
    }

    def change(w):
        through = matrix(parts, "a1.weight").reshape(IN, RANK) @ matrix(parts, "a2.weight").reshape(RANK, IN)
        own = matrix(parts, "b1.weight").reshape(OUT, RANK) @ matrix(parts, "b2.weight").reshape(RANK, -1)
        return 2 / RANK * (np.einsum("oi...,ij->oj...", w, through) + own.reshape(w.shape))

    return parts, change


def glora_of_old(window):
    """The first files hold each pair the other way round."""
    parts, change = glora(window)
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    names = {f"{name}.weight": f"{other}.weight" for name, other in swapped.items()} | {"alpha": "alpha"}
    return {name: parts[names[name]] for name in parts}, change


def dora(kind, axis):
    def make(window):
        parts, change = kind(window)
        shape = [1, 1, *[1] * len(window)]
        shape[axis] = (OUT, IN)[axis]
        parts["dora_scale"] = random(*shape).abs() + 0.5

        def decomposed(w):
            v = w + change(w)
            axes = tuple(a for a in range(v.ndim) if a != axis)
            return v * matrix(parts, "dora_scale") / np.sqrt((v**2).sum(axes, keepdims=True)) - w

        return parts, decomposed

    return make


def peft_dora(window):
    """A norm for each output, (out) or (1, out, 1, 1)."""
    parts, change = dora(lora, 0)(window)
    magnitude = parts["dora_scale"].flatten()
    others = {name: part for name, part in parts.items() if name != "dora_scale"}
    return others | {"magnitude": magnitude.reshape(1, -1, 1, 1) if window else magnitude}, change


def ia3(axis):
    def make(window):
        size = (OUT, IN)[axis]
        parts = {
            "weight": random(1, size, *[1] * len(window)) if window else random(size),
            "on_input": torch.tensor(axis),
        }
        shape = [1] * (2 + len(window))
        shape[axis] = size
        return parts, lambda w: w * matrix(parts, "weight").reshape(shape)

    return make


def rotated(weight: np.ndarray, blocks: np.ndarray, limit: float) -> np.ndarray:
    """Each block of outputs rotated; a positive limit bounds the norm of all Q together."""
    skew = blocks - blocks.transpose(0, 2, 1)
    if limit:
        skew *= min(1, limit / np.linalg.norm(skew))
    result, size = weight.copy(), blocks.shape[1]
    for number, q in enumerate(skew):
        rows = slice(size * number, size * (number + 1))
        rotation = (np.eye(size) + q) @ np.linalg.inv(np.eye(size) - q)
        result[rows] = np.tensordot(rotation.T, weight[rows], 1)
    return result


def oft(window):
    parts = {"oft_blocks": random(6, 4, 4), "alpha": torch.tensor(0.0)}
    return parts, lambda w: rotated(w, matrix(parts, "oft_blocks"), 0) - w


def oft_rescaled(window):
    parts = {
        "oft_blocks": random(6, 4, 4),
        "alpha": torch.tensor(0.02),
        "rescale": random(OUT, *[1] * (1 + len(window))).abs(),
    }
    limit = 0.02 * OUT
    return parts, lambda w: rotated(w, matrix(parts, "oft_blocks"), limit) * matrix(parts, "rescale") - w


def boft(window):
    """Stage i rotates blocks of 2 of 4 rows at a distance of 2·2ⁱ⁻¹, of 24 rows in 6 blocks, twice over."""
    parts = {"oft_blocks": random(2, 6, 4, 4), "alpha": torch.tensor(0.0)}

    def change(w):
        rows = w.reshape(OUT, -1)
        for stage, distance in enumerate((2, 4)):
            order = [
                start + place + half * distance
                for start in range(0, OUT, 2 * distance)
                for place in range(distance)
                for half in (0, 1)
            ]
            skew = matrix(parts, "oft_blocks")[stage]
            skew = skew - skew.transpose(0, 2, 1)
            turned = np.empty_like(rows)
            for block, q in enumerate(skew):
                own = order[4 * block : 4 * block + 4]
                turned[own] = (np.eye(4) + q) @ np.linalg.inv(np.eye(4) - q) @ rows[own]
            rows = turned
        return rows.reshape(w.shape) - w

    return parts, change


def peft_oft(terms, bound=None):
    """Each block of inputs rotated: y = W·(x·R) in row vectors; R exact or its series; each Q's norm may be bounded."""

    def make(window):
        inputs = IN * int(np.prod(window, dtype=int))
        parts = {"oft_R": random(inputs // 4, 6) * 0.5, "oft_terms": torch.tensor(float(terms))}
        parts |= {"oft_bound": torch.tensor(bound)} if bound else {}

        def rotation(numbers):
            q = np.zeros((4, 4))
            q[np.triu_indices(4, 1)] = numbers
            q -= q.T
            q *= min(1, bound / np.linalg.norm(q)) if bound else 1
            if not terms:
                return (np.eye(4) - q) @ np.linalg.inv(np.eye(4) + q)
            return np.eye(4) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q

        def change(w):
            flat, result = w.reshape(OUT, -1), np.empty((OUT, inputs))
            for block, numbers in enumerate(matrix(parts, "oft_R")):
                own = slice(4 * block, 4 * block + 4)
                result[:, own] = flat[:, own] @ rotation(numbers).T
            return result.reshape(w.shape) - w

        return parts, change

    return make


def peft_boft(stages):
    """Inputs in blocks of 4, made of halves that stand 2ⁱ halves apart in stage i; one rotation after the other."""

    def make(window):
        inputs = IN * int(np.prod(window, dtype=int))
        parts = {"boft_R": random(stages, inputs // 4, 4, 4), "boft_s": random(OUT, 1).abs() + 0.5}
        if stages == 1:
            parts = {"oft_r": parts["boft_R"][0], "oft_s": parts["boft_s"]}

        def change(w):
            result = w.reshape(OUT, -1).copy()
            for stage in range(stages):
                blocks = matrix(parts, "oft_r") if stages == 1 else matrix(parts, "boft_R")[stage]
                starts = [
                    (stretch + place, stretch + place + 2 * 2**stage)
                    for stretch in range(0, inputs, 4 * 2**stage)
                    for place in range(0, 2 * 2**stage, 2)
                ]
                for (first, second), block in zip(starts, blocks, strict=True):
                    own, q = [first, first + 1, second, second + 1], (block - block.T) / 2
                    result[:, own] = result[:, own] @ ((np.eye(4) - q) @ np.linalg.inv(np.eye(4) + q)).T
            return (result * matrix(parts, "boft_s" if stages > 1 else "oft_s")).reshape(w.shape) - w

        return parts, change

    return make


def lora_and_bias(window):
    parts, change = lora(window)
    return parts | {"diff_b": random(OUT, seed=8)}, change


def lora_with_bias_of_its_own(window):
    """PEFT's bias of the second factor, which the scale is for, too."""
    parts, change = lora(window)
    return parts | {"up_bias": random(OUT, seed=8)}, change


def bias(window):
    return {"diff_b": random(OUT, seed=8)}, np.zeros_like


def full(window):
    parts = {"diff": random(OUT, IN, *window), "diff_b": random(OUT)}
    return parts, lambda w: matrix(parts, "diff")


EVERYWHERE = {
    "LoRA": lora,
    "LoRA without alpha": lora_without_alpha,
    "LoHa": loha,
    "LoKr": lokr,
    "LoKr low rank": lokr_low_rank,
    "LoKr scaled": lokr_scaled,
    "GLoRA": glora,
    "GLoRA, old": glora_of_old,
    "DoRA along outputs": dora(lora, 0),
    "DoRA along inputs": dora(lora, 1),
    "DoRA of LoHa": dora(loha, 0),
    "DoRA of LoKr": dora(lokr_low_rank, 0),
    "DoRA of PEFT": peft_dora,
    "IA3 on outputs": ia3(0),
    "IA3 on inputs": ia3(1),
    "OFT": oft,
    "OFT rescaled": oft_rescaled,
    "BOFT": boft,
    "PEFT's OFT": peft_oft(5),
    "PEFT's OFT, exact": peft_oft(0),
    "PEFT's OFT, bounded": peft_oft(5, bound=0.25),
    "PEFT's BOFT": peft_boft(3),
    "PEFT's first OFT": peft_boft(1),
    "LoRA and bias": lora_and_bias,
    "LoRA with a bias": lora_with_bias_of_its_own,
    "bias": bias,
    "full": full,
}
CONVOLUTIONS = {"LoCon Tucker": lora_tucker, "LoHa Tucker": loha_tucker, "LoKr Tucker": lokr_tucker}
CASES = [(name, layer) for name in EVERYWHERE for layer in LAYERS] + [(name, "3x3") for name in CONVOLUTIONS]


def change_of(parts: dict[str, torch.Tensor], multiplier: float) -> LayerChange:
    """A layer's change of parts under the names that they have in files."""
    plain = {name.removesuffix(".weight"): part for name, part in parts.items()}
    kind = next(kind for kind in KINDS if kind.has(plain))
    return LayerChange(kind, plain, multiplier)


def test_every_kind_has_its_formula_here():
    makers = [(make, LAYERS["3x3"]) for make in (EVERYWHERE | CONVOLUTIONS).values()]
    covered = {change_of(make(window)[0], 1.0).kind.name for make, window in makers}
    assert covered | {"norm"} == {kind.name for kind in KINDS}  # norms have a test of their own


def attach(layer: nn.Module, change: LayerChange, *, folded: bool) -> None:
    adapter_of(layer).add(change, folded=folded or not change.is_pair(layer))
    adapter_of(layer).fold()


@pytest.mark.parametrize(("name", "layer"), CASES)
@pytest.mark.parametrize("multiplier", [1.0, -0.7])
@pytest.mark.parametrize("folded", [False, True])
def test_the_effect_is_the_formula(name, layer, multiplier, folded):
    parts, change = (EVERYWHERE | CONVOLUTIONS)[name](LAYERS[layer])
    exact, module, x = make_layer(layer).double(), make_layer(layer), make_input(layer)
    before = exact(x.double())
    exact.weight += multiplier * torch.from_numpy(change(exact.weight.numpy())).reshape(exact.weight.shape)
    if "diff_b" in parts:
        exact.bias += multiplier * parts["diff_b"]
    if "up_bias" in parts:
        exact.bias += multiplier * float(parts["alpha"]) / RANK * parts["up_bias"]
    attach(module, change_of(parts, multiplier), folded=folded)
    expected = exact(x.double())
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-5)  # float32


# LyCORIS' own modules: class, settings, and the layers that they are for
LYCORIS = {
    "LoCon": (LoConModule, {"alpha": 2}, LAYERS),
    "LoCon Tucker": (LoConModule, {"alpha": 2, "use_tucker": True}, ["3x3"]),
    "LoCon rank-stabilised": (LoConModule, {"alpha": 2, "rs_lora": True}, LAYERS),
    "DoRA along outputs": (LoConModule, {"weight_decompose": True}, LAYERS),
    "DoRA along inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}, LAYERS),
    "LoHa": (LohaModule, {"alpha": 2}, LAYERS),
    "LoHa Tucker": (LohaModule, {"alpha": 2, "use_tucker": True}, ["3x3"]),
    "DoHa": (LohaModule, {"alpha": 2, "weight_decompose": True}, LAYERS),
    "LoKr": (LokrModule, {"lora_dim": 1, "alpha": 2}, LAYERS),
    "LoKr both decomposed": (LokrModule, {"lora_dim": 1, "alpha": 2, "decompose_both": True}, LAYERS),
    "LoKr full": (LokrModule, {"full_matrix": True, "alpha": 2}, LAYERS),
    "LoKr Tucker": (LokrModule, {"lora_dim": 1, "use_tucker": True}, ["3x3"]),
    "DoKr": (LokrModule, {"lora_dim": 1, "alpha": 2, "weight_decompose": True}, LAYERS),
    "IA3 on outputs": (IA3Module, {}, LAYERS),
    "IA3 on inputs": (IA3Module, {"train_on_input": True}, LAYERS),
    "OFT": (DiagOFTModule, {}, LAYERS),
    "OFT bounded": (DiagOFTModule, {"constraint": 0.02}, LAYERS),
    "OFT rescaled": (DiagOFTModule, {"rescaled": True}, LAYERS),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 6}, LAYERS),
    "BOFT bounded": (ButterflyOFTModule, {"lora_dim": 6, "constraint": 0.02}, LAYERS),
    "BOFT rescaled": (ButterflyOFTModule, {"lora_dim": 6, "rescaled": True}, LAYERS),
    "GLoRA": (GLoRAModule, {"alpha": 2}, LAYERS),
    "full": (FullModule, {}, LAYERS),
}


@pytest.mark.parametrize(
    ("name", "layer"), [(name, layer) for name, (*_, layers) in LYCORIS.items() for layer in layers]
)
@torch.no_grad()
def test_the_effect_is_that_of_lycoris(name, layer):
    """What LyCORIS' module does to a layer is what its saved weights do here."""
    make, settings, _ = LYCORIS[name]
    ours, theirs, x = make_layer(layer), make_layer(layer), make_input(layer)
    module = make("layer", theirs, 1.0, **{"lora_dim": RANK, "alpha": RANK} | settings)
    for number, (part, parameter) in enumerate(module.named_parameters()):
        value = random(*parameter.shape, seed=number)
        parameter.copy_(value.abs() + 0.5 if part in ("dora_scale", "rescale") else value)
    module.apply_to()
    plain, expected = ours(x), theirs(x)
    assert (expected - plain).abs().max() > 0.01
    attach(ours, change_of(module.state_dict(), 1.0), folded=False)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)  # float32


def test_the_norm_of_a_square_convolution_is_that_of_its_outputs_where_it_is_peft_that_wrote_it():
    """(1, out, 1, 1) is for the inputs in LyCORIS' files, where as many."""
    weight, magnitude = random(16, 16, 3, 3).double(), torch.arange(1, 17).double().reshape(1, -1, 1, 1)
    down, up = random(2, 16, 3, 3).double(), random(16, 2, 1, 1).double()
    parts = {"lora_down": down, "lora_up": up}
    direction = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    for name, kept, others in (("magnitude", (16, 1, 1, 1), (1, 2, 3)), ("dora_scale", (1, 16, 1, 1), (0, 2, 3))):
        expected = direction * magnitude.reshape(kept) / direction.pow(2).sum(others, keepdim=True).sqrt() - weight
        torch.testing.assert_close(weight_change(LORA, parts | {name: magnitude}, weight), expected)


@pytest.mark.parametrize("norm", [nn.LayerNorm(OUT), nn.GroupNorm(4, OUT)])
def test_norms(norm):
    norm.requires_grad_(False)
    parts = {"w_norm": random(OUT), "b_norm": random(OUT, seed=1)}
    x = random(2, OUT, OUT)
    attach(norm, change_of(parts, 0.5), folded=False)
    weight, bias = 1 + 0.5 * parts["w_norm"], 0.5 * parts["b_norm"]
    if isinstance(norm, nn.LayerNorm):
        expected = nn.functional.layer_norm(x, (OUT,), weight, bias)
    else:
        expected = nn.functional.group_norm(x, 4, weight, bias)
    torch.testing.assert_close(norm(x), expected)


def test_a_bias_where_there_was_none():
    layer = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    x, parts = make_input("linear"), full(())[0]
    plain = layer(x)
    change = change_of(parts, 2.0)
    attach(layer, change, folded=False)
    torch.testing.assert_close(layer(x), plain + 2 * (x @ parts["diff"].T + parts["diff_b"]))
    remove_change(layer, change)
    assert layer.bias is None
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_come_and_go_in_any_order(layer, dtype):
    module, x = make_layer(layer).to(dtype), make_input(layer).to(dtype)
    weight, bias, plain = module.weight.clone(), module.bias.clone(), module(x)
    changes = [change_of(make(LAYERS[layer])[0], 0.7) for make in (lora, loha, full, lora_without_alpha, dora(lora, 0))]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [2, 4, 3, 1, 0]):
        for change in changes:
            attach(module, change, folded=False)
        assert not torch.equal(module(x), plain)
        for place in order:
            remove_change(module, changes[place])
        assert torch.equal(module.weight, weight)
        assert torch.equal(module.bias, bias)
        assert torch.equal(module(x), plain)


@pytest.mark.parametrize("layer", LAYERS)
def test_several_pairs_add_up(layer):
    pairs = [change_of(make(LAYERS[layer])[0], m) for make, m in ((lora, 0.5), (lora_without_alpha, -1.2), (lora, 2))]
    together, x = make_layer(layer), make_input(layer)
    plain = together(x)
    effects = []
    for pair in pairs:
        attach(together, pair, folded=False)
        alone = make_layer(layer)
        attach(alone, pair, folded=False)
        effects.append(alone(x) - plain)
    torch.testing.assert_close(together(x), plain + sum(effects), rtol=1e-4, atol=1e-5)
    for pair in pairs:
        pair.multiplier = 0.0
    adapter_of(together).update()
    assert torch.equal(together(x), plain)
