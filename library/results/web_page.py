"""A run as a web page: every picture with its settings and the command that makes it again."""

import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from library.plan.config import Said
from library.plan.jobs import Job, JobSettings
from library.run.report import prompt_line

# Options that choose pictures among others, or say where they go: a command for one picture has no use for them
_NOT_FOR_ONE = {
    *("prompt", "from_file", "interactive", "no_preview", "seed", "iter_same_seed", "shuffle_prompts", "n_iter"),
    *("images_per_prompt", "image_path", "mask_path", "sequential_file_name", "use_original_file_name", "outdir"),
    *(
        "batch_size",
        "vae_batch_size",
        "config",
        "resume",
        "dry_run",
        "json",
        "quiet",
        "verbose",
        "debug",
        "html",
        "grid",
    ),
}

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }
body { margin: 1rem; max-width: 110rem }
header { position: sticky; top: 0; background: Canvas; padding: .5rem 0; z-index: 1 }
input { font: inherit; width: min(40rem, 90%); padding: .3rem }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
figure { margin: 0; padding: .5rem; border: 1px solid #8884; border-radius: .4rem; content-visibility: auto;
  contain-intrinsic-size: auto 30rem }
img { width: 100%; height: auto; display: block; background: #8882 }
p, pre { overflow-wrap: anywhere; margin: .4rem 0 }
pre { white-space: pre-wrap; font-size: .8rem; user-select: all }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .6rem; margin: .4rem 0; font-size: .85rem }
dt { opacity: .7 } dd { margin: 0; overflow-wrap: anywhere }
.hidden { display: none }
"""
_SCRIPT = """
const search = document.querySelector('input'), shown = document.querySelector('output');
const figures = [...document.querySelectorAll('figure')];
search.addEventListener('input', () => {
  const words = search.value.toLowerCase().split(/\\s+/);
  let count = 0;
  for (const figure of figures) {
    const text = figure.textContent.toLowerCase();
    const fits = words.every(word => text.includes(word));
    figure.classList.toggle('hidden', !fits);
    count += fits;
  }
  shown.textContent = count;
});
"""


@dataclass(frozen=True)
class MadePicture:
    """A picture of a run and the file it became."""

    job: Job
    file: Path
    settings: Mapping[str, str]  # to show, by name


def remake_command(job: Job, said: Said, defaults: JobSettings) -> str:
    """The command line that makes a job's picture again."""
    words = ["python", "gen_img_diffusers.py"]
    given = {name: value for name, value in said.items() if name not in _NOT_FOR_ONE}
    for name, path in (("image_path", job.source), ("mask_path", job.mask or job.regions)):
        if path is not None:
            given[name] = str(path)
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(f"--{name}")
        else:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--prompt", prompt_line(job, defaults)])


def make_page(pictures: Sequence[MadePicture], title: str, said: Said, defaults: JobSettings, mark: str) -> str:
    """A page that needs nothing but the picture files beside it; they are loaded as they are scrolled to.

    Args:
        pictures: in the order of the page.
        title: of the page.
        said: the run's options, for the commands.
        defaults: the run's settings, for the commands.
        mark: what tells the page of this run from others.
    """
    return "".join(
        [
            "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>",
            f'<meta name=generator content="{html.escape(mark)}">',
            "<meta name=viewport content='width=device-width'>",
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body><header>",
            f"<h1>{html.escape(title)}</h1>",
            f"<label>Show <output>{len(pictures)}</output> of {len(pictures)} pictures with the words ",
            "<input type=search autofocus></label></header><main>\n",
            *_figures(pictures, said, defaults),
            f"</main><script>{_SCRIPT}</script></body></html>\n",
        ]
    )


def _figures(pictures: Iterable[MadePicture], said: Said, defaults: JobSettings) -> Iterable[str]:
    for picture in pictures:
        job, name = picture.job, picture.file.name
        rows = "".join(f"<dt>{html.escape(n)}<dd>{html.escape(v)}" for n, v in picture.settings.items())
        negative = f"<p>− {html.escape(job.negative_prompt)}</p>" if job.negative_prompt else ""
        yield (
            f'<figure><a href="{quote(name)}"><img loading=lazy width={job.width} height={job.height} '
            f'src="{quote(name)}" alt="{html.escape(job.prompt)}"></a><figcaption><p>{html.escape(job.prompt)}</p>'
            f"{negative}<dl>{rows}</dl><details><summary>Command</summary>"
            f"<pre>{html.escape(remake_command(job, said, defaults))}</pre></details></figcaption></figure>\n"
        )
