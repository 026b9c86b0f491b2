"""The part of a run's page that shows a sweep: tables that can be turned, enlarged, searched and gone through by keys.

Without scripts the tables stand as they are, and each picture is a link to its file.
"""

import html
from collections.abc import Callable, Iterable, Iterator

from library.results.made_picture import MadePicture
from library.results.sweep_tables import PromptTables, Table

STYLE = """
.bar { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center }
.bar button, dialog button { font: inherit; padding: .2rem .7rem }
.bar input[type=range] { width: 9rem; vertical-align: middle; padding: 0 }
main.sweep { display: block }
main.sweep h2 { font-size: 1rem; overflow-wrap: anywhere }
.scroll { overflow-x: auto; container-type: inline-size; margin: 0 0 1rem }
table { border-collapse: collapse; table-layout: fixed; width: 0; --label: min(6rem, 20cqw);
  --cell: calc(var(--zoom, 1) * clamp(1.5rem, (100cqw - var(--label)) / var(--across), 12rem)) }
caption { text-align: start; font-weight: bold; overflow-wrap: anywhere }
th { font-weight: normal; font-size: .85rem; text-align: start; vertical-align: top; overflow-wrap: anywhere }
th, td { padding: 2px; box-sizing: border-box; width: var(--cell) }
tbody th, thead td { width: var(--label); position: sticky; left: 0; background: Canvas; font-size: .85rem }
thead td { color: GrayText; overflow-wrap: anywhere }
td a { display: block; scroll-margin: 9rem .5rem 1rem var(--label) }
.scroll:focus-visible { outline: 3px solid Highlight; outline-offset: -3px }
td a:focus-visible { outline: 4px solid Highlight; box-shadow: 0 0 0 8px Canvas; position: relative }
.about { display: none }
.apart { visibility: hidden }
dialog { box-sizing: border-box; width: min(96vw, 70rem); max-width: 96vw; max-height: 96vh; overflow: auto }
dialog .about { display: block }
dialog img { max-height: 75vh; object-fit: contain; background: none }
"""

SCRIPT = """
const root = document.documentElement, size = document.querySelector('[name=size]');
const search = document.querySelector('[type=search]'), shown = document.querySelector('output');
const view = document.querySelector('dialog'), said = view.querySelector('.said');
const tables = [...document.querySelectorAll('table')].map(table => {
  const lines = [...table.tBodies[0].rows];
  return {
    table, section: table.closest('section'),
    columns: [...table.tHead.rows[0].cells].slice(1), rows: lines.map(line => line.cells[0]),
    cells: lines.map(line => [...line.cells].slice(1)),
  };
});
let turned = false, open = null;
const text = cell => cell.textContent.toLowerCase();

function layOut() {
  const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let count = 0;
  for (const {table, columns, rows, cells} of tables) {
    const fits = cells.map(line => line.map(cell => cell.querySelector('a') !== null
      && words.every(word => text(cell).includes(word))));
    fits.forEach(line => line.forEach(fit => count += fit));
    cells.forEach((line, r) => line.forEach((cell, c) => cell.classList.toggle('apart', !fits[r][c])));
    let across = columns.map((_, c) => c), down = rows.map((_, r) => r);
    if (words.length) {
      across = across.filter(c => fits.some(line => line[c]));
      down = down.filter(r => fits[r].some(Boolean));
    }
    const corner = table.tHead.rows[0].cells[0];
    table.style.setProperty('--across', (turned ? down : across).length);
    const [toRight, toBottom] = turned ? [corner.dataset.rows, corner.dataset.columns]
      : [corner.dataset.columns, corner.dataset.rows];
    corner.textContent = [toBottom && `${toBottom} ↓`, toRight && `${toRight} →`].filter(Boolean).join(' ');
    const [above, beside, outer, inner] = turned ? [rows, columns, across, down] : [columns, rows, down, across];
    const cellAt = (o, i) => turned ? cells[i][o] : cells[o][i];
    above.forEach(label => label.scope = 'col');
    beside.forEach(label => label.scope = 'row');
    table.tHead.rows[0].replaceChildren(corner, ...inner.map(i => above[i]));
    table.tBodies[0].replaceChildren(...outer.map(o => {
      const line = document.createElement('tr');
      line.append(beside[o], ...inner.map(i => cellAt(o, i)));
      return line;
    }));
    table.parentElement.hidden = !outer.length;
  }
  for (const section of document.querySelectorAll('section')) {
    section.hidden = [...section.querySelectorAll('.scroll')].every(part => part.hidden);
  }
  shown.textContent = count;
}

// the picture next to another, by rows and columns as they stand; the last picture of a table is followed by the next
function beside(link, key) {
  const cell = link.closest('td'), line = cell.parentElement, body = line.parentElement;
  const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[key];
  let r = [...body.rows].indexOf(line), c = cell.cellIndex;
  for (;;) {
    r += step[0];
    c += step[1];
    const next = body.rows[r] && c > 0 ? body.rows[r].cells[c] : null;
    if (!next) break;
    if (!next.classList.contains('apart')) return next.querySelector('a');
  }
  if (!step[0]) return null;
  const all = [...document.querySelectorAll('td:not(.apart) > a')].filter(each => each.offsetParent);
  const others = all.filter(each => each.closest('table') !== body.parentElement
    && (step[0] > 0) === Boolean(link.compareDocumentPosition(each) & Node.DOCUMENT_POSITION_FOLLOWING));
  return (step[0] > 0 ? others[0] : others[others.length - 1]) || null;
}

function show(link) {
  open = link;
  const cell = link.closest('td'), picture = link.querySelector('img').cloneNode();
  picture.loading = 'eager';
  said.replaceChildren(picture, cell.querySelector('.about').cloneNode(true));
  if (!view.open) view.showModal();
}

document.querySelector('main').addEventListener('click', event => {
  const link = event.target.closest('td a');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(link);
});
document.addEventListener('keydown', event => {
  if (!event.key.startsWith('Arrow') || event.altKey || event.ctrlKey || event.metaKey) return;
  const from = view.open ? open : document.activeElement.closest('td a');
  const to = from && beside(from, event.key);
  if (!from) return;
  event.preventDefault();
  if (to && view.open) show(to);
  else if (to) to.focus();
});
view.addEventListener('close', () => open && open.focus());
document.querySelector('[name=turn]').addEventListener('click', event => {
  turned = !turned;
  event.currentTarget.setAttribute('aria-pressed', turned);
  layOut();
});
size.addEventListener('input', () => root.style.setProperty('--zoom', size.value / 100));
search.addEventListener('input', layOut);
layOut();
"""

BAR = (
    "<span class=bar><button type=button name=turn aria-pressed=false>Swap rows and columns</button>"
    "<label>Size <input type=range name=size min=50 max=800 step=10 value=100></label>"
    "<span>Arrow keys go from picture to picture, Enter enlarges, Esc goes back.</span></span>"
)
DIALOG = "<dialog aria-label=Picture><form method=dialog><button>Back</button></form><div class=said></div></dialog>"


def sections(prompts: Iterable[PromptTables], about: Callable[[MadePicture], str]) -> Iterator[str]:
    """The tables of each prompt, as HTML.

    Args:
        prompts: with their tables.
        about: what is told of a picture, as HTML.
    """
    for prompt in prompts:
        seed = f" <small>seed: {prompt.seed}</small>" if prompt.seed else ""
        yield f"<section><h2>{html.escape(prompt.line)}{seed}</h2>\n"
        for table in prompt.tables:
            yield from _table(table, about)
        yield "</section>\n"


def _table(table: Table, about: Callable[[MadePicture], str]) -> Iterator[str]:
    name = html.escape(table.heading or "table of pictures")
    across, axes = len(table.column_labels), [html.escape(axis) for axis in (table.row_axis, table.column_axis)]
    yield f'<div class=scroll tabindex=0 role=region aria-label="{name}"><table style="--across: {across}">'
    if table.heading:
        yield f"<caption>{html.escape(table.heading)}</caption>"
    yield f'<thead><tr><td data-rows="{axes[0]}" data-columns="{axes[1]}">{" / ".join(filter(None, axes))}</td>'
    yield from (f"<th scope=col>{html.escape(label)}</th>" for label in table.column_labels)
    yield "</tr></thead><tbody>\n"
    for label, row in zip(table.row_labels, table.rows):
        yield f"<tr><th scope=row>{html.escape(label)}</th>"
        for picture in row:
            yield "<td></td>" if picture is None else f"<td>{about(picture)}</td>"
        yield "</tr>\n"
    yield "</tbody></table></div>\n"
