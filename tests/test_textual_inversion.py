"""Textual inversion and XTI: every format, how words are found in prompts, and which layer sees which vectors."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from loading import prompt_encoder
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import gen_img_diffusers
from library.draw.text_encoding import PromptEncoder
from library.files.checkpoint_layout import original_name, unet_modules
from library.files.model_files import find_model
from library.files.textual_inversion import XTI_LAYERS, Embedding, find_embeddings
from library.plan.planning import make_plan
from library.plan.tokens import CHUNK_TOKENS, PADDING

WIDTH = 64
PLAIN, XTI = "--textual_inversion_embeddings", "--XTI_embeddings"


def vectors(number: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.1


def make_encoder(models, *embeddings: Embedding, **settings) -> PromptEncoder:
    files = find_model(str(models.folder), v2=bool(models.options), v_parameterization=bool(models.options))
    return prompt_encoder(files, embeddings=embeddings, **settings)


def embedding(word: str, *layers: torch.Tensor) -> Embedding:
    return Embedding(word, (layers,))


def ids_of(encoder: PromptEncoder, text: str) -> list[int]:
    return encoder.tokens.tokenizer(text, add_special_tokens=False).input_ids


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def write_png(file, tensor):
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": tensor.tolist()}}, "name": "x"}
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(content).encode()).decode())
    info.add_text("workflow", "x" * 2_000_000, zip=True)  # more than Pillow would read
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)


def write_pickle(wrap):
    return lambda file, tensor: torch.save(wrap(tensor), file)


FORMATS = {
    "web UI": (
        ".pt",
        write_pickle(lambda t: {"string_to_token": {"*": 265}, "string_to_param": {"*": t}, "name": "x"}),
    ),
    "web UI, parameters": (
        ".pt",
        write_pickle(lambda t: {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(t)}), "step": 1}),
    ),
    "web UI, picture": (".png", write_png),
    "kohya": (".safetensors", lambda file, tensor: save_file({"emb_params": tensor}, file)),
    "Diffusers": (".safetensors", lambda file, tensor: save_file({"<word>": tensor}, file)),
    "Diffusers, pickled": (".bin", write_pickle(lambda t: {"<word>": t})),
    "Diffusers, one vector": (".bin", write_pickle(lambda t: {"<word>": t[0]})),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(sd1, tmp_path, name):
    suffix, write = FORMATS[name]
    expected = vectors(1 if "one vector" in name else 2)
    write(tmp_path / f"myword{suffix}", expected)
    model = find_model(str(sd1.folder), v2=False, v_parameterization=False)
    (embedding,) = find_embeddings([str(tmp_path / f"myword{suffix}")], [], model)
    assert embedding.word == "myword"
    torch.testing.assert_close(embedding.vectors, ((expected,),))


@pytest.mark.parametrize(
    ("family", "names"),
    [("sd1", ["clip_l"]), ("sd1", ["string_to_param.*"]), ("sd1", ["emb_params"]), ("sdxl", ["clip_l", "clip_g"])],
)
def test_words_that_come_along_in_a_network(request, generate, tmp_path, family, names):
    """As if their files were given beside the network."""
    models = request.getfixturevalue(family)
    own = {
        name: torch.randn(2, width, generator=torch.Generator().manual_seed(1)) for name, width in zip(names, (64, 32))
    }
    lora = {"lora_unet_conv_in.diff_b": torch.full((32,), 0.2)}
    save_file(lora | {f"bundle_emb.zorb.{name}": tensor for name, tensor in own.items()}, tmp_path / "both.safetensors")
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(
        {name.removeprefix("string_to_param."): tensor for name, tensor in own.items()}, tmp_path / "zorb.safetensors"
    )
    options = (models.folder, "--prompt", "a zorb cat --d 1", "--network_module", "networks.lora", "--network_weights")
    apart = generate(*options, tmp_path / "lora.safetensors", PLAIN, tmp_path / "zorb.safetensors")
    together = generate(*options, tmp_path / "both.safetensors")
    without = generate(*options, tmp_path / "lora.safetensors")
    assert together.status == 0
    assert "keys fit" not in together.stderr
    assert np.array_equal(apart.pictures, together.pictures)
    assert np.abs(together.pictures[0] - without.pictures[0]).max() > 1


def test_words_of_a_network_that_are_given_already_are_left_aside(sd1, generate, tmp_path):
    state = {f"bundle_emb.{word}.clip_l": vectors() for word in ("zorb", "cat", "quux")}
    state |= {"bundle_emb.quux.clip_l_out": vectors(), "lora_unet_conv_in.diff_b": torch.zeros(32)}
    save_file(state, tmp_path / "both.safetensors")
    save_file({"emb_params": vectors() * 5}, tmp_path / "zorb.safetensors")
    network = ("--network_module", "networks.lora", "--network_weights", tmp_path / "both.safetensors")
    options = ("--prompt", "a zorb --d 1", PLAIN, tmp_path / "zorb.safetensors")
    result = generate(sd1.folder, *options, *network)
    assert result.status == 0
    assert "its embedding 'zorb' is left aside, the word is another file's" in result.stderr
    assert "its embedding 'cat' is left aside, the word is one of the model's vocabulary" in result.stderr
    assert "left aside: clip_l_out" in result.stderr
    assert np.array_equal(result.pictures, generate(sd1.folder, *options).pictures)


def test_an_embedding_for_one_encoder_alone(sd1, sdxl, generate, tmp_path):
    """`clip_l` by itself is one for SD 1.x."""
    save_file({"clip_l": vectors() * 5}, tmp_path / "zorb.safetensors")
    (tmp_path / "plain").mkdir()
    save_file({"emb_params": vectors() * 5}, tmp_path / "plain/zorb.safetensors")
    options = ("--prompt", "a zorb --d 1", PLAIN)
    results = [generate(sd1.folder, *options, tmp_path / name / "zorb.safetensors") for name in ("", "plain")]
    assert np.array_equal(results[0].pictures, results[1].pictures)
    result = generate(sdxl.folder, *options, tmp_path / "zorb.safetensors")
    assert result.status == 2
    assert "its vectors are 64 wide, those of Stable Diffusion XL 64 and 32" in result.stderr


@pytest.mark.parametrize("second", ["zorb-steps-500_2", "zorb_2-steps-500"])
def test_pairs_of_a_trainings_steps(sdxl, tmp_path, second):
    """Diffusers' training writes `NAME-steps-N` with `NAME_2-steps-N`."""
    files = [tmp_path / f"{stem}.safetensors" for stem in ("zorb-steps-500", second)]
    expected = [torch.randn(2, width, generator=torch.Generator().manual_seed(1)) for width in (64, 32)]
    for file, tensor in zip(files, expected):
        save_file({"<zorb>": tensor}, file)
    model = find_model(str(sdxl.folder), v2=False, v_parameterization=False)
    for given in (files[:1], files, files[::-1]):
        (embedding,) = find_embeddings([str(file) for file in given], [], model)
        assert embedding.word == "zorb-steps-500"
        torch.testing.assert_close(embedding.vectors, tuple((tensor,) for tensor in expected))


def test_words_act_in_prompt_and_negative_prompt(sd1, generate, tmp_path):
    save_file({"emb_params": vectors() * 5}, tmp_path / "bad style.safetensors")
    option = ("--textual_inversion_embeddings", tmp_path / "bad style.safetensors")
    for line in ("a bad style cat --d 1", "a cat --n (bad style:1.2) --d 1"):
        without, with_word = generate(sd1.folder, "--prompt", line), generate(sd1.folder, "--prompt", line, *option)
        assert np.abs(without.pictures[0] - with_word.pictures[0]).max() > 1, line
    line = "a cat --d 1"
    without, with_word = generate(sd1.folder, "--prompt", line), generate(sd1.folder, "--prompt", line, *option)
    assert np.array_equal(without.pictures, with_word.pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Words in prompts


def test_vectors_take_the_place_of_the_word(sd1):
    encoder = make_encoder(sd1, embedding("my-Word", vectors(3)))
    first = encoder.tokens.tokenizer.vocab_size
    tokens = encoder.tokens.tokenize("a (MY-word:1.3), cat")
    assert tokens.ids == (*ids_of(encoder, "a"), first, first + 1, first + 2, *ids_of(encoder, ", cat"))
    assert tokens.weights == (1, 1.3, 1.3, 1.3, 1, 1)
    table = encoder.texts[0].model.get_input_embeddings()
    assert torch.equal(table(torch.tensor([first, first + 1, first + 2])), vectors(3))


def test_encoded_like_the_vectors_themselves(sd1):
    """A word whose vectors are those of "red cat" is encoded as "red cat" is."""
    plain = make_encoder(sd1)
    table = plain.texts[0].model.get_input_embeddings().weight
    encoder = make_encoder(sd1, embedding("zzyzx", table[ids_of(plain, "red cat")].clone()))
    ours, expected = encoder.encode(["a zzyzx, night"], 1), plain.encode(["a red cat, night"], 1)
    assert torch.equal(ours.embeddings, expected.embeddings)
    assert not ours.per_layer


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_longest_and_whole_words_only(request, family):
    words = [embedding(word, vectors(1, seed)) for seed, word in enumerate(["badhands", "badhands-v2", "Two  Words"])]
    encoder = make_encoder(request.getfixturevalue(family), *words)
    first = encoder.tokens.tokenizer.vocab_size
    for text, expected in (
        ("badhands", [first]),
        ("badhands-v2", [first + 1]),
        ("badhands, badhands-v2", [first, *ids_of(encoder, ","), first + 1]),
        ("two words", [first + 2]),
        ("two wordsmiths", ids_of(encoder, "two wordsmiths")),
        ("mybadhands", ids_of(encoder, "mybadhands")),
        ("badhandsome", ids_of(encoder, "badhandsome")),
    ):
        assert encoder.tokens.tokenize(text).ids == tuple(expected), text


WORDS = ["zorb!", "zorb", "my-style", "style:v2", "x_y.1", "<toy>", "Two  Words", "na\u00efve 2", ":(x"]


@pytest.mark.parametrize(
    ("text", "expected"),  # numbers are places in WORDS, texts stand for themselves
    [
        ("a zorb!, cat", ["a ", 0, ", cat"]),
        ("ZORB!!", [0, "!"]),
        ("zorb!.", [0, "."]),
        ("“zorb!”…zorb’s", ["“", 0, "”…", 1, "’s"]),
        ("zorb's, zorb/zorb!/zorb", [1, "'s, ", 1, "/", 0, "/", 1]),
        ("'mzorb 'zorb'", ["'mzorb '", 1, "'"]),
        ("zorb!cat", [0, "cat"]),
        ("zorb2, 2zorb, zorbs, azorb!, zorb\u0301, 猫zorb", None),
        ("(my-style, -my-style-) My-Styles", ["", 2, ", -", 2, "- My-Styles"]),
        ("my-style:v2, style:v2:x", [2, ":v2, ", 3, ":x"]),
        ("x_y.1. x_y.12, x_y.1x, ax_y.1", [4, ". x_y.12, x_y.1x, ax_y.1"]),
        ("my<toy>s", ["my", 5, "s"]),
        ("two \t words. two words-like, two wordsmiths", [6, ". ", 6, "-like, two wordsmiths"]),
        ("nai\u0308ve  2; NAÏVE 2", [7, "; ", 7]),
        (r"\:\(x\), \[zorb!\]", [8, "), [", 0, "]"]),
        ("İ zorb İ", ["İ ", 1, " İ"]),
        ("ΟΔΟΣ zorb", ["ΟΔΟΣ ", 1]),
    ],
)
def test_words_are_found_as_people_see_them(sd1, text, expected):
    """Letters and digits bound a word, whatever CLIP makes one token of."""
    encoder = make_encoder(sd1, *(embedding(word, vectors(1, seed)) for seed, word in enumerate(WORDS)))
    first, plain = encoder.tokens.tokenizer.vocab_size, make_encoder(sd1)
    pieces = [text] if expected is None else expected
    wanted = [token for p in pieces for token in ([first + p] if isinstance(p, int) else ids_of(plain, p))]
    assert encoder.tokens.tokenize(text).ids == tuple(wanted)


def test_weights_of_words_beside_punctuation(sd1):
    encoder = make_encoder(sd1, *(embedding(word, vectors(1, seed)) for seed, word in enumerate(WORDS)))
    first = encoder.tokens.tokenizer.vocab_size
    tokens = encoder.tokens.tokenize("(zorb!:1.5), [style:v2], (zor)b (style:v2:1.2)")
    weights = dict(zip(tokens.ids, tokens.weights))
    assert weights[first] == 1.5
    assert [w for token, w in zip(tokens.ids, tokens.weights) if token == first + 3] == pytest.approx([1 / 1.1, 1.2])
    assert first + 1 not in tokens.ids


def test_embeddings_that_no_prompt_names_are_warned_of(sd1, generate, tmp_path):
    for name in ("zorb!", "Negzorb", "unusedone", "xyzzysplit"):
        save_file({"emb_params": vectors()}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("zorb!", "Negzorb", "unusedone", "xyzzysplit")]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (cat:1.2)\n(zorb!:1.3), dog AND (xyzzy)split --n negzorb\nunusedones\n")
    result = generate(sd1.folder, "--from_file", prompts, "--textual_inversion_embeddings", *files, "--dry_run")
    warnings = [line for line in result.stderr.splitlines() if "the embedding" in line]
    assert warnings == [
        f"warning: the embedding {name!r} is in no prompt; write its word there, or leave its file out"
        for name in ("unusedone", "xyzzysplit")
    ]


def test_a_picture_tells_of_the_embeddings_in_its_prompts(sd1, generate, tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in ("zorb!", "Negzorb", "otherone")]
    for file in files:
        save_file({"emb_params": vectors()}, file)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (zorb!:1.3) --n negzorb\nan otherone\na cat\n")
    options = ("--textual_inversion_embeddings", *files, "--sequential_file_name")
    made = generate(sd1.folder, "--from_file", prompts, *options)
    told = [re.search(r"Embeddings: (\"[^\"]*\"|[^,]*)", Image.open(file).info["parameters"]) for file in made.files]
    assert [match and match[1] for match in told] == ['"zorb!, Negzorb"', "otherone", None]


@pytest.mark.parametrize(("before", "number"), [(74, 2), (70, 8), (1, 75), (149, 3)])
def test_vectors_are_not_split_between_chunks(sd1, before, number):
    encoder = make_encoder(sd1, embedding("zzyzx", vectors(number)), max_chunks=3)
    tokens = encoder.tokens.tokenize("cat " * before + "(zzyzx:1.5) dog")
    first = encoder.tokens.tokenizer.vocab_size
    start = tokens.ids.index(first)
    assert start % CHUNK_TOKENS == 0
    assert tokens.ids[before:start] == (PADDING,) * (start - before)
    assert tokens.ids[start : start + number] == tuple(range(first, first + number))
    assert tokens.weights[before : start + number] == (1.0,) * (start - before) + (1.5,) * number


def test_vectors_that_fit_are_not_moved(sd1):
    encoder = make_encoder(sd1, embedding("zzyzx", vectors(5)), embedding("qqq", vectors(80)), max_chunks=3)
    first = encoder.tokens.tokenizer.vocab_size
    assert encoder.tokens.tokenize("cat " * 70 + "zzyzx").ids[70] == first  # to the very end of a chunk
    assert encoder.tokens.tokenize("cat qqq").ids[1] == first + 5  # more than a chunk holds


def test_a_word_that_is_cut_off_is_named(sd1, caplog):
    encoder = make_encoder(sd1, embedding("zzyzx", vectors(3)))
    encoder.tokens.tokenize("cat " * 75 + "zzyzx dog")
    assert "4 of them are cut off: 'zzyzx dog'" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# XTI


def xti(word: str, number: int = 1) -> Embedding:
    return embedding(word, *(vectors(number, seed) for seed in range(len(XTI_LAYERS))))


def test_each_layer_has_its_own_encoding(sd1):
    extended, plain = xti("exty", 2), embedding("plainy", vectors(3, 50))
    texts = ["a plainy dog", "an (exty:1.2) plainy cat"]
    conditions = make_encoder(sd1, plain, extended).encode(texts, 1)
    assert list(conditions.per_layer) == list(XTI_LAYERS)
    for layer, own in zip(XTI_LAYERS, extended.vectors[0]):
        expected = make_encoder(sd1, plain, embedding("exty", own)).encode(texts, 1).embeddings
        torch.testing.assert_close(conditions.for_layer(layer), expected, rtol=1e-5, atol=1e-5)  # sums in another batch


def test_every_cross_attention_sees_its_own_text(sd1, tmp_path, monkeypatch):
    """Each of the 16 layers of the U-Net, under the original's names, computes its keys from its own text."""
    extended = xti("exty")
    save_file(dict(zip(XTI_LAYERS, extended.vectors[0])), tmp_path / "exty.safetensors")
    save_file({"emb_params": vectors(2, 70)}, tmp_path / "plainy.safetensors")
    argv = [
        "--ckpt",
        sd1.folder,
        "--prompt",
        "an exty plainy cat",
        "--W",
        64,
        "--H",
        64,
        "--steps",
        1,
        "--outdir",
        tmp_path,
    ]
    argv += ["--XTI_embeddings", tmp_path / "exty.safetensors"]
    argv += ["--textual_inversion_embeddings", tmp_path / "plainy.safetensors"]
    plan = make_plan(gen_img_diffusers.make_parser().parse([str(argument) for argument in argv]))
    pipeline = gen_img_diffusers.load_pipeline(plan)
    seen = {}
    for path, module in pipeline.unet.named_modules():
        if path.endswith("attn2.to_k"):
            module.register_forward_pre_hook(lambda module, inputs, path=path: seen.update({path: inputs[0]}))
    pipeline.draw(plan.jobs, iter)
    modules, layers = unet_modules(pipeline.unet.config), set()
    for path, text in seen.items():
        block, number = re.match(r"(input|middle|output)_blocks?\.(\d+)", original_name(path, modules)).groups()
        layer = "MID" if block == "middle" else f"{'IN' if block == 'input' else 'OUT'}{int(number):02d}"
        own = embedding("exty", extended.vectors[0][XTI_LAYERS.index(layer)])
        encoder = make_encoder(sd1, embedding("plainy", vectors(2, 70)), own)
        expected = encoder.encode(["", "an exty plainy cat"], 1).embeddings
        torch.testing.assert_close(text, expected, rtol=1e-5, atol=1e-5)  # sums in another batch
        layers.add(layer)
    assert layers == set(XTI_LAYERS)


def test_xti_with_equal_layers_is_textual_inversion(sd1, generate, tmp_path):
    save_file({layer: vectors(2) * 5 for layer in XTI_LAYERS}, tmp_path / "exty.safetensors")
    (tmp_path / "plain").mkdir()
    save_file({"emb_params": vectors(2) * 5}, tmp_path / "plain/exty.safetensors")
    options = ("--prompt", "an exty cat --d 1")
    extended = generate(sd1.folder, *options, "--XTI_embeddings", tmp_path / "exty.safetensors")
    plain = generate(sd1.folder, *options, "--textual_inversion_embeddings", tmp_path / "plain/exty.safetensors")
    assert np.abs(extended.pictures[0] - plain.pictures[0]).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize(
    ("option", "name", "tensors", "message"),
    [
        (PLAIN, "wide", {"emb_params": torch.ones(1, 768)}, "are 768 wide, the model's text encoder is 64 wide"),
        (
            PLAIN,
            "xl",
            {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
            "are 768 and 1280 wide, those of",
        ),
        (PLAIN, "Cat", {"emb_params": vectors()}, "'Cat' is a word of the model's vocabulary; rename the file"),
        (PLAIN, "lora", {"x.lora_down.weight": torch.ones(1, 64)}, "is a LoRA or one of its relatives, not a"),
        (PLAIN, "two", {"a": vectors(), "b": vectors()}, "holds 2 tensors"),
        (PLAIN, "cube", {"emb_params": torch.ones(1, 2, 64)}, "holds a tensor of shape [1, 2, 64], not vectors"),
        (PLAIN, "broken", {"emb_params": vectors() * float("nan")}, "holds NaN or infinite values"),
        (PLAIN, "exty", {layer: vectors() for layer in XTI_LAYERS}, "is an XTI embedding; use --XTI_embeddings"),
        (XTI, "plainy", {"emb_params": vectors()}, "is no XTI embedding, which has the 16 tensors IN01, IN02"),
        (XTI, "uneven", {layer: vectors(1 + (layer == "MID")) for layer in XTI_LAYERS}, "different numbers of vectors"),
    ],
)
def test_files_that_are_no_embedding_for_the_model(sd1, generate, tmp_path, option, name, tensors, message):
    save_file(tensors, tmp_path / f"{name}.safetensors")
    result = generate(sd1.folder, "--prompt", "a", option, tmp_path / f"{name}.safetensors")
    assert result.status == 2
    (line,) = result.stderr.splitlines()
    assert message in line


def test_other_files(sd1, generate, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "page.pt").write_text("<html>")
    save_file({"emb_params": vectors()}, tmp_path / "My word.safetensors")
    torch.save({"string_to_param": {"*": vectors()}}, tmp_path / "my word.pt")
    for names, message in (
        (["picture.png"], "is a picture without an embedding in its text sd-ti-embedding"),
        (["page.pt"], "is a web page"),
        (["nowhere.pt"], "cannot be read: No such file"),
        (["My word.safetensors", "my word.pt"], "another file gives the word 'my word' too"),
    ):
        result = generate(sd1.folder, "--prompt", "a", PLAIN, *(tmp_path / name for name in names))
        assert result.status == 2
        assert message in result.stderr
