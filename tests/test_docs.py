"""README.md, docs/ and the examples' pages: their commands run, their links lead somewhere, their pictures are so."""

import io
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import ControlNetUnionModel, UNet2DConditionModel
from expected.reduce import rebuild_pack
from PIL import Image
from placeholders import Placeholders

import gen_img_diffusers
from library.files.model_inputs import EDITING, INPAINTING
from library.plan.prompt_lines import PROMPT_OPTIONS
from tools.demo.showcase import PICTURES, ROOT, blocks, draw, pages, prepare, showcases

SCRIPT = "gen_img_diffusers.py"
# Goes before what is printed of commands that draw here; where they say no size and no steps, these are quick
SMALL = ["--W", "64", "--H", "64", "--steps", "2"]
ALL_PAGES = [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "tools" / "demo" / "README.md"]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def placeholders(with_inputs, tmp_path_factory):
    xl = rebuild_pack(ROOT / "tests" / "expected" / "sdxl", tmp_path_factory.mktemp("sdxl"))
    unet = UNet2DConditionModel.from_pretrained(xl / "models" / "sdxl-tiny" / "unet")
    config = dict(ControlNetUnionModel.from_unet(unet).config)
    config.pop("_use_default_values", None)
    small = {"num_trans_channel": 32, "num_proj_channel": 32, "num_trans_head": 8}
    union = tmp_path_factory.mktemp("union") / "net"
    ControlNetUnionModel.from_config(config | small).save_pretrained(union)
    models = {"inpaint": with_inputs("sd1", INPAINTING), "pix2pix": with_inputs("sd1", EDITING)}
    files = {part: model.safetensors for part, model in models.items()}
    return Placeholders(files, xl, union / "diffusion_pytorch_model.safetensors")


def words_after(command: str, start: str) -> list[str]:
    """The words of a command line that follow one that ends so, up to what the shell reads next (`|`, `>`, `&&`)."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = list(lexer)
    first = next(place for place, word in enumerate(words) if word.endswith(start)) + 1
    rest = words[first:]
    ends = [place for place, word in enumerate(rest) if word and not word.strip("();<>|&")]
    return rest[: ends[0]] if ends else rest


# those with pictures are drawn below
BLOCKS = [block for page in pages() for block in blocks(page) if block.picture is None]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{name(block.page)}:{block.line}")
def test_commands_run_as_they_are_printed(block, placeholders, tmp_path, monkeypatch, capfd):
    """In a folder with nothing but stand-ins for the files they name.

    Commands of this program are planned (`--dry_run`), not drawn; loops end at once, and `--resume` goes on with what
    the command without it has drawn. Of the tools' commands the options are read. Commands that write what these
    read, `printf` and `mkdir`, are run; others (pip, git) are the shell's and are not.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a castle\n")))
    for folder in ("examples", "tools"):
        Path(folder).symlink_to(ROOT / folder)
    prepare(block)
    for command in block.commands:
        if SCRIPT in command:
            assert not re.search(r'"[^"]*[$`][^"]*"', command), f"the shell reads $ and ` itself: {command}"
            run(words_after(command, SCRIPT), placeholders)
        elif match := re.search(r"python (?:-m )?(tools[./][\w./]+)", command):
            read_options(match[1], words_after(command, match[1]), monkeypatch)
    capfd.readouterr()


def run(argv: list[str], placeholders: Placeholders) -> None:
    argv = [word.removeprefix("/") if word.startswith("/data/") else word for word in argv]  # a cluster's shared folder
    argv += placeholders.make(argv)
    if "--interactive" in argv:
        assert status([*SMALL, *argv]) == 0
        return
    if "--resume" in argv:
        argv = [*SMALL, *argv]
        assert status([word for word in argv if word not in ("--resume", "--ray", "auto")]) == 0  # there is no cluster
    assert status([*argv, "--dry_run"]) == 0


def status(argv: list[str]) -> int:
    try:
        return gen_img_diffusers.main(argv)
    except SystemExit as leaving:
        return leaving.code or 0


def read_options(tool: str, argv: list[str], monkeypatch) -> None:
    class Read(Exception):
        pass

    real = ArgumentParser.parse_args

    def parse(parser: ArgumentParser, *given: object) -> None:
        real(parser, *given)
        raise Read

    file = ROOT / (tool if tool.endswith(".py") else f"{tool.replace('.', '/')}.py")
    with monkeypatch.context() as patch, pytest.raises(Read):
        patch.setattr(ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [str(file), *argv])
        runpy.run_path(str(file), run_name="__main__")


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"\w+:", target):
            continue  # elsewhere
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(aim), f"{target}: no such heading"


def test_the_readme_is_short_and_names_every_page_of_docs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 250
    for page in (ROOT / "docs").glob("*.md"):
        others = [other.read_text(encoding="utf-8") for other in pages() if other != page]
        assert any(f"{page.name})" in other or f"{page.name}#" in other for other in others), page.name


def test_the_cluster_file_is_one_that_ray_up_takes():
    util = pytest.importorskip("ray.autoscaler._private.util", reason="needs requirements-ray.txt")
    page = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
    files = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)]
    assert [file.get("kind", "a cluster file") for file in files] == ["a cluster file", "RayJob"]
    util.validate_config(util.prepare_config(files[0]))


def test_every_option_has_its_place():
    """Those of the command line and those of prompt lines; in Markdown's code marks."""
    told = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    named = set(re.findall(r"--[\w-]+", told))
    parser = gen_img_diffusers.make_parser()
    assert [option for option in parser.table if f"--{option}" not in named] == []
    assert [option for option in PROMPT_OPTIONS if f"--{option}" not in named] == []


def said_by_the_program() -> str:
    """The program's source, with texts that are written in several pieces joined."""
    files = [ROOT / SCRIPT, *(file for wing in ("library", "networks") for file in (ROOT / wing).rglob("*.py"))]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return re.sub(r'(?<=[^"\\])"\s+f?"(?=[^"])', "", code).replace("}}", "}")


@pytest.mark.parametrize(("page", "start"), [("troubleshooting.md", "\n## "), ("zh-CN.md", "\n## 问题排查")])
def test_messages_are_those_of_the_program(page, start):
    """The first column of the tables; `…` stands for what differs, `:`, `;` and `?` are where messages are joined."""
    code = said_by_the_program()
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(start)[2]
    messages = [message for row in re.findall(r"^\| (`.*?`) \|", text, re.M) for message in re.findall("`(.+?)`", row)]
    assert len(messages) > 8
    pieces = [piece.strip() for message in messages for piece in re.split("…|: |; |[?]", message)]
    assert [piece for piece in pieces if piece not in code] == []


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

# Mean distance, in levels of 255, that a picture drawn anew may have from what the repository holds. Processors and
# versions of PyTorch sum float32 in different orders: with another instruction set (AVX2 for AVX512) and other threads
# it was 0.0001. The least change that shows, another seed or another strength in one cell of a strip, is 0.3.
AWAY = 0.1


@pytest.mark.parametrize("picture", sorted(showcases()))
def test_pictures_are_what_their_commands_draw(picture, monkeypatch):
    """On the CPU, as they were drawn; `python -m tools.demo.showcase` draws them anew."""
    for backend in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    kept = np.asarray(Image.open(PICTURES / f"{picture}.png").convert("RGB")).astype(int)
    drawn = np.asarray(draw(showcases()[picture])).astype(int)
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() <= AWAY


def test_every_picture_is_shown():
    assert {file.stem for file in PICTURES.iterdir()} == set(showcases())
