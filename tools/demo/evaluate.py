"""Draw fresh captions and let the judge say how many are right.

python -m tools.demo.evaluate --model examples/shapes --captions 200 --out results.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tools.demo.drawing import SAMPLERS, Drawer
from tools.demo.judge import Verdict, judge
from tools.demo.scenes import Caption, Scene, caption, draw_scene

FRESH_SEED = 20_000  # not used in training


def fresh(
    count: int, seed: int, things: int | None = None, combinations: str = "all", size: tuple[int, int] = (128, 128)
) -> list[tuple[Scene, Caption]]:
    rng = random.Random(f"fresh {seed}")
    scenes = [draw_scene(rng, things, combinations, size) for _ in range(count)]
    return [(scene, caption(rng, scene)) for scene in scenes]


def draw_all(drawer: Drawer, tasks: list[tuple[Scene, Caption]], batch: int = 25, **options) -> list[np.ndarray]:
    """Draw each task's caption with its number as the seed."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(tasks), batch):
        texts = [c.text for _, c in tasks[start : start + batch]]
        pictures += list(drawer.draw(texts, list(range(start, start + len(texts))), **options))
    return pictures


def share(values: Sequence[bool | None]) -> float | None:
    """Share of True among those that were asked, in percent."""
    asked = [v for v in values if v is not None]
    return round(100 * sum(asked) / len(asked), 1) if asked else None


def summary(verdicts: list[Verdict]) -> dict:
    return {
        "pictures": len(verdicts),
        "ground": share([v.ground for v in verdicts]),
        "colour": share([v.colours for v in verdicts]),
        "shape": share([v.shapes for v in verdicts]),
        "place": share([v.places for v in verdicts]),
        "all": share([v.right for v in verdicts]),
    }


def measure(drawer: Drawer, tasks: list[tuple[Scene, Caption]], **options) -> dict:
    """Percentages over all tasks, those of one object, of two, and of combinations kept out of training."""
    pictures = draw_all(drawer, tasks, **options)
    return summary([judge(p, scene, said) for p, (scene, said) in zip(pictures, tasks)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=FRESH_SEED)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--samplers", action="store_true", help="also every sampler, a fifth as many captions each")
    args = parser.parse_args()
    drawer, count = Drawer.load(args.model), args.captions
    results = {
        "one object": measure(drawer, fresh(round(count * 0.65), args.seed, 1)),
        "two objects": measure(drawer, fresh(round(count * 0.35), args.seed + 1, 2)),
        "held out, one object": measure(drawer, fresh(count // 5, args.seed + 2, 1, "held out")),
    }
    for width, height in ((128, 192), (192, 128)):
        tasks = fresh(count // 5, args.seed + 3, 1, size=(width, height))
        results[f"{width}x{height}"] = measure(drawer, tasks, size=(width, height))
    if args.samplers:
        tasks = fresh(count // 5, args.seed + 4, 1)
        results |= {f"sampler {name}": measure(drawer, tasks, sampler=name) for name in SAMPLERS}
    print(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
