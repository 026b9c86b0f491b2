"""Weight files that are broken, hostile, or honest in an unusual way; all of them real files."""

import json
import os
import struct
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from library.errors import InputError
from library.files.weight_files import choose_weights, open_weights


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        open_weights(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def safetensors_bytes(header: dict | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
    }
    save_file(tensors, path, metadata={"k": "v"})
    return path


def test_tensors_shapes_and_metadata(weights):
    opened = open_weights(weights)
    assert opened.shapes == {"a": (2, 3), "b": (4,), "empty": (0, 3)}
    assert opened.metadata == {"k": "v"}
    for _ in range(2):  # reading again after release works
        assert torch.equal(opened.tensor("a"), torch.arange(6.0).reshape(2, 3))
        assert opened.tensor("b").dtype == torch.bfloat16
        assert opened.tensor("empty").shape == (0, 3)
        opened.release("a")


@pytest.mark.parametrize("name", ["weights.ckpt", "weights.bin", "weights", "weights.SAFETENSORS"])
def test_the_name_does_not_matter(weights, name):
    assert "a" in open_weights(weights.rename(weights.with_name(name))).shapes


def test_unaligned_headers_are_read(tmp_path):
    path = tmp_path / "x"
    raw = json.dumps(ONE).encode()
    raw += b" " * (3 - len(raw) % 4)  # the data does not start at a multiple of 4
    path.write_bytes(safetensors_bytes(raw, struct.pack("<2f", 1, 2)))
    assert open_weights(path).tensor("a").tolist() == [1, 2]


def test_truncated_and_trailing_bytes_are_told_apart(weights):
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    assert f"expected {len(whole):,} bytes, found {len(whole) - 3:,}" in refusal(weights)
    weights.write_bytes(whole + b"xx")
    assert "2 bytes after its last tensor" in refusal(weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"hello, world, this is text", "no weight file"),
        (struct.pack("<Q", 2**60) + b'{"a"', "header claims"),
        (struct.pack("<Q", 2**40) + b"\0" * 100, "no weight file"),
        (safetensors_bytes(b"{not json}", b""), "damaged safetensors header"),
        (safetensors_bytes(b'{"a":' * 5000, b""), "damaged safetensors header"),
        (safetensors_bytes(b"[1, 2]", b""), "no weight file"),
        (safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', b"0000"), "stands twice"),
        (
            safetensors_bytes({"a": ONE["a"], "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"0" * 8),
            "overlap",
        ),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"0" * 8), "leave a gap"),
        (
            safetensors_bytes({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"0" * 8),
            "do not fit its shape",
        ),
        (
            safetensors_bytes({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"0" * 8),
            "no whole number",
        ),
        (safetensors_bytes({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, b"0" * 8), "unknown type"),
        (safetensors_bytes({"a": {"shape": [1]}}, b"0" * 8), "damaged safetensors header"),
        (b"\x80\x02}q\x00.", "checkpoint"),
        (b"PK\x03\x04 and then nothing", "cut short or damaged"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is no ordinary file" in refusal(tmp_path / "model.safetensors")


def test_a_zip_of_something_else(tmp_path):
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", "x")
    assert "is a zip archive" in refusal(path)


class _RunsOnLoad:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["model.ckpt", "model.SAFETENSORS", "model.bin", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_does_not(tmp_path, name, zipped):
    marker, path = tmp_path / "ran", tmp_path / name
    content = {"state_dict": {"a": torch.ones(2)}, "extra": _RunsOnLoad(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "posix.system" in message or "nt.system" in message
    assert not marker.exists()


def test_an_honest_checkpoint_with_what_training_leaves(tmp_path):
    path = tmp_path / "model.ckpt"
    content = {
        "epoch": 3,
        "loss": np.float64(0.5),
        "callbacks": {"steps": np.int64(3)},
        "hyper_parameters": Namespace(rate=1e-4),
        "state_dict": {"a": torch.ones(2), "note": "text"},
    }
    torch.save(content, path)
    opened = open_weights(path)
    assert opened.shapes == {"a": (2,)}
    assert opened.tensor("a").tolist() == [1, 1]


def test_objects_of_a_trainer_are_left_aside(tmp_path):
    """What PyTorch Lightning stores, without Lightning: a pickle that names its classes."""
    path, renamed = tmp_path / "whole.ckpt", tmp_path / "renamed.ckpt"
    torch.save({"callbacks": Namespace(best=1), "state_dict": {"a": torch.ones(2)}}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(renamed, "w") as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith("data.pkl"):
                data = data.replace(b"cargparse\nNamespace\n", b"cpytorch_lightning.callbacks.x\nModelCheckpoint\n")
                assert b"ModelCheckpoint" in data
            target.writestr(item.filename, data)
    assert open_weights(renamed).shapes == {"a": (2,)}


def test_a_truncated_checkpoint(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-500])
    assert "cut short or damaged" in refusal(path)


def test_a_file_that_cannot_be_read(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "missing.safetensors")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(weights, place, value):
    content = bytearray(weights.read_bytes())
    if place >= len(content):
        return
    content[place] = value
    path = weights.with_name("changed.safetensors")
    path.write_bytes(bytes(content))
    try:
        opened = open_weights(path)
    except InputError:
        return
    for name in opened.shapes:
        opened.tensor(name)


def test_weights_are_chosen_by_safety_then_precision():
    stems = ("model", "pytorch_model")
    names = ["model.fp16.safetensors", "pytorch_model.bin", "model.non_ema.safetensors", "other.safetensors"]
    assert choose_weights(names, stems) == "model.fp16.safetensors"
    assert choose_weights([*names, "model.safetensors"], stems) == "model.safetensors"
    assert choose_weights(["pytorch_model.fp16.bin", "pytorch_model.bin"], stems) == "pytorch_model.bin"
    assert choose_weights(["config.json"], stems) is None


def test_older_checkpoints_with_what_training_leaves(tmp_path):
    path = tmp_path / "model.ckpt"
    content = {
        "loss": np.float64(0.5),
        "options": Namespace(rate=1),
        "state_dict": {"a": torch.ones(2)},
        0: torch.ones(1),
    }
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert open_weights(path).shapes == {"a": (2,)}
    torch.save({0: torch.ones(1)}, path)
    assert open_weights(path).shapes == {}


# ---------------------------------------------------------------------------------------------------------------------
# Types

LEFTOVERS = {  # name: type, shape, bytes
    "model_ema.num_updates": ("U64", [], 8),
    "ids": ("U32", [2, 1], 8),
    "codes": ("U16", [3], 6),
    "none": ("U16", [0, 4], 0),
    "scales": ("F8_E8M0", [4], 4),
    "packed": ("F4", [2, 2], 2),
    "six": ("F6_E2M3", [4], 3),
    "complex": ("C64", [1], 8),
    "newer": ("F3_X", [4, 4], 6),
}


def with_tensors(source: Path, path: Path, extra: dict, types: dict | None = None) -> Path:
    """A copy of a safetensors file with more tensors, some under other types; its metadata is null."""
    raw = source.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]) | {"__metadata__": None}, raw[8 + length :]
    for name, (kind, shape, size) in extra.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += b"\1" * size
    for name, kind in (types or {}).items():
        header[name]["dtype"] = kind
    path.write_bytes(safetensors_bytes(header, data))
    return path


def test_tensors_of_every_type_stand_beside_others(weights):
    opened = open_weights(with_tensors(weights, weights, LEFTOVERS))
    assert opened.metadata == {}
    assert opened.shapes["newer"] == (4, 4)
    assert torch.equal(opened.tensor("a"), torch.arange(6.0).reshape(2, 3))
    assert opened.tensor("codes").tolist() == [257, 257, 257]
    assert opened.tensor("ids").dtype == torch.uint32
    assert opened.tensor("model_ema.num_updates").shape == ()
    assert opened.tensor("none").shape == (0, 4)
    for name in ("scales", "packed", "six", "complex", "newer"):
        with pytest.raises(InputError, match=f"'{name}' is of the unknown type {LEFTOVERS[name][0]}; use a file in"):
            opened.tensor(name)


@pytest.mark.parametrize("entry", [("U16", [3], 8), ("F4", [3], 2), ("F6_E3M2", [4], 4), ("F8_E8M0", [2, 2], 2)])
def test_sizes_of_every_type_are_checked(weights, entry):
    assert "do not fit its shape" in refusal(with_tensors(weights, weights, {"x": entry}))


def test_a_model_with_leftovers_of_any_type_draws(sd1, generate, tmp_path):
    extra = LEFTOVERS | {"model.diffusion_model.extra.weight": ("F4", [2], 1), "first_stage_model.x": ("U16", [1], 2)}
    path = with_tensors(sd1.safetensors, tmp_path / "sd1.safetensors", extra)
    command = ("--prompt", "a --d 1")
    assert np.array_equal(generate(path, *command).pictures, generate(sd1.safetensors, *command).pictures)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "U32"),
        ("model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight", "I32"),
        ("first_stage_model.decoder.mid.attn_1.q.bias", "U32"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "F32_X"),
    ],
)
def test_a_weight_of_another_type_is_named_before_anything_is_loaded(sd1, generate, tmp_path, name, kind):
    path = with_tensors(sd1.safetensors, tmp_path / "sd1.safetensors", {}, {name: kind})
    result = generate(path, "--prompt", "a", "--dry_run")
    assert result.status == 2
    assert result.stderr == (
        f"error: {path}: {name!r} is of type {kind}, in which no weights are read; "
        "use a file in float32, float16 or bfloat16\n"
    )


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
def test_weights_in_float8_with_scales(sdxl, generate, tmp_path, ending):
    """As ComfyUI writes them: each weight is to be multiplied by a number of its own."""
    scaled, plain = {}, {}
    for name, tensor in load_file(sdxl.safetensors).items():
        scaled[name] = plain[name] = tensor
        is_scaled = name.startswith("model.diffusion_model.") or ".mlp." in name  # of text encoders, too
        if is_scaled and name.endswith(".weight") and tensor.dim() == 2:
            scale = f"{name.removesuffix('weight')}{ending}"
            scaled[scale] = tensor.abs().max() / 448
            scaled[name] = (tensor / scaled[scale]).to(torch.float8_e4m3fn)
            plain[name] = scaled[name].float() * scaled[scale]
    save_file(plain, tmp_path / "plain.safetensors")
    path = tmp_path / "scaled.safetensors"
    scaled["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    not_needed = {"beside.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), f"beside.{ending}": torch.ones(4, 2)}
    scaled |= not_needed
    save_file(scaled, path)
    torch.save(scaled, tmp_path / "scaled.ckpt")
    command = ("--prompt", "a --d 1")
    expected = generate(tmp_path / "plain.safetensors", *command)
    for each in (path, tmp_path / "scaled.ckpt"):
        assert np.array_equal(generate(each, *command).pictures, expected.pictures)
    save_file(scaled | {scale: torch.ones(4, 2)}, path)
    result = generate(path, *command, "--dry_run")
    assert result.status == 2
    assert f"{scale!r} scales blocks of a weight, which this program does not; use a file in float32" in result.stderr


def test_networks_and_embeddings_with_leftovers(sd1, generate, tmp_path):
    key = "lora_unet_mid_block_attentions_0_proj_in"
    lora = {f"{key}.lora_down.weight": torch.ones(1, 64, 1, 1), f"{key}.lora_up.weight": torch.ones(64, 1, 1, 1)}
    save_file(lora | {f"{key}.alpha": torch.tensor(1)}, tmp_path / "lora.safetensors")
    save_file({"<word>": torch.ones(1, 64)}, tmp_path / "zorb.safetensors")
    for name, option in (("lora", "--network_weights"), ("zorb", "--textual_inversion_embeddings")):
        path = with_tensors(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.safetensors", LEFTOVERS)
        module = ("--network_module", "networks.lora") if name == "lora" else ()
        result = generate(sd1.folder, "--prompt", "a zorb --d 1", option, path, *module)
        assert (result.status, len(result.files)) == (0, 1), result.stderr
    down = f"{key}.lora_down.weight"
    path = with_tensors(tmp_path / "lora.safetensors", tmp_path / "lora.safetensors", {}, {down: "U32"})
    result = generate(sd1.folder, "--prompt", "a", "--network_module", "networks.lora", "--network_weights", path)
    assert result.status == 2
    assert f"{down!r} is of type U32" in result.stderr
