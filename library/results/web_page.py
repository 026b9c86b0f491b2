"""A run as a web page: every picture with its settings and the command that makes it again."""

import html
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from library.plan.job import Job, JobSettings
from library.plan.line_text import prompt_line
from library.results import sweep_page
from library.results.made_picture import MadePicture
from library.results.sweep_tables import PromptTables
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


def make_page(
    pictures: Sequence[MadePicture], title: str, command: Command, mark: str, sweep: Sequence[PromptTables] = ()
) -> str:
    """A page that needs nothing but the picture files beside it; they are loaded as they are scrolled to.

    Args:
        pictures: in the order of the page.
        title: of the page.
        command: makes a picture again.
        mark: what tells the page of this run from others.
        sweep: the pictures as the tables that they are shown in; none for one after the other.
    """
    style, script = (_STYLE + sweep_page.STYLE, sweep_page.SCRIPT) if sweep else (_STYLE, _SCRIPT)
    return "".join(
        [
            "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>",
            f'<meta name=generator content="{html.escape(mark)}">',
            "<meta name=viewport content='width=device-width'>",
            f"<title>{html.escape(title)}</title><style>{style}</style></head>\n<body><header>",
            f"<h1>{html.escape(title)}</h1>",
            f"<label>Show <output>{len(pictures)}</output> of {len(pictures)} pictures with the words ",
            f"<input type=search autofocus></label>{sweep_page.BAR if sweep else ''}</header>",
            *(_tables(sweep, command) if sweep else _figures(pictures, command)),
            f"</main>{sweep_page.DIALOG if sweep else ''}<script>{script}</script></body></html>\n",
        ]
    )


def _figures(pictures: Iterable[MadePicture], command: Command) -> Iterator[str]:
    yield "<main>\n"
    for picture in pictures:
        yield f"<figure>{_link(picture)}<figcaption>{_about(picture, command)}</figcaption></figure>\n"


def _tables(sweep: Iterable[PromptTables], command: Command) -> Iterator[str]:
    yield "<main class=sweep>\n"
    yield from sweep_page.sections(sweep, lambda picture: _cell(picture, command))


def _cell(picture: MadePicture, command: Command) -> str:
    """A picture in a sweep's table; what is told of it is shown with the enlarged picture."""
    values = picture.job.cell.values if picture.job.cell else ()
    shown = "".join(f"<p>{html.escape(name)}: {html.escape(value)}</p>" for name, value in values)
    label = ", ".join(f"{name}: {value}" for name, value in values)
    return f"{_link(picture, label)}<div class=about>{shown}{_about(picture, command)}</div>"


def _link(picture: MadePicture, label: str = "") -> str:
    """A picture as the link to its file."""
    address, (width, height) = quote(os.fsencode(picture.file.name)), picture.job.file_size
    return (
        f'<a href="{address}"><img loading=lazy width={width} height={height} '
        f'src="{address}" alt="{html.escape(label or picture.job.prompt)}"></a>'
    )


def _about(picture: MadePicture, command: Command) -> str:
    """Its prompts, its settings, and the command that makes it again."""
    job = picture.job
    rows = "".join(f"<dt>{html.escape(n)}<dd>{html.escape(v)}" for n, v in picture.settings.items())
    negative = f"<p>− {html.escape(job.negative_prompt)}</p>" if job.negative_prompt else ""
    return (
        f"<p>{html.escape(job.prompt)}</p>{negative}<dl>{rows}</dl><details><summary>Command</summary>"
        f"<pre>{html.escape(command.for_job(job))}</pre></details>"
    )
