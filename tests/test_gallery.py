"""Contact sheets and the page of a run, in a real browser where there is one; picture formats and what they carry."""

import html
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import pictures_in
from PIL import Image, ImageFont

from library.plan.job import Job, JobSettings
from library.results.contact_sheet import wrap
from library.results.made_picture import MadePicture
from library.results.web_page import Command, make_page

CHROMIUM = shutil.which("chromium")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text('a "red" cat & <dog> --n fog --w 72\n{red|green|blue} house --d 7,8\n')
    return file


def test_a_sheet_for_each_prompt(sd1, prompts, generate, tmp_path):
    result = generate(sd1.folder, "--from_file", prompts, "--images_per_prompt", 3, "--seed", 1, "--grid")
    assert result.status == 0
    sheets = [file for file in pictures_in(tmp_path / "out") if file.name.startswith("grid_")]
    made = [file for file in pictures_in(tmp_path / "out") if file.name.startswith("im_")]
    assert [sheet.name for sheet in sheets] == [f"grid_{made[0].name}", f"grid_{made[3].name}"]
    assert result.stdout.splitlines() == [str(file) for file in made]
    for sheet, group in zip(sheets, (made[:3], made[3:])):
        canvas = np.asarray(Image.open(sheet))
        for file in group:
            assert stands_in(canvas, np.asarray(Image.open(file)))
    # the same again gives the same sheets
    generate(sd1.folder, "--from_file", prompts, "--images_per_prompt", 3, "--seed", 1, "--grid", "--resume")
    assert [file for file in pictures_in(tmp_path / "out") if file.name.startswith("grid_")] == sheets


def stands_in(canvas: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture stands somewhere on a canvas, exactly."""
    height, width = picture.shape[:2]
    starts = np.argwhere((canvas[: 1 - height or None, : 1 - width or None] == picture[0, 0]).all(2))
    return any(np.array_equal(canvas[y : y + height, x : x + width], picture) for y, x in starts)


def test_prompts_by_seeds(sd1, generate, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a cat\na dog\na bird\n")
    result = generate(sd1.folder, "--from_file", file, "--n_iter", 2, "--seed", 1, "--iter_same_seed", "--grid")
    (sheet,) = [made for made in result.files if made.name.startswith("grid_")]
    canvas, made = np.asarray(Image.open(sheet)), [file for file in result.files if file.name.startswith("im_")]
    assert len(made) == 6
    assert all(stands_in(canvas, np.asarray(Image.open(file))) for file in made)
    assert canvas.shape[0] // 3 >= 128  # three rows
    assert 3 * 128 <= canvas.shape[1] < 4 * 128  # a column of labels and two of pictures


def test_long_texts_are_broken_and_cut():
    font = ImageFont.load_default(14)
    lines = wrap("a word " * 100 + "w" * 500, font, 300, 50)
    assert all(font.getlength(line) <= 300 for line in lines)
    assert "".join(lines).replace(" ", "") == ("a word " * 100 + "w" * 500).replace(" ", "")
    assert len(wrap("word " * 1000, font, 300, 3)) == 3
    assert wrap("word " * 1000, font, 300, 3)[-1].endswith("…")
    assert wrap("", font, 300, 3) == []


def test_the_page_tells_how_each_picture_was_made(sd1, prompts, generate, tmp_path):
    command = (
        sd1.folder,
        "--from_file",
        prompts,
        "--images_per_prompt",
        2,
        "--seed",
        1,
        "--html",
        "--sampler",
        "euler_a",
    )
    result = generate(*command)
    page = (tmp_path / "out" / "index.html").read_text()
    assert re.findall("(?:src|href)=[\"']?(?:http|//)", page) == []  # nothing from elsewhere
    commands = [html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)]
    assert len(commands) == 4
    assert page.count("loading=lazy") == 4
    for text, file in zip(commands, result.files):
        options = shlex.split(text)[2:]
        again = generate(*options[1:2], *options[2:], outdir=tmp_path / f"again {file.stem}")
        assert again.status == 0, again.stderr
        assert np.array_equal(again.pictures[0], np.asarray(Image.open(file)))
    # gone on with, the run has one page still; another run has its own
    prompts.write_text(prompts.read_text() + "more\n")
    generate(*command, "--resume")
    assert (tmp_path / "out" / "index.html").read_text().count("<figure>") == 6
    generate(*command)
    assert (tmp_path / "out" / "index-1.html").read_text().count("<figure>") == 6


def write_site(folder: Path, pictures: int) -> None:
    folder.mkdir()
    made = []
    for number in range(pictures):
        file = folder / f"im {number:04d} #%.png"
        Image.new("RGB", (64, 64), (number % 256, number // 256 * 60, 99)).save(file)
        prompt = f"<b>cat</b> & 'dog' {number} 猫"
        job = Job(prompt=prompt, seed=number, raw_prompt=prompt, where="", file=file, width=64, height=64)
        made.append(MadePicture(job, file, {"Seed": str(number)}))
    page = make_page(made, "a <title>", Command({"ckpt": "model"}, JobSettings(), 512), "mark")
    (folder / "index.html").write_text(page, encoding="utf-8")


def browser(tmp_path: Path, *options: str) -> list[str]:
    argv = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]
    return [*argv, f"--user-data-dir={tmp_path / 'profile'}", *options]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_thousand_pictures_in_a_browser(tmp_path, site):
    address, asked = site
    write_site(tmp_path / "site", 1000)
    # with this option it stays open as a window does; printing a page loads all of it
    argv = browser(tmp_path, "--remote-debugging-port=0", f"{address}/index.html")
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline, before = time.monotonic() + 120, -1
        while time.monotonic() < deadline and (len(asked) < 5 or len(asked) != before):
            before = len(asked)
            time.sleep(2)
    finally:
        process.terminate()
        process.wait()
    pictures = {path for path, _ in asked if path.endswith(".png")}
    assert 4 <= len(pictures) < 500  # those in sight and some more, not all


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_works_in_a_browser(tmp_path, site):
    address, asked = site
    write_site(tmp_path / "site", 12)
    page = tmp_path / "site" / "index.html"
    # the words are typed by a script at the end
    typing = "<script>search.value = 'DOG 11'; search.dispatchEvent(new Event('input'));</script>"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{typing}</body>"), encoding="utf-8")
    done = subprocess.run(browser(tmp_path, "--dump-dom", f"{address}/index.html"), capture_output=True, timeout=120)
    dom = done.stdout.decode()
    assert "<output>1</output> of 12 pictures" in dom
    assert dom.count('<figure class="hidden">') == 11
    assert "&lt;b&gt;cat&lt;/b&gt; &amp; 'dog' 11 猫" in dom
    assert "<b>" not in dom
    pictures = {path: status for path, status in asked if path.endswith(".png")}
    assert len(pictures) == 12 and set(pictures.values()) == {200}  # all names were found


@pytest.mark.parametrize("suffix", ["webp", "jpg"])
def test_other_formats_carry_the_metadata(sd1, generate, tmp_path, suffix):
    prompt = 'ein "Kätzchen" 猫, (red:1.2)\\(x\\) --n fog, dull --d 5 --nl 3'
    command = (sd1.folder, "--prompt", prompt, "--W", 128, "--H", 128)
    exact = generate(*command, outdir=tmp_path / "png").files[0]
    result = generate(*command, "--format", suffix, "--quality", 90)
    (file,) = result.files
    assert file.suffix == f".{suffix}"
    assert Image.open(file).format == {"webp": "WEBP", "jpg": "JPEG"}[suffix]
    # the loss of compression, on noise at that; another picture would be 40 levels off
    assert np.abs(result.pictures[0] - np.asarray(Image.open(exact)).astype(int)).mean() < 12
    worse = generate(*command, "--format", suffix, "--quality", 10, outdir=tmp_path / "worse").files[0]
    assert worse.stat().st_size < file.stat().st_size
    # img2img reads the prompts back
    again = generate(sd1.folder, "--image_path", file, "--strength", 1, outdir=tmp_path / "again").files[0]
    texts = Image.open(again).info
    assert (texts["prompt"], texts["negative-prompt"]) == ('ein "Kätzchen" 猫, (red:1.2)\\(x\\)', "fog, dull")


def test_another_format_can_be_resumed(sd1, generate):
    command = (sd1.folder, "--prompt", "a", "--images_per_prompt", 2, "--format", "jpg", "--sequential_file_name")
    files = generate(*command).files
    assert [file.name for file in files] == ["im_000001.jpg", "im_000002.jpg"]
    assert generate(*command, "--resume").files == []
    assert generate(*command).files[0].name == "im_000003.jpg"


def test_metadata_too_long_for_a_format(sd1, generate):
    result = generate(sd1.folder, "--prompt", "cat " * 20_000, "--format", "jpg", "--max_embeddings_multiples", 1)
    assert result.status == 0
    assert "does not fit into JPEG and WebP" in result.stderr
    assert result.pictures[0].shape == (64, 64, 3)
