"""Turn the figures of `evaluate` and `evaluate_companions` and the training logs into the page of results.

python -m tools.demo.report --model examples/shapes --logs tools/demo/logs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

DONE = {
    "vae": "autoencoder",
    "unet": "U-Net and text encoder",
    "lora_dotted": "LoRA `dotted`",
    "lora_dipped": "LoRA `dipped`",
    "embedding": "textual inversion `zorb`",
    "control_net": "ControlNet",
    "clip": "CLIP",
}


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("–" if c is None else str(c) for c in line) + " |" for line in lines) + "\n"


def drawing_table(results: dict) -> str:
    """Rows of `evaluate`: percentages of pictures in which the judge finds each thing right."""
    keys = ["pictures", "ground", "colour", "shape", "place", "all"]
    return table(["captions", *keys], [[name, *(row[k] for k in keys)] for name, row in results.items()])


def companions_table(results: dict) -> str:
    return table(
        ["companion", "figures"],
        [[name, ", ".join(f"{k}: {v}" for k, v in row.items())] for name, row in results.items()],
    )


def training_table(logs: Path) -> str:
    """Steps and processor hours of each training, from its log's last line."""
    rows = []
    for stem, name in DONE.items():
        if (path := logs / f"{stem}.jsonl").exists():
            last = json.loads(path.read_text().splitlines()[-1])
            rows.append([name, last["step"] + 1, f"{last['cpu_hours']:.2f}"])
    return table(["training", "steps", "processor hours"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    args = parser.parse_args()
    parts = [
        "# What the demo model can do\n",
        "Fresh captions (a seed not used in training), 20 steps, scale 5, DDIM where no sampler is named, judged "
        "from the pixels by `tools/demo/judge.py`. Numbers are percentages of the pictures in which the thing asked "
        'for is right; "all" asks for everything at once, with two objects for both.\n',
    ]
    for file, make in (("results.json", drawing_table), ("companions.json", companions_table)):
        if (path := args.model / file).exists():
            parts.append(make(json.loads(path.read_text())))
    parts += ["## Training\n", training_table(args.logs)]
    (args.model / "RESULTS.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
