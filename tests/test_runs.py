"""What may happen while a run draws: too little memory, NaN, damage in the middle, Ctrl-C, SIGTERM."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from child_runs import Child
from conftest import pictures_in
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from PIL import Image

import gen_img_diffusers
from library.draw import vae_memory
from library.errors import EnvironmentFault, InputError
from library.machine.devices import is_out_of_memory, try_to_run
from library.plan.job import Job
from library.run.report import say_failed
from library.run.runs import BatchDrawer

PICTURE = np.zeros((8, 8, 3), np.uint8)


def make_jobs(count: int, **settings) -> list[Job]:
    values = {"prompt": "p", "raw_prompt": "p", "where": "", "width": 512, "height": 512}
    return [Job(seed=n, file=Path(f"{n}.png"), **values | settings) for n in range(count)]


class FakePainter:
    """Draws nothing, and fails as it is told: `fail(jobs)` may raise."""

    def __init__(self, fail, works_ahead: bool = False) -> None:
        self.fail = fail
        self.works_ahead = works_ahead
        self.batches: list[list[int]] = []

    def begin(self, jobs, make_bar):
        self.batches.append([job.seed for job in jobs])
        self.fail(jobs)
        return lambda: [(job, PICTURE) for job in jobs]


def batch_key(job: Job) -> int:
    return job.width


def drawn(drawer: BatchDrawer, *batches: list[Job]) -> list[int]:
    return [job.seed for pictures in drawer.draw(batches) for job, _ in pictures]


def fits(size: int):
    """Raises when a batch is larger."""

    def fail(jobs):
        if len(jobs) > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    return fail


def into(failed: list[Job]):
    """What lists failed pictures there, and says what befell them."""

    def fail(job: Job, problem: str) -> None:
        failed.append(job)
        say_failed(job, problem)

    return fail


def test_batches_are_halved_until_they_fit():
    failed: list[Job] = []
    painter = FakePainter(fits(2))
    drawer = BatchDrawer(painter, batch_key, into(failed), iter)
    assert drawn(drawer, make_jobs(8)) == list(range(8))
    assert [len(batch) for batch in painter.batches] == [8, 4, 2, 2, 4, 2, 2]
    painter.batches.clear()
    assert drawn(drawer, make_jobs(5)) == list(range(5))
    assert [len(batch) for batch in painter.batches] == [2, 2, 1]  # what did not fit is not tried again
    painter.batches.clear()
    assert drawn(drawer, make_jobs(4, width=8)) == list(range(4))
    assert [len(batch) for batch in painter.batches] == [4, 2, 2]  # other sizes have room of their own
    assert failed == []


def test_a_picture_too_large_alone_fails_and_the_others_go_on(capsys):
    def fail(jobs):
        if any(job.seed == 1 for job in jobs):
            raise torch.OutOfMemoryError

    failed: list[Job] = []
    assert drawn(BatchDrawer(FakePainter(fail), batch_key, into(failed), iter), make_jobs(4)) == [0, 2, 3]
    assert [job.seed for job in failed] == [1]
    assert "error: 1.png (seed 1): out of memory; give a smaller --W" in capsys.readouterr().err


def test_no_memory_at_all_ends_the_run():
    with pytest.raises(EnvironmentFault, match="out of memory 3 times in a row"):
        drawn(BatchDrawer(FakePainter(fits(0)), batch_key, into([]), iter), make_jobs(5))


def test_a_bad_job_leaves_its_batch_alone(capsys):
    def fail(jobs):
        if any(job.seed in (0, 3, 4, 6) for job in jobs):
            raise InputError("--image_path x.png", "is damaged")

    failed: list[Job] = []
    assert drawn(BatchDrawer(FakePainter(fail), batch_key, into(failed), iter), make_jobs(8, where="f:1")) == [
        1,
        2,
        5,
        7,
    ]
    assert [job.seed for job in failed] == [0, 3, 4, 6]
    assert "error: 3.png (f:1, seed 3): --image_path x.png: is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("works_ahead", "order"),
    [
        (False, ["begin 0", "finish 0", "begin 1", "finish 1", "begin 2", "finish 2"]),
        (True, ["begin 0", "begin 1", "finish 0", "begin 2", "finish 1", "finish 2"]),
    ],
)
def test_a_painter_that_works_ahead_begins_the_next_batch_first(works_ahead, order):
    happened: list[str] = []

    class Painter(FakePainter):
        def begin(self, jobs, make_bar):
            happened.append(f"begin {jobs[0].seed}")
            finish = super().begin(jobs, make_bar)
            return lambda: (happened.append(f"finish {jobs[0].seed}"), finish())[1]

    drawer = BatchDrawer(Painter(lambda jobs: None, works_ahead), batch_key, into([]), iter)
    assert drawn(drawer, *([job] for job in make_jobs(3))) == [0, 1, 2]
    assert happened == order


def test_what_fails_while_a_batch_is_waited_for_is_narrowed_down():
    class Painter(FakePainter):
        def begin(self, jobs, make_bar):
            self.batches.append([job.seed for job in jobs])

            def finish():
                self.fail(jobs)
                return [(job, PICTURE) for job in jobs]

            return finish

    painter, failed = Painter(fits(1), works_ahead=True), []
    jobs = make_jobs(4)
    assert drawn(BatchDrawer(painter, batch_key, into(failed), iter), jobs[:2], jobs[2:]) == [0, 1, 2, 3]
    assert painter.batches == [[0, 1], [2, 3], [0], [1], [2], [3]]
    assert failed == []


def test_pictures_are_the_same_when_batches_are_begun_ahead(sd1, generate, tmp_path, monkeypatch):
    """Also where a batch fails for lack of memory while the one before is unfinished."""
    begin, begun = gen_img_diffusers.Pipeline.begin, []

    def begin_with_little_memory(pipeline, jobs, make_bar):
        begun.append(len(jobs))
        if len(begun) == 2:
            raise torch.OutOfMemoryError
        return begin(pipeline, jobs, make_bar)

    options = ("--prompt", "a cat", "--images_per_prompt", 6, "--seed", 1)
    plain = generate(sd1.folder, *options, "--batch_size", 2)
    monkeypatch.setattr(gen_img_diffusers.Pipeline, "works_ahead", True)
    monkeypatch.setattr(gen_img_diffusers.Pipeline, "begin", begin_with_little_memory)
    ahead = generate(sd1.folder, *options, "--batch_size", 2, outdir=tmp_path / "ahead")
    assert ahead.status == plain.status == 0, plain.stderr + ahead.stderr
    assert begun == [2, 2, 2, 1, 1]  # the last batch is begun before the failed one is narrowed down
    for one, other in zip(plain.files, ahead.files, strict=True):
        # one level: convolutions of other batch sizes add up in another order
        difference = np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(other))
        assert np.abs(difference).max() <= 1


def test_other_errors_are_not_tried_again():
    def fail(jobs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    painter = FakePainter(fail)
    with pytest.raises(RuntimeError, match="mat1"):
        drawn(BatchDrawer(painter, batch_key, into([]), iter), make_jobs(4))
    assert len(painter.batches) == 1


def test_a_real_lack_of_memory_is_told_from_other_errors():
    def more_than_there_is():
        return torch.empty(1 << 60, dtype=torch.uint8)

    assert try_to_run(more_than_there_is) is None
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN under RLIMIT_AS
    for said in ("std::bad_alloc", "can't alloc", "Failed to allocate 64 bytes of memory"):  # OpenVINO, under RLIMIT_AS
        place = "Exception from src/inference/src/cpp/core.cpp:117:\nException from src/dev/plugin.cpp:5:"
        assert is_out_of_memory(RuntimeError(f"{place}\n{said}\n\n"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="negative"):
        try_to_run(lambda: torch.empty(-1))


def test_a_failed_attempts_tensors_are_gone_before_the_next():
    import weakref

    kept = []

    def attempt():
        large = torch.zeros(1000)
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError

    assert try_to_run(attempt) is None
    assert kept[0]() is None


# ---------------------------------------------------------------------------------------------------------------------
# The VAE


@pytest.fixture
def limited_vae(monkeypatch):
    """Makes every VAE run out of memory above so many latent cells at a time; gives the shapes it was asked for."""
    real = Decoder.forward

    def limit(cells: int) -> list[tuple[int, ...]]:
        shapes = []

        def decoder(self, latents, *rest):
            shapes.append(tuple(latents.shape))
            if latents.shape[0] * latents.shape[2] * latents.shape[3] > cells:
                raise torch.OutOfMemoryError
            return real(self, latents, *rest)

        monkeypatch.setattr(Decoder, "forward", decoder)
        return shapes

    return limit


def test_the_vae_goes_one_by_one(sd1, generate, limited_vae):
    command = (sd1.folder, "--prompt", "a", "--images_per_prompt", 3, "--batch_size", 3, "--seed", 1)
    expected = generate(*command).pictures
    limited_vae(64)
    result = generate(*command)
    assert result.status == 0
    assert result.stderr.count("warning: out of memory in the VAE; decoding pictures one by one") == 1
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(result.pictures, expected))


def test_the_vae_goes_in_tiles(sd1, generate, limited_vae):
    command = (sd1.folder, "--prompt", "a", "--seed", 1, "--W", 320, "--H", 192)
    expected = generate(*command).pictures
    shapes = limited_vae(32 * 24)
    result = generate(*command)
    assert result.status == 0
    assert "decoding in tiles of 256 x 256 pixels" in result.stderr
    assert result.pictures[0].shape == (192, 320, 3)
    # tiles have statistics of their own; two other pictures of this model are 40 levels apart
    assert np.abs(result.pictures[0] - expected[0]).mean() < 10
    assert max(shape[-1] for shape in shapes[1:] if shape[-1] < 40) <= 32


def test_the_vae_is_left_as_it_was(sd1, limited_vae):
    vae = AutoencoderKL.from_pretrained(sd1.folder / "vae").requires_grad_(False)
    latents = torch.randn(2, 4, 40, 24, generator=torch.Generator().manual_seed(0))
    expected = vae_memory.decode(vae, latents)
    before = dict(vars(vae))
    limited_vae(600)
    vae_memory.decode(vae, latents)
    assert {name: value for name, value in vars(vae).items() if name.startswith(("tile", "use_"))} == {
        name: value for name, value in before.items() if name.startswith(("tile", "use_"))
    }
    limited_vae(10_000)
    assert torch.equal(vae_memory.decode(vae, latents), expected)


def test_a_vae_that_never_fits_fails_its_picture(sd1, generate, limited_vae):
    limited_vae(10)
    result = generate(sd1.folder, "--prompt", "a --d 1")
    assert result.status == 3
    assert "seed 1): out of memory" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# In the middle of a run


@pytest.fixture
def nan_for_dogs(monkeypatch):
    """The model gives NaN wherever the prompt holds more than five words."""
    real = UNet2DConditionModel.forward

    def broken(self, sample, timestep, encoder_hidden_states, **named):
        output = real(self, sample, timestep, encoder_hidden_states=encoder_hidden_states, **named)
        output.sample[-1] = float("nan")
        return output

    return lambda: monkeypatch.setattr(UNet2DConditionModel, "forward", broken)


def test_failed_pictures_are_listed_as_a_prompt_file(sd1, generate, nan_for_dogs, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --w 72\n(a {big|small} dog:1.2) --n fog --l 9.5 --nl 2 --d 7,8\n# a remark\n")
    options = ("--images_per_prompt", 2, "--batch_size", 2, "--seed", 3)
    expected = generate(sd1.folder, "--from_file", prompts, *options, outdir=tmp_path / "whole")
    nan_for_dogs()
    result = generate(sd1.folder, "--from_file", prompts, *options)
    assert result.status == 3
    assert len(result.files) == 2  # the last of each batch failed
    assert result.stderr.count("error: ") == 2
    assert f"({prompts}:2, seed 8): the model gave NaN" in result.stderr
    assert "2 failed" in result.stderr
    (listed,) = (tmp_path / "out").glob("failed_*.txt")
    assert str(listed) in result.stderr
    again = generate(sd1.folder, "--from_file", listed, "--dry_run", "--json", *options[2:])
    assert again.status == 0
    wanted = [Image.open(expected.files[place]).info for place in (1, 3)]
    listed_jobs = [json.loads(line) for line in again.stdout.splitlines()]
    for job, info in zip(listed_jobs, wanted):
        assert job["prompt"] == info["prompt"]
        assert str(job["seed"]) == info["seed"]
        assert f"Size: {job['width']}x{job['height']}" in info["parameters"]
    assert (listed_jobs[1]["guidance_scale"], listed_jobs[1]["negative_scale"]) == (9.5, 2)


def test_resuming_tries_failed_pictures_again(sd1, generate, monkeypatch, nan_for_dogs):
    command = (sd1.folder, "--prompt", "a cat", "--images_per_prompt", 3, "--batch_size", 3, "--seed", 3)
    with monkeypatch.context():
        nan_for_dogs()
        assert len(generate(*command).files) == 2
        monkeypatch.undo()
    result = generate(*command, "--resume")
    assert (result.status, len(result.files)) == (0, 1)


def test_a_source_picture_lost_in_the_middle(sd1, generate, monkeypatch, tmp_path):
    import gen_img_diffusers

    folder = tmp_path / "sources"
    folder.mkdir()
    for name in "abcd":
        Image.new("RGB", (64, 64), "red").save(folder / f"{name}.png")
    real = gen_img_diffusers.load_pipeline

    def lose_one(*arguments):
        (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:60])
        return real(*arguments)

    monkeypatch.setattr(gen_img_diffusers, "load_pipeline", lose_one)
    options = ("--image_path", folder, "--prompt", "a", "--images_per_prompt", 4, "--batch_size", 4, "--strength", 1)
    result = generate(sd1.folder, *options)
    assert result.status == 3
    assert len(result.files) == 3
    assert f"{folder / 'b.png'}: is damaged" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Interruption


def interrupted(sd1, outdir: Path, number: int, pictures: int = 200) -> subprocess.CompletedProcess[str]:
    """Start a long run and send it a signal once its first picture stands."""
    argv = ("--ckpt", sd1.folder, "--outdir", outdir, "--W", 64, "--H", 64, "--steps", 4, "--prompt", "a")
    argv += ("--images_per_prompt", pictures, "--batch_size", 2, "--seed", 1)

    def listen() -> None:  # whatever the tests were started by
        signal.signal(signal.SIGINT, signal.default_int_handler)

    child = Child(*argv, prepare=listen)
    deadline = time.monotonic() + 120
    while not pictures_in(outdir) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.number, number)
    return child.wait()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_finishes_the_batch_in_hand(sd1, tmp_path, number, status):
    done = interrupted(sd1, tmp_path, number)
    assert done.returncode == status
    made = pictures_in(tmp_path)
    assert len(made) % 2 == 0  # whole batches
    assert 0 < len(made) < 200
    assert sorted(done.stdout.splitlines()) == [str(file) for file in made]
    assert "finishing the batch in hand" in done.stderr
    assert re.search(rf"^{len(made)} pictures made in .*, {200 - len(made)} not made$", done.stderr, re.MULTILINE)
    assert done.stderr.splitlines()[-1].startswith("error: interrupted")
    assert all(Image.open(file).load() for file in made)


def test_a_second_interruption_stops_at_once(sd1, tmp_path, monkeypatch, generate):
    """The batch in hand would take minutes."""

    def interrupt() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    real = UNet2DConditionModel.forward

    def slow(self, *rest, **named):
        if len(pictures_in(tmp_path / "out")) > 0:
            threading.Thread(target=interrupt).start()
            time.sleep(120)
        return real(self, *rest, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = generate(sd1.folder, "--prompt", "a", "--images_per_prompt", 6)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.status == 130
    assert 0 < len(result.files) < 6
    assert "not made" in result.stderr
