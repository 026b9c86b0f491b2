"""Sweeps: what they plan and draw, and how their pictures are shown on sheets and on the page."""

import io
import itertools
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import pictures_in
from PIL import Image
from test_gallery import CHROMIUM, browser, stands_in

from library.plan.job import Job, JobSettings, SweepCell
from library.plan.sweep import Sweep, axis
from library.results import letters as letters_of
from library.results.contact_sheet import MAX_CELLS, draw_sheet, sheets_by_prompt, sheets_of_sweep
from library.results.letters import Letters, has
from library.results.made_picture import MadePicture
from library.results.sweep_tables import sweep_tables
from library.results.web_page import Command, make_page


def planned(result) -> list[dict]:
    assert result.status == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def test_every_prompt_in_every_combination_with_the_same_seeds(sd1, generate, tmp_path):
    """The seeds, and with them what {a|b} chooses, are those that the run has without the sweep."""
    (tmp_path / "p.txt").write_text("a {red|green|blue|black|white} cat\na dog --n fog\n")
    command = (sd1.folder, "--from_file", tmp_path / "p.txt", "--images_per_prompt", 2, "--n_iter", 2, "--seed", 3)
    plain = planned(generate(*command, "--dry_run", "--json"))
    axes = ("--sweep", "scale=4,7.5", "sampler=euler_a,dpmsolver++ karras", "--sweep", "w=64,72,80")
    swept = planned(generate(*command, *axes, "--dry_run", "--json"))
    assert len({job["file"] for job in swept}) == len(swept) == 8 * 12
    by_image: dict[int, list[dict]] = {}
    for job in swept:
        by_image.setdefault(job["sweep"]["image"], []).append(job)
    assert [(jobs[0]["prompt"], jobs[0]["seed"]) for _, jobs in sorted(by_image.items())] == [
        (job["prompt"], job["seed"]) for job in plain
    ]
    wanted = set(itertools.product((4, 7.5), (("euler_a", "own"), ("dpmsolver++", "karras")), (64, 72, 80)))
    for jobs in by_image.values():
        assert {(job["prompt"], job["seed"]) for job in jobs} == {(jobs[0]["prompt"], jobs[0]["seed"])}
        assert {(j["guidance_scale"], (j["sampler"], j["schedule"]), j["width"]) for j in jobs} == wanted
    told = swept[0]["sweep"]
    assert told["line"] == "a {red|green|blue|black|white} cat"
    assert told["values"][:2] == [{"name": "scale", "value": "4"}, {"name": "sampler", "value": "euler_a"}]


def test_a_seed_of_the_run_is_that_of_a_single_prompt(sd1, generate):
    """Three pictures are planned, and yet the one seed is not what their seeds are drawn from."""
    jobs = planned(generate(sd1.folder, "--prompt", "a", "--seed", 7, "--sweep", "s=1,2,3", "--dry_run", "--json"))
    assert [(job["seed"], job["steps"]) for job in jobs] == [(7, 1), (7, 2), (7, 3)]
    ranged = generate(sd1.folder, "--prompt", "a", "--sweep", "seed=3-5,9", "--dry_run", "--json")
    assert [job["seed"] for job in planned(ranged)] == [3, 4, 5, 9]


def test_batches_are_filled_across_combinations(sd1, generate, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    options = ("--from_file", tmp_path / "p.txt", "--sweep", "scale=4,7,9", "--sweep", "sampler=ddim,euler")
    result = generate(sd1.folder, *options, "--batch_size", 6, "--dry_run")
    assert "12 pictures to make (3 scale x 2 sampler)" in result.stderr
    assert "2 batches, 100% of their places filled" in result.stderr
    assert result.stdout.splitlines()[0].split() == ["file", "size", "steps", "scale", "sampler", "batch", "prompt"]


def test_text_of_prompts_is_replaced(sd1, generate, tmp_path):
    (tmp_path / "p.csv").write_text('prompt,negative_prompt\n"a (cat:1.2), red cat",cat\na dog,\n')
    axes = ("--sweep", 'prompt="(cat:1.2)":"(dog, wet:0.8)"|""', "--sweep", "prompt=red cat:(cat:1.2)")
    jobs = planned(generate(sd1.folder, "--from_file", tmp_path / "p.csv", *axes, "--dry_run", "--json"))
    assert [job["prompt"] for job in jobs] == [
        "a (cat:1.2), red cat",
        "a (cat:1.2), (cat:1.2)",
        "a (dog, wet:0.8), red cat",
        "a (dog, wet:0.8), (cat:1.2)",
        "a , red cat",
        "a , (cat:1.2)",
        "a dog",  # which has nothing to replace
    ]
    assert {job["negative_prompt"] for job in jobs[:-1]} == {"cat"}
    assert [each["name"] for each in jobs[0]["sweep"]["values"]] == ["prompt ((cat:1.2))", "prompt (red cat)"]
    # one text may begin with the other
    axes = ("--sweep", "prompt=red:blue", "prompt=red cat:fox")
    jobs = planned(generate(sd1.folder, "--prompt", "a red cat, red", *axes, "--dry_run", "--json"))
    assert [job["prompt"] for job in jobs] == ["a red cat, red", "a fox, red", "a red cat, blue", "a fox, blue"]


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("a", ["scale"], "--sweep scale: is no axis; write NAME=VALUE,VALUE"),
        ("a", ["scale="], "--sweep scale=: has a value that is empty"),
        ("a", ["scale=4,,5"], "--sweep scale=4,,5: has a value that is empty"),
        ("a", ["cfg_scale=4"], "--sweep cfg_scale=4: 'cfg_scale' is nothing that a prompt line can set; did you mean "
                               "scale?"),
        ("a", ["ckpt=a,b"], "--sweep ckpt=a,b: 'ckpt' is nothing that a prompt line can set; known are prompt, "),
        ("a", ["scale=4,x"], "--sweep scale=4,x: 'x': not a number; write"),
        ("a", ["seed=5-3"], "--sweep seed=5-3: '5-3': is no range of seeds"),
        ("a", ["sampler=euler,k_euler"], "--sweep sampler=euler,k_euler: 'k_euler' is there twice; keep one of them"),
        ("a", ["scale=4,5", "l=6"], "--sweep l=6: is about the same as --sweep scale=4,5; put the values into one"),
        ("a", ["n=a --s 3"], "--sweep n=a --s 3: 'a --s 3' would begin another option"),
        ("a", ["f=a,b"], "--sweep f=a,b: names of files change no picture"),
        ("a", ["prompt=a"], "--sweep prompt=a: replaces text of the prompt; write prompt=OLD:NEW"),
        ("a dog --n cat", ["prompt=cat:cow"], "--sweep prompt=cat:cow: 'cat' is in no prompt; write it as it stands"),
        ("a --L 3", ["scale=4,5"], "--l: the line sets it, and so does --sweep scale=4,5; take one of them out"),
        ("a", ["l=1,2", "s=1,2", "w=64,72", "h=64,72"], "--sweep: 4 axes; give at most 3"),
        ("a", ['n="b"c,d'], '--sweep n="b"c,d: has text after a quoted value, or quotes left open'),
        ("a", ['n="b,c'], '--sweep n="b,c: has text after a quoted value, or quotes left open'),
        ("a", ["am=0,1"], "--sweep am=0: --am 0: there is no network"),
        ("a --x 3", ["scale=4,5"], "--x (column 3): no such prompt option"),  # a fault of the line alone
        ("a cat", ["prompt=cat:{b|c}"], "--sweep prompt=cat:{b|c}: '{b' is one part of a choice; write it in double"),
        ("a", ["strength=0.4,1"], "--sweep strength=0.4,1: changes nothing without --image_path"),
        ("a", ["s=1,2", "seed=0-600"], "--n_iter 1, --images_per_prompt 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept(sd1, generate, monkeypatch, line, options, message):
    monkeypatch.setattr("library.plan.all_jobs.MAX_JOBS", 1000)
    result = generate(sd1.folder, "--prompt", line, "--sweep", *options)
    assert result.status == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_seeds_are_not_swept_and_repeated(sd1, generate):
    result = generate(sd1.folder, "--prompt", "a", "--sweep", "seed=1,2", "--n_iter", 2)
    assert (result.status, result.stderr.split(":")[0]) == (2, "error")
    assert "--n_iter draws the pictures of each seed again" in result.stderr


def test_sweeps_in_a_settings_file(sd1, generate, tmp_path):
    (tmp_path / "a.toml").write_text('prompt = "a"\nsweep = ["scale=4,5", "s=1,2"]\n')
    command = (sd1.folder, "--config", tmp_path / "a.toml", "--dry_run", "--json")
    assert len(planned(generate(*command))) == 4
    assert [job["steps"] for job in planned(generate(*command, "--sweep", "s=3,4,5"))] == [3, 4, 5]  # in its place


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_sweep_is_drawn_resumed_and_drawn_again_one_by_one(sd1, generate, tmp_path):
    """Networks' strengths are swept in other tests; here a source folder is gone through as without the sweep."""
    (tmp_path / "in").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "in" / f"{name}.png")
    images = ("--image_path", tmp_path / "in", "--images_per_prompt", 2, "--seed", 1)
    command = (sd1.folder, "--prompt", "a {cat|dog}", *images, "--grid", "--html", "--sweep")
    swept = generate(*command, "strength=0.5,1", "scale=1,3")
    assert swept.status == 0, swept.stderr
    made = [file for file in swept.files if file.name.startswith("im_")]
    (sheet,) = [file for file in swept.files if file.name.startswith("grid_")]
    assert len(made) == 8
    texts = [Image.open(file).info for file in made]
    assert [text["sweep"] for text in texts[::2]] == [
        "strength=0.5; scale=1", "strength=0.5; scale=3", "strength=1; scale=1", "strength=1; scale=3"
    ]  # fmt: skip
    assert [re.search("Source image: (.)", text["parameters"])[1] for text in texts] == ["a", "b"] * 4
    canvas = np.asarray(Image.open(sheet))
    assert all(stands_in(canvas, np.asarray(Image.open(file))) for file in made)
    # the line in a picture's metadata draws that picture
    again = generate(
        *(sd1.folder, "--prompt", f"{texts[2]['raw-prompt']} --d {texts[2]['seed']}", "--steps", texts[2]["steps"]),
        *("--image_path", tmp_path / "in" / "a.png"),
        outdir=tmp_path / "again",
    )
    assert np.array_equal(again.pictures[0], np.asarray(Image.open(made[2])))
    # gone on with, and not with another sweep
    before = made[5].read_bytes()
    made[5].unlink()
    resumed = generate(*command, "strength=0.5,1", "scale=1,3", "--resume")
    assert resumed.status == 0 and made[5].read_bytes() == before
    other = generate(*command, "strength=0.5,1", "scale=1,4", "--resume")
    assert other.status == 2
    assert other.stderr.startswith("error: --sweep strength=0.5,1 scale=1,4: the run to resume has strength=0.5,1 ")


def test_a_sweep_with_highres_fix_draws_what_single_lines_draw(sd1, generate, tmp_path):
    highres = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--W", 128, "--H", 128, "--seed", 5)
    swept = generate(sd1.folder, "--prompt", "a cat", "--sweep", "prompt=cat:dog", "--sweep", "scale=2,4", *highres)
    alone = generate(sd1.folder, "--prompt", "a dog --l 4", *highres, outdir=tmp_path / "alone")
    assert np.array_equal(swept.pictures[3], alone.pictures[0])
    assert len({picture.tobytes() for picture in swept.pictures}) == 4


def test_a_sweep_in_the_loop(sd1, generate, monkeypatch, tmp_path):
    saved = tmp_path / "saved.txt"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"a cat --d 4\na bird\na cat --s 1\n:show\n:save {saved}\n"))
    axes = ("--sweep", "scale=2,4", "prompt=cat:dog")
    result = generate(sd1.folder, "--interactive", "--no_preview", *axes)
    assert result.status == 0
    assert "'cat' is in no prompt" in result.stderr  # a bird
    texts = [Image.open(line).info for line in result.stdout.splitlines()]
    assert [(text["prompt"], text["scale"]) for text in texts] == [
        ("a cat", "2.0"), ("a dog", "2.0"), ("a cat", "4.0"), ("a dog", "4.0")
    ] * 2  # fmt: skip
    assert {text["seed"] for text in texts[:4]} == {"4"} and len({text["seed"] for text in texts[4:]}) == 1
    assert "each of --sweep scale=2,4" in result.stderr  # what :show tells
    # the lines hold what was swept, so they are drawn without the sweep
    assert "in place of --interactive and --sweep draws them" in saved.read_text()
    again = planned(generate(sd1.folder, "--from_file", saved, "--dry_run", "--json"))
    assert [(job["prompt"], str(job["guidance_scale"])) for job in again] == [
        (text["prompt"], text["scale"]) for text in texts
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Sheets


def pictures_of(folder: Path, axes: list[str], images: int = 1, size: tuple[int, int] = (96, 144)):
    """The pictures of a sweep, each of one colour: its place in red and green, its image in blue."""
    sweep = Sweep(tuple(map(axis, axes)))
    folder.mkdir(exist_ok=True)
    made = []
    for number, values in enumerate(itertools.product(*(each.values for each in sweep.axes))):
        for image in range(images):
            file = folder / f"im {number:04d} {image} #%.png"
            Image.new("RGB", size, (number % 256, number // 256, image)).save(file)
            said = tuple(zip([each.name for each in sweep.axes], values))
            job = Job(
                prompt="<b>cat</b> & 'dog' 猫", seed=image, raw_prompt="x", where="", file=file,
                width=size[0], height=size[1], cell=SweepCell("<b>cat</b> & 'dog' 猫", said, image),
            )  # fmt: skip
            settings = {"Seed": str(image), "Model": "a_very_long_name_of_a_model_without_any_spaces" * 2}
            made.append(MadePicture(job, file, settings))
    return made, sweep


def colours(sheet: bytes) -> list[list[tuple[int, ...]]]:
    """The pictures' colours on a sheet, row by row, as they are met."""
    pixels = np.asarray(Image.open(io.BytesIO(sheet))).astype(int)
    is_picture = (pixels[..., 0] < 60) & (pixels[..., 1] == 0) & (pixels[..., 2] < 9) & (pixels.sum(2) > 0)
    rows = []
    for y, line in enumerate(is_picture):
        found = [tuple(map(int, pixels[y, x])) for x in np.flatnonzero(line)]
        counted = [colour for colour, group in itertools.groupby(found) if len(list(group)) > 90]
        if counted and (not rows or rows[-1] != counted):
            rows.append(counted)
    return rows


def test_a_sheet_of_three_axes(tmp_path):
    """3 × 4 × 2: rows, columns, and two tables below each other on one sheet, in the pictures' own shape."""
    made, sweep = pictures_of(tmp_path / "a", ["scale=1,2,3", "sampler=ddim,euler,heun,lms", "prompt=cat:dog"])
    (sheet,) = sheets_of_sweep(made[1:], sweep)  # the first picture failed
    drawn = draw_sheet(sheet)
    place = {(r, c, t): (r * 4 + c) * 2 + t for r in range(3) for c in range(4) for t in range(2)}
    wanted = [[(place[r, c, t], 0, 0) for c in range(4) if place[r, c, t]] for t in range(2) for r in range(3)]
    assert colours(drawn) == wanted
    assert [block.heading for block in sheet.blocks] == ["prompt: cat", "prompt: dog"]
    assert sheet.blocks[0].row_labels == ["scale: 1", "scale: 2", "scale: 3"]
    assert sheet.blocks[0].column_labels[1] == "sampler: euler"
    assert sheet.title == ["<b>cat</b> & 'dog' 猫", "seed: 0"]
    width, height = Image.open(io.BytesIO(drawn)).size
    assert sheet.cell_px == (128, 144)  # wide enough for a word; a square would be 144 wide
    assert width < 5 * 144 and height > 6 * 144
    wide, sweep = pictures_of(tmp_path / "b", ["scale=1,2"], size=(768, 384))
    assert next(sheets_of_sweep(wide, sweep)).cell_px == (256, 128)


def test_one_axis_is_a_row_and_seeds_are_another(tmp_path):
    made, sweep = pictures_of(tmp_path / "a", ["scale=1,2,3"])
    (sheet,) = sheets_of_sweep(made, sweep)
    assert colours(draw_sheet(sheet)) == [[(1, 0, 0), (2, 0, 0)]]  # the first one is black as the letters
    assert not sheet.blocks[0].row_labels
    made, sweep = pictures_of(tmp_path / "b", ["scale=1,2,3"], images=2)
    (sheet,) = sheets_of_sweep(made, sweep)
    assert colours(draw_sheet(sheet)) == [[(1, 0, 0), (2, 0, 0)], [(0, 0, 1), (1, 0, 1), (2, 0, 1)]]
    assert sheet.blocks[0].row_labels == ["seed: 0", "seed: 1"]
    made, sweep = pictures_of(tmp_path / "c", ["scale=1,2", "s=1,2", "t=0.5,1"], images=2)
    assert [sheet.title[1] for sheet in sheets_of_sweep(made, sweep)] == ["seed: 0", "seed: 1"]


def test_an_empty_text_has_a_label(tmp_path):
    made, sweep = pictures_of(tmp_path / "a", ["scale=1,2", 'n="",blurry'])
    (sheet,) = sheets_of_sweep(made, sweep)
    assert sheet.blocks[0].column_labels == ['n: ""', "n: blurry"]


def test_large_sweeps_are_parted(tmp_path):
    made, sweep = pictures_of(tmp_path / "a", [f"scale={','.join(map(str, range(23)))}", "seed=1-12"], size=(8, 8))
    sheets = list(sheets_of_sweep(made, sweep))
    assert sorted(p.file for sheet in sheets for p in sheet.pictures) == sorted(p.file for p in made)
    for sheet in sheets:
        assert len(sheet.pictures) <= MAX_CELLS
        assert all(len(row) <= 10 for block in sheet.blocks for row in block.rows)


def test_captions_tell_what_differs(sd1, generate, tmp_path):
    """Lines that differ in one option share a sheet; each caption has that, and nothing that all pictures share."""
    (tmp_path / "p.txt").write_text("a cat --sampler euler\na cat --sampler dpmsolver++\n")
    result = generate(sd1.folder, "--from_file", tmp_path / "p.txt", "--images_per_prompt", 2, "--grid", "--seed", 1)
    assert len([file for file in result.files if file.name.startswith("grid_")]) == 1
    job = Job(prompt="a red cat here", seed=4, raw_prompt="a", where="f:1", file=Path("a"), width=8, height=8)
    made = [MadePicture(job, Path("a"), {"Sampler": "Euler", "Model": "m", "Networks": "style: 0.5"})]
    other = Job(
        prompt="a wet blue cat here", seed=5, raw_prompt="a", where="f:1", file=Path("b"), width=8, height=8,
        negative_prompt="fog",
    )  # fmt: skip
    made.append(MadePicture(other, Path("b"), {"Sampler": "DDIM", "Model": "m"}))
    (sheet,) = sheets_by_prompt(made)
    assert sheet.captions == {
        Path("a"): ["seed 4", "… red …", "− ", "Sampler Euler", "style: 0.5"],
        Path("b"): ["seed 5", "… wet blue …", "− fog", "Sampler DDIM", "no networks"],
    }


def test_letters_of_other_scripts(tmp_path, monkeypatch, caplog):
    """What no font has is named, once; letters that the first font lacks are taken from another."""
    found = Letters(14)
    found.getlength("Größe, кот, γάτα, قطة, חתול, ≤ 3 → «x» e\u0301")
    assert found.lacking == ""
    monkeypatch.setattr(letters_of, "font_folders", lambda: [tmp_path])
    letters_of._system_fonts.cache_clear()
    letters_of._system_font_with.cache_clear()
    made, sweep = pictures_of(tmp_path / "a", ["scale=1,2"])
    draw_sheet(next(sheets_of_sweep(made, sweep)))
    assert "no font here has the letters 猫, which are boxes; install one" in caplog.text
    assert "fonts-noto-cjk" in caplog.text
    from PIL import ImageFont

    (tmp_path / "DejaVuSans.ttf").write_bytes(letters_of.SHIPPED.read_bytes())
    plain = tmp_path / "a" / "latin.bin"
    plain.write_bytes(ImageFont.load_default(14).font_bytes)  # Pillow's own, which has Latin letters alone
    monkeypatch.setattr(letters_of, "SHIPPED", plain)
    letters_of._system_fonts.cache_clear()
    letters_of._system_font_with.cache_clear()
    assert has(plain, "x") and not has(plain, "к")
    mixed = Letters(14)
    assert mixed.getlength("кот") > 0 and mixed.lacking == ""
    letters_of._system_fonts.cache_clear()
    letters_of._system_font_with.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# The page

_USE = """{
const out = [], all = (what, from = document) => [...from.querySelectorAll(what)];
const seen = each => each.offsetParent !== null && getComputedStyle(each).visibility !== 'hidden';
function outside(where) {
  for (const each of all('body *').filter(seen)) {
    const box = each.getBoundingClientRect();
    if (box.right > innerWidth + 1 || box.left < -1) out.push(`${where}: ${each.outerHTML.slice(0, 80)}`);
    if (each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).display !== 'inline' && each.clientWidth)
      out.push(`${where}, wider than itself: ${each.outerHTML.slice(0, 80)}`);
  }
}
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
const here = () => document.activeElement.querySelector('img').alt;
outside('at first');
out.push(`width ${innerWidth}`);
all('td a')[0].focus();
press('ArrowRight'); press('ArrowDown');
out.push(here());
document.activeElement.click();
outside('enlarged');
press('ArrowRight');
out.push(all('dialog img')[0].alt, all('dialog .about dd')[0].textContent);
all('details', document.querySelector('dialog')).forEach(each => each.open = true);
outside('with its command');
document.querySelector('dialog').close();
document.querySelector('dialog').dispatchEvent(new Event('close'));  // which the browser does a moment later
out.push(here());
all('[name=turn]')[0].click();
outside('turned');
const labels = () => all('th', all('table').find(seen)).map(each => each.textContent).join(' ');
out.push(labels());
all('td a')[0].focus();
press('ArrowRight');
out.push(here());
const search = all('[type=search]')[0];
search.value = 'EULER 3'; search.dispatchEvent(new Event('input'));
out.push(`${all('output')[0].textContent} ${all('table').filter(seen).length} ${labels()}`);
search.value = ''; search.dispatchEvent(new Event('input'));
all('[name=turn]')[0].click();
out.push(all('td a').filter(seen).length, labels());
const width = all('td a')[0].getBoundingClientRect().width, size = all('[name=size]')[0];
size.value = 200; size.dispatchEvent(new Event('input'));
out.push(Math.round(all('td a')[0].getBoundingClientRect().width / width));
const result = document.createElement('pre');
result.id = 'result';
result.textContent = JSON.stringify(out);
(parent === window ? document : parent.document).body.append(result);
}"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1600])
def test_the_page_of_a_thousand_pictures(tmp_path, site, width):
    """In a frame of the width, as Chromium makes no window as narrow as a phone."""
    address, _ = site
    axes = [f"scale={','.join(map(str, range(1, 11)))}", "sampler=ddim,euler,heun,lms,dpmsolver++ karras"]
    others = "|".join(f"a_very_long_word_without_any_space_in_it_{number}" for number in range(19))
    made, sweep = pictures_of(tmp_path / "site", [*axes, f"prompt=cat:{others}"])
    assert len(made) == 1000
    tables = list(sweep_tables(made, sweep))
    page = make_page(made, "a <title>", Command({"ckpt": "model"}, JobSettings(), 512), "mark", tables)
    frame = f"<html><body><iframe src=page.html width={width} height=900></iframe></body></html>"
    (tmp_path / "site" / "index.html").write_text(frame)
    (tmp_path / "site" / "page.html").write_text(
        page.replace("</body>", f"<script>{_USE}</script></body>"), encoding="utf-8"
    )
    done = subprocess.run(browser(tmp_path, "--dump-dom", f"{address}/index.html"), capture_output=True, timeout=120)
    text = re.search('<pre id="result">(.*)</pre>', done.stdout.decode())[1]
    rows, columns = [str(n) for n in range(1, 11)], ["ddim", "euler", "heun", "lms", "dpmsolver++ karras"]
    assert json.loads(text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")) == [
        f"width {width}",
        "scale: 2, sampler: euler, prompt: cat",
        "scale: 2, sampler: heun, prompt: cat",
        "0",
        "scale: 2, sampler: heun, prompt: cat",
        " ".join([*rows, *columns]),
        "scale: 2, sampler: ddim, prompt: cat",
        f"{_fitting(made)} {len({p.job.cell.values[2] for p in made if _fits(p)})} 3 euler",
        1000,
        " ".join([*columns, *rows]),
        2,
    ]
    assert "猫" in page and "<b>cat" not in page


def _fits(picture: MadePicture) -> bool:
    """Whether the words EULER and 3 are in what the page tells of a picture."""
    told = " ".join(["seed 0", *(value for _, value in picture.job.cell.values)])
    return "euler" in told and "3" in told


def _fitting(made: list[MadePicture]) -> int:
    return sum(map(_fits, made))


def test_a_page_of_a_run(sd1, generate, tmp_path):
    """Each picture's command is on the page; without a sweep there is no table."""
    result = generate(sd1.folder, "--prompt", "a cat", "--sweep", "scale=2,4", "--html", "--seed", 1)
    page = (tmp_path / "out" / "index.html").read_text()
    assert [file.name for file in result.files] == re.findall('<a href="([^"]+)"', page)
    assert "--prompt &#x27;a cat --d 1 --l 2.0&#x27;" in page and page.count("<table") == 1
    generate(sd1.folder, "--prompt", "a cat", "--html", outdir=tmp_path / "plain")
    assert "<table" not in (tmp_path / "plain" / "index.html").read_text()
    assert len(pictures_in(tmp_path / "plain")) == 1
