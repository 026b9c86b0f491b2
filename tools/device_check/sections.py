"""What each part of the report says: a verdict in one line, and tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.device_check.processes import INTERRUPTED, Result
from tools.device_check.tasks import COMPILED, EAGER, FAMILIES, FLOAT32, GRAPHS

GOOD, LOOK, FAILED, NOT_DONE, TRIED = "Good", "Look here", "Failed", "Not done", "Tried"
# For a card of the H100's class, in float16: SD 1.5 at 512², XL at 1024²
STEPS_S = {"sd1": 105, "sdxl": 28}  # of one picture, at least
PICTURES_S = {"sd1": 8}  # of 20 steps, in batches, at least
ALLOCATED_GB = {"sd1": 2.6, "sdxl": 8.5}  # for one picture, at most
_SAME = 0.01  # of a result's length: float16 and bfloat16 round by less
_AS_FAST = 1.05
_UNSEEN = 0.02  # of a picture's time: what runs differ by anyway
_NONE = "–"
_FAILURES = "Failed (the JSON has the tracebacks; what was measured before stands in the table):"


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    verdict: str
    text: str  # beside the verdict, one line
    lines: Sequence[str] = ()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def shown(value: float | None, digits: int = 3) -> str:
    """A number with so many digits that count; a dash for none."""
    if value is None:
        return _NONE
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def section(part: str, results: Sequence[Result], *, tiny: bool) -> Section:
    """What a part's results say."""
    interrupted = [result for result in results if result.error == INTERRUPTED]
    failed = [result for result in results if result.error and result.error != INTERRUPTED]
    errors = [f"- {result.task.name}: {result.error}" for result in failed]
    skipped = [
        f"- {each.task.name}: {each.skipped or INTERRUPTED}" for each in results if each.skipped or each in interrupted
    ]
    if all(result.skipped or (result in interrupted and not result.rows) for result in results):
        return Section(NOT_DONE, "nothing of it was measured, for the reasons below.", skipped)
    found = _SECTIONS[part](results, tiny)
    lines = list(found.lines)
    if errors:
        lines += ["", _FAILURES, *errors]
        if found.verdict != FAILED:
            text = f"{len(errors)} of {len(results)} measurements failed; of the others: {found.text}"
            found = Section(FAILED, text)
    elif interrupted and found.verdict != FAILED:
        found = Section(NOT_DONE, f"interrupted; of what was measured: {found.text}")
    if skipped:
        lines += ["", "Not done:", *skipped]
    return Section(found.verdict, found.text, lines)


# ---------------------------------------------------------------------------------------------------------------------


def _expected(results: Sequence[Result], tiny: bool) -> Section:
    counted = [_counted(result) for result in results if result.rows]
    head = ("computed in", "cases", "as near as must be", "not drawn", "mean difference", "largest", "of the case")
    lines = [
        "Differences are in levels of 255, from pictures that a CPU drew in float32. Float32 must be as near as the",
        "tests want it, 0.2 in the mean. TF32, float16 and bfloat16 round more, and these tiny models make much of it.",
        "",
        *table(head, counted),
    ]
    wrong = [line for result in results for row in result.rows for line in _wrong(row, result.task.variant)]
    lines += ["", *wrong] if wrong else []
    exact = [result.rows for result in results if result.task.variant == FLOAT32 and result.rows]
    if not exact:
        return Section(FAILED, "no case was drawn in float32.", lines)
    if wrong:
        return Section(FAILED, f"{len(wrong)} cases are not as they must be, or were not drawn.", lines)
    return Section(GOOD, f"all {len(exact[0])} cases are the expected pictures in float32.", lines)


def _counted(result: Result) -> list[object]:
    """A row of the table of expected images."""
    drawn = [row for row in result.rows if "mean" in row]
    counts = (len(result.rows), sum(row["allowed"] for row in drawn), len(result.rows) - len(drawn))
    if not drawn:
        return [result.task.variant, *counts, _NONE, _NONE, _NONE]
    worst = max(drawn, key=lambda row: row["mean"])
    average = sum(row["mean"] for row in drawn) / len(drawn)
    return [result.task.variant, *counts, shown(average), shown(worst["mean"]), worst["case"]]


def _wrong(row: dict[str, Any], variant: str) -> list[str]:
    """What is wrong with a case, if anything."""
    if "error" in row:
        return [f"- {row['case']}, {variant}: {row['error']}"]
    if variant != FLOAT32 or row["allowed"]:
        return []
    share = f"{row['within_one']:.1%} of its values within one level"
    return [f"- {row['case']}: {shown(row['mean'])} levels off in the mean, {share}"]


def _attention(results: Sequence[Result], tiny: bool) -> Section:
    (result,) = results
    names = list(dict.fromkeys(name for row in result.rows for name in row["kernels"]))
    apart = [text for row in result.rows for text in _apart(row)]
    slower = [row for row in result.rows if not _sdpa_is_fastest(row)]
    absent = {name: text for row in result.rows for name, text in _unable(row).items()}
    absent |= result.figures.get("missing", {})
    lines = [
        "Milliseconds of one layer for both prompts of one picture. SDPA is what the program takes by itself on a GPU;",
        "flash, plain, efficient and cuDNN are the kernels that PyTorch chooses from.",
        "",
        *table(("head size", "where, attends to", *names), [_times(row, names) for row in result.rows]),
        "",
        *(f"- {name}: {why}" for name, why in absent.items()),
    ]
    if not result.rows or "SDPA" in absent:
        return Section(FAILED, "PyTorch's own attention, SDPA, did not run.", lines)
    if apart:
        return Section(FAILED, f"kernels differ from attention's formula: {'; '.join(apart)}.", lines)
    same = "all kernels give the same" + (", xFormers and SDPA too" if "xFormers" in names else "")
    if tiny:
        return Section(TRIED, f"{same}.", lines)
    if slower:
        text = f"{same}; another kernel is faster than SDPA at {len(slower)} of {len(result.rows)} sizes."
        return Section(LOOK, text, lines)
    return Section(GOOD, f"{same}; SDPA is as fast as any.", lines)


def _times(row: dict[str, Any], names: Sequence[str]) -> list[object]:
    """A row of the table of kernels."""
    return [row["head_size"], row["shape"], *(shown(row["kernels"].get(name, {}).get("ms")) for name in names)]


def _apart(row: dict[str, Any]) -> list[str]:
    """Kernels that give something else at a size, NaN among it."""
    distances = {name: kernel["distance"] for name, kernel in row["kernels"].items() if "distance" in kernel}
    return [f"{name} at {_place(row)}: {far:.2%}" for name, far in distances.items() if not far <= _SAME]


def _sdpa_is_fastest(row: dict[str, Any]) -> bool:
    times = {name: kernel["ms"] for name, kernel in row["kernels"].items() if "ms" in kernel}
    return "SDPA" not in times or times["SDPA"] <= min(times.values()) * _AS_FAST


def _unable(row: dict[str, Any]) -> dict[str, str]:
    """Kernels that do not run at a size, and why."""
    failed = {name: kernel["error"] for name, kernel in row["kernels"].items() if "error" in kernel}
    return {name: f"{error} (at {_place(row)})" for name, error in failed.items()}


def _place(row: dict[str, Any]) -> str:
    return f"head size {row['head_size']}, {row['shape']}"


# ---------------------------------------------------------------------------------------------------------------------


def _speed(results: Sequence[Result], tiny: bool) -> Section:
    measured = sorted((result for result in results if result.rows), key=_by_family)
    head = ("model", "how", "steps/s, one picture", "first two steps, s")
    batched = ("best batch", "its steps/s", "its pictures/s")
    lines = [
        *table((*head, *batched), [_paces(result) for result in measured]),
        "",
        f"A step is of the whole batch and of both prompts; a picture is {3 if tiny else 20} steps, text and VAE. The",
        "first two steps hold what is done once for a size: compiling, capturing graphs. Batches tried, eager:",
        "",
        *table(("model", "batch", "steps/s", "pictures/s", "VAE, s/picture"), _batches_tried(measured)),
    ]
    goals = [*_goals(measured, STEPS_S, "steps/s, one picture", _most_steps)]
    goals += _goals(measured, PICTURES_S, "pictures/s, batched", _most_pictures)
    return _against_goals(goals, lines, tiny, "at least", lambda found, goal: found >= goal)


def _paces(result: Result) -> list[object]:
    """A row of the table of speeds."""
    one, best = _at_one(result), max(result.rows, key=lambda row: row["pictures_s"])
    alone = [shown(one["steps_s"]), shown(one["first_s"])] if one else [_NONE, _NONE]
    batched = [best["batch"], shown(best["steps_s"]), shown(best["pictures_s"])]
    return [FAMILIES[result.task.family], result.task.variant, *alone, *batched]


def _batches_tried(measured: Sequence[Result]) -> list[list[object]]:
    names = ("steps_s", "pictures_s", "vae_s")
    return [
        [FAMILIES[result.task.family], row["batch"], *(shown(row[name]) for name in names)]
        for result in measured
        if result.task.variant == EAGER
        for row in result.rows
    ]


def _by_family(result: Result) -> tuple[int, int]:
    return list(FAMILIES).index(result.task.family), (EAGER, GRAPHS, COMPILED).index(result.task.variant)


def _at_one(result: Result) -> dict[str, Any] | None:
    return next((row for row in result.rows if row["batch"] == 1), None)


def _most_steps(results: Sequence[Result]) -> float | None:
    return max((row["steps_s"] for result in results if (row := _at_one(result))), default=None)


def _most_pictures(results: Sequence[Result]) -> float | None:
    return max((row["pictures_s"] for result in results for row in result.rows), default=None)


def _memory(results: Sequence[Result], tiny: bool) -> Section:
    measured = [result for result in results if result.figures]
    names = ("loading_gb", "allocated_gb", "reserved_gb", "main_gb")
    rows = [
        [FAMILIES[result.task.family], result.task.variant, *(shown(result.figures.get(name)) for name in names)]
        for result in measured
    ]
    head = ("model", "how", "loading", "drawing, allocated", "drawing, reserved", "main memory")
    lines = ["GB at most, one picture. Allocated is what tensors take, reserved what the card is asked for.", ""]
    lines += table(head, rows)
    goals = _goals(measured, ALLOCATED_GB, "GB allocated, plain", _plain_gb)
    return _against_goals(goals, lines, tiny, "at most", lambda found, goal: found <= goal)


def _plain_gb(results: Sequence[Result]) -> float | None:
    plain = (result.figures.get("allocated_gb") for result in results if result.task.variant == "plain")
    return next(plain, None)


Goal = tuple[str, str, float | None, float]  # of which family, what, how much it is, and how much it should be


def _goals(
    results: Sequence[Result],
    wanted: dict[str, float] | dict[str, int],
    what: str,
    found: Callable[[Sequence[Result]], float | None],
) -> list[Goal]:
    return [
        (FAMILIES[family], what, found([result for result in results if result.task.family == family]), goal)
        for family, goal in wanted.items()
    ]


def _against_goals(
    goals: Sequence[Goal], lines: list[str], tiny: bool, limit: str, reached: Callable[[float, float], bool]
) -> Section:
    """A section with targets, which tiny models do not have."""
    if tiny:
        return Section(TRIED, "tiny models have no targets.", lines)
    rows = [[model, what, shown(found), f"{limit} {shown(goal)}"] for model, what, found, goal in goals]
    lines += ["", "Targets for a card of the H100's class, by the best way above:", ""]
    lines += table(("model", "what", "found", "target"), rows)
    missed = [
        f"{model}, {what}: {shown(found)}, target {limit} {shown(goal)}"
        for model, what, found, goal in goals
        if found is None or not reached(found, goal)
    ]
    if missed:
        return Section(LOOK, f"{'; '.join(missed)} (targets are for a card of the H100's class).", lines)
    return Section(GOOD, "every target is reached.", lines)


# ---------------------------------------------------------------------------------------------------------------------


def _start(results: Sequence[Result], tiny: bool) -> Section:
    measured = [result for result in results if result.figures]
    rows = [
        [FAMILIES[result.task.family], shown(result.figures["start_s"]), shown(result.figures["process_s"])]
        for result in measured
    ]
    lines = table(("model", "start to first step, s", "whole run of one picture, two steps, s"), rows)
    text = ", ".join(f"{row[0]} {row[1]} s" for row in rows)
    return Section(TRIED if tiny else GOOD, f"from the program's start to its first step: {text or 'unknown'}.", lines)


def _writing(results: Sequence[Result], tiny: bool) -> Section:
    (result,) = results
    if not result.figures:
        return Section(FAILED, "nothing was measured.")
    found = result.figures
    held_ms, picture_ms, spread_ms = (found[name] for name in ("held_up_ms", "picture_ms", "spread_ms"))
    names = {
        "picture_ms": "a picture of 8 steps, nothing written",
        "held_up_ms": "more when PNGs are written",
        "spread_ms": "by which runs differ anyway",
        "handing_over_ms": "handing a picture over",
    }
    lines = table(("", "ms a picture"), [[title, shown(found[name])] for name, title in names.items()])
    if tiny:
        return Section(TRIED, "tiny pictures say nothing of it.", lines)
    if held_ms <= max(spread_ms, picture_ms * _UNSEEN):
        return Section(
            GOOD, f"writing holds the device up by nothing that shows, {shown(held_ms)} ms a picture.", lines
        )
    text = f"writing takes {shown(held_ms)} ms of a picture's {shown(picture_ms)} ms; it should be 0."
    return Section(LOOK, text, lines)


def _peer(results: Sequence[Result], tiny: bool) -> Section:
    by_name = {(result.task.family, result.task.variant): result.figures for result in results}
    titles = {
        "step_s": "s/step",
        "vae_s": "VAE, s/picture",
        "image_s": "s/picture, model loaded",
        "gpu_gb": "peak GPU memory, GB",
    }
    rows, faster = [], {}
    for family, model in FAMILIES.items():
        program, diffusers = (by_name.get((family, variant), {}) for variant in ("this program", "diffusers"))
        for name, title in titles.items():
            if name in program or name in diffusers:
                pair = (program.get(name), diffusers.get(name))
                ratio = pair[0] / pair[1] if pair[0] and pair[1] else None
                rows.append([model, title, *map(shown, pair), shown(ratio)])
                faster |= {model: 1 / ratio} if name == "image_s" and ratio else {}
    lines = ["One picture, 20 steps of DDIM; both as they are set up by default.", ""]
    lines += table(("model", "", "this program", "diffusers", "ratio"), rows)
    text = "; ".join(f"{model}: {shown(times)} times as many pictures a second" for model, times in faster.items())
    if tiny or not faster:
        return Section(TRIED, "tiny models say nothing of speed." if tiny else "there is nothing to compare.", lines)
    return Section(GOOD if min(faster.values()) >= 1 else LOOK, f"{text} as diffusers.", lines)


_SECTIONS: dict[str, Callable[[Sequence[Result], bool], Section]] = {
    "expected": _expected,
    "attention": _attention,
    "speed": _speed,
    "memory": _memory,
    "start": _start,
    "writing": _writing,
    "peer": _peer,
}
