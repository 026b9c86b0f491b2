"""A run as a web page: every picture with its settings and the command that makes it again."""

import html
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from library.plan.job import Job, JobSettings
from library.plan.line_text import prompt_line
from library.results.made_picture import MadePicture
from library.settings.options import Said
from library.texts import shell_word

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
class Command:
    """What the command for one of a run's pictures is made of.

    Args:
        said: the run's options, those that a command for one picture has, too.
        defaults: the run's settings for its prompt lines.
        size_px: see `plan.line_text.prompt_line`.
    """

    said: Said
    defaults: JobSettings
    size_px: int

    def for_job(self, job: Job) -> str:
        """The command line that makes a job's picture again."""
        words = ["python", "gen_img_diffusers.py"]
        given = dict(self.said)
        mask = job.regions if "mask_from_alpha" in given else job.mask or job.regions
        for name, path in (("image_path", job.source), ("mask_path", mask)):
            if path is not None:
                given[name] = str(path)
        for name, value in given.items():
            if isinstance(value, bool):
                words.append(f"--{name}")
            else:
                words += [f"--{name}", *(value if isinstance(value, list) else [value])]
        words += ["--prompt", prompt_line(job, self.defaults, self.size_px)]
        return " ".join(map(shell_word, words))


def make_page(pictures: Sequence[MadePicture], title: str, command: Command, mark: str) -> str:
    """A page that needs nothing but the picture files beside it; they are loaded as they are scrolled to.

    Args:
        pictures: in the order of the page.
        title: of the page.
        command: makes a picture again.
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
            *_figures(pictures, command),
            f"</main><script>{_SCRIPT}</script></body></html>\n",
        ]
    )


def _figures(pictures: Iterable[MadePicture], command: Command) -> Iterable[str]:
    for picture in pictures:
        job, address = picture.job, quote(os.fsencode(picture.file.name))
        width, height = job.file_size
        rows = "".join(f"<dt>{html.escape(n)}<dd>{html.escape(v)}" for n, v in picture.settings.items())
        negative = f"<p>− {html.escape(job.negative_prompt)}</p>" if job.negative_prompt else ""
        yield (
            f'<figure><a href="{address}"><img loading=lazy width={width} height={height} '
            f'src="{address}" alt="{html.escape(job.prompt)}"></a><figcaption><p>{html.escape(job.prompt)}</p>'
            f"{negative}<dl>{rows}</dl><details><summary>Command</summary>"
            f"<pre>{html.escape(command.for_job(job))}</pre></details></figcaption></figure>\n"
        )
