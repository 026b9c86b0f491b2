"""What the parts of the program know of each other, and what an option is."""

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import gen_img_diffusers
from library.plan import run_record
from library.plan.canvas import Box
from library.plan.job import Job
from library.plan.run_record import job_id
from library.settings.deep_shrink import DeepShrink
from library.settings.gradual_latent import GradualLatent, Unsharp
from library.settings.masks import Margins
from library.settings.options import CHOICE, COMMAND_LINE, COMPUTING, RUN, TELLING, Options
from library.settings.sizes import ToldSizes
from networks.strengths import Strength
from networks.tags import TagUse

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "diffusers", "transformers")
IN_PLANNING = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for pattern in (
        "library/*.py",
        "library/files/*.py",
        "library/recipes/*.py",
        "library/settings/*.py",
        "library/plan/*.py",
    )
    for file in sorted(ROOT.glob(pattern))
] + [
    "networks.tags",
    "networks.folder",
    "networks.files",
    "networks.strengths",
    "networks.keys",
    "networks.kinds",
    "gen_img_diffusers",
]


def run_python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_planning_imports_nothing_heavy():
    """The contract in pyproject.toml lets a few files import torch inside functions; none does when it is imported."""
    code = f"import sys, importlib\nfor name in {IN_PLANNING!r}: importlib.import_module(name)\n"
    assert run_python(code + f"print([name for name in {HEAVY!r} if name in sys.modules])").strip() == "[]"


def test_a_dry_run_needs_no_torch(sd1, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na {red|blue} dog --w 64\n" + "long " * 90)
    code = (
        "import sys, gen_img_diffusers\n"
        "status = gen_img_diffusers.main(sys.argv[1:])\n"
        "print(status, 'torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    options = ("--ckpt", sd1.safetensors, "--from_file", tmp_path / "prompts.txt", "--outdir", tmp_path / "out")
    lines = run_python(code, *options, "--dry_run", "--max_embeddings_multiples", 2).splitlines()
    assert lines[-1] == "0 False False"
    assert [line.split()[4] for line in lines[1:4]] == ["1", "2", "3"]  # batches: by width, and by length
    assert not (tmp_path / "out").exists()


def test_every_module_has_its_place_among_the_layers():
    """A wing or a file that the contract in pyproject.toml does not name could import whatever it likes."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = next(c["layers"] for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    here = {
        f"{top}.{entry.stem}"
        for top in ("library", "networks")
        for entry in (ROOT / top).iterdir()
        if (entry.suffix == ".py" and entry.stem != "__init__") or (entry / "__init__.py").is_file()
    }
    assert {name for layer in layers for name in re.split(r" *[|:] *", layer)} == here


def test_the_script_needs_no_tools():
    names = []
    for node in ast.walk(ast.parse((ROOT / "gen_img_diffusers.py").read_text())):
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    assert "library.plan.planning" in names
    assert not [name for name in names if name.split(".")[0] in ("tools", "tests")]


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_every_option_that_code_reads_exists():
    """Options are attributes of any type to the type checker, which cannot tell a misspelt one."""
    known = {*gen_img_diffusers.make_parser().table, *vars(Options), "said"}
    for file in (ROOT / "gen_img_diffusers.py", *sorted(ROOT.glob("library/**/*.py")), *ROOT.glob("networks/*.py")):
        tree = ast.parse(file.read_text())
        read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "options"}
        assert read <= known, (file, read - known)


@pytest.mark.parametrize(
    ("use", "names"),
    [
        (COMPUTING, "ckpt tokenizer_cache_dir network_show_meta control_net_save_guides vae_slices xformers sdpa "
                    "diffusers_xformers lowvram engine compile cuda_graphs opt_channels_last"),
        (CHOICE, "shuffle_prompts seed iter_same_seed images_per_prompt n_iter sequential_file_name image_path "
                 "use_original_file_name file_name mask_path natural_order wildcard_dir sweep"),
        (RUN, "prompt from_file from_pictures interactive no_preview preview_every outdir grid html batch_size "
              "vae_batch_size ray ray_workers ray_cpus ray_ship"),
        (TELLING, "resume dry_run json quiet verbose debug"),
        (COMMAND_LINE, "config list_samplers version h help completion"),
    ],
)  # fmt: skip
def test_only_these_options_do_not_change_how_a_picture_looks(use, names):
    """`--resume` refuses a change of any other: whoever adds an option that it need not compare says so here, too."""
    table = gen_img_diffusers.make_parser().table
    assert {name for name, option in table.items() if option.use is use} == set(names.split())


def test_a_value_of_zero_is_given_where_it_is_not_the_default(sd1, generate):
    alone = generate(sd1.folder, "--prompt", "a", "--ds_timesteps_1", 0)
    assert (alone.status, alone.stderr) == (
        2, "error: --ds_timesteps_1: does nothing by itself; give --ds_depth_1 too\n",
    )  # fmt: skip
    assert generate(sd1.folder, "--prompt", "a --dsd1 none", "--ds_depth_1", 0, "--dry_run").status == 0
    unused = generate(sd1.folder, "--prompt", "a", "--guide_image_path", "x", "--clip_image_guidance_scale", 0)
    assert unused.stderr.startswith("error: --guide_image_path: nothing uses it")


def test_what_options_need_exists():
    table = gen_img_diffusers.make_parser().table
    for name, option in table.items():
        for needs in option.needs:
            assert set(needs.one_of) <= table.keys() - {name}, name


def test_every_option_has_a_record():
    parser = gen_img_diffusers.make_parser()
    assert [action.dest for action in parser._actions] == list(parser.table)


def test_options_for_files_say_so():
    """`--resume` looks at the files that options of pictures name: those whose values stand for files in the help."""
    parser = gen_img_diffusers.make_parser()
    for name, option in parser.table.items():
        is_file = parser.action(name).metavar in ("FILE", "PATH", "MODEL", "VAE")
        assert option.names_files == (is_file and option.use.compared), name


def test_each_of_several_alternatives_is_refused_beside_another(sd1, generate, tmp_path):
    for options, message in (
        (("--fp16", "--bf16"), "--fp16 and --bf16: are two precisions; give one"),
        (("--from_file", "x"), "--prompt and --from_file: are two sources of prompts; give one"),
        (("--highres_fix_scale", 0.5, "--highres_fix_latents_upscaling", "--highres_fix_upscaler", "tools.x"),
         "--highres_fix_latents_upscaling and --highres_fix_upscaler: are two ways of enlarging; give one"),
    ):  # fmt: skip
        result = generate(sd1.folder, "--prompt", "a", *options)
        assert (result.status, result.stderr) == (2, f"error: {message}\n")


# ---------------------------------------------------------------------------------------------------------------------
# Ids of jobs

JOB = Job(
    prompt="a é",
    seed=3,
    raw_prompt="x",
    where="f:1",
    file=Path("/a/b.png"),
    width=512,
    height=640,
    guides=(Path("g.png"),),
    source=Path("s.png"),
    follows=Path("/q/z.png"),
    network_multipliers=(Strength.of(0.5), Strength.of(1.0)),
)
TAG = TagUse(1, Path("a.safetensors"), Strength())
GROWING = {"gradual_latent": GradualLatent(timesteps=750, unsharp=Unsharp(3, 0.5, 0.25))}


def test_ids_are_those_of_the_first_version():
    """Runs that version 0.1.0 began name their pictures so; these two ids are what it gave."""
    assert job_id(JOB) == "0a4d79c2f780f3f357fc3b3d8d2ef4e6"
    shrunk = replace(JOB, **GROWING, deep_shrink=DeepShrink(depth_1=2))
    assert job_id(shrunk) == "eacfa05acb4218b213e782d404c12d6f"


def test_an_id_tells_every_field_that_changes_the_picture():
    changes = {"negative_prompt": "n", "width": 64, "height": 64, "steps": 3, "guidance_scale": 1, "negative_scale": 2}
    changes |= {"strength": 0.5, "network_multipliers": (Strength(),), **GROWING, "deep_shrink": DeepShrink(depth_1=1)}
    changes |= {"clip_prompt": "c", "prompt": "p", "seed": 4, "raw_prompt": "r", "source": None, "stage": 2}
    changes |= {"mask": Path("m"), "regions": Path("r"), "guides": (), "control_net": False}
    changes |= {"prompt_syntax": "webui", "steps_before": 9, "upscale": 2.0}
    changes |= {"sampler": "lms", "schedule": "karras", "timesteps": (9,), "eta": 0.5, "s_churn": 1.0}
    changes |= {"image_guidance": 1.5}
    changes |= {"extend": Margins(0, 0, 8, 0), "boxes": (Box(0, 0, 8, 8),)}
    changes |= {"follows": None, "sizes": ToldSizes(crop_top=1), "tags": (TAG,)}
    not_told = {"file", "file_name", "where"}
    not_told |= {"cell"}  # of a sweep, whose values are told by what they set
    not_told |= {"canvas", "turn"}  # the size of the source, whose content is compared; what is drawn at the moment
    assert set(changes) | not_told == set(Job.__dataclass_fields__)  # a new field belongs here, and into the ids
    for kind, names in run_record._PARTS.items():
        later = {path.rpartition(".")[2] for path in run_record._LATER}
        assert set(names) | later >= set(kind.__dataclass_fields__), kind
    ids = {job_id(replace(JOB, **{name: value})) for name, value in changes.items()}
    assert len(ids | {job_id(JOB)}) == len(changes) + 1
    assert job_id(replace(JOB, file=Path("/c.png"), where="g:2", follows=Path("/other/z.png"))) == job_id(JOB)
    by_part = job_id(replace(JOB, network_multipliers=(Strength(0.5, 0.4), Strength())))
    assert by_part != job_id(JOB)
    tagged = [
        replace(JOB, tags=(tag,))
        for tag in (TAG, replace(TAG, place=0), replace(TAG, file=Path("b")), replace(TAG, strength=Strength.of(0.5)))
    ]
    first, moved, *others = map(job_id, tagged)
    assert first == moved  # its place among the run's networks does not count, its file does
    assert len({first, *others}) == 3


def test_what_pictures_of_a_batch_share_is_in_its_key():
    """A field of a job is either the picture's own in a batch, or jobs that differ in it do not meet in one."""
    own = {
        "prompt",
        "prompt_syntax",
        "steps_before",
        "raw_prompt",
        "seed",
        "file",
        "file_name",
        "where",
        "negative_prompt",
        "clip_prompt",
        "guides",
        "follows",
        "sizes",
    }
    own |= {"canvas", "turn"}  # its source's size; which box is drawn, alike in a batch
    own |= {"control_net", "stage"}  # those of Highres. fix's stages, alike in all pictures of a run
    own |= {"upscale"}  # likewise
    own |= {"cell"}  # of a sweep, for what is shown
    shared = {
        "width": 64,
        "height": 64,
        "steps": 3,
        "strength": 0.5,
        "network_multipliers": (Strength(),),
        "source": None,
    }
    shared |= {"boxes": (Box(0, 0, 8, 8),), "extend": Margins(0, 0, 8, 0)}  # how many; whether there is a mask
    shared |= {"mask": Path("m"), "regions": Path("r"), "deep_shrink": DeepShrink(depth_1=1), **GROWING}
    shared |= {"sampler": "lms", "schedule": "karras", "timesteps": (9,), "eta": 0.5, "s_churn": 1.0}
    shared |= {"tags": (TAG,)}
    # whether there are one, two or three branches
    shared |= {"guidance_scale": 1, "negative_scale": 2, "image_guidance": 1.5}
    assert own | set(shared) == set(Job.__dataclass_fields__)
    for name, value in shared.items():
        assert replace(JOB, **{name: value}).batch_key != JOB.batch_key, name


@pytest.mark.parametrize(("usual", "same"), [(0, True), (1, False)])
def test_a_field_that_is_added_counts_where_it_is_not_as_usual(monkeypatch, usual, same):
    before = job_id(JOB)
    monkeypatch.setattr(run_record, "_FIELDS", tuple(name for name in run_record._FIELDS if name != "stage"))
    without = job_id(JOB)
    assert without != before
    monkeypatch.setattr(run_record, "_LATER", {"stage": usual})
    assert (job_id(JOB) == without) is same
    monkeypatch.setattr(run_record, "_LATER", {"deep_shrink.ratio": 0.5 + usual})
    assert (job_id(JOB) == without) is same
