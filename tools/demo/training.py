"""What the demo's training scripts share: learning rate, average of the weights, checkpoints, a log."""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path

import torch


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


class Average:
    """Exponential moving average of a module's weights, with a start that forgets quickly."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.998):
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(list(self.module.parameters()), [p.detach() for p in module.parameters()], 1 - decay)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write beside the old checkpoint, then replace it: an interruption loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


class Log:
    """Training log, one JSON object a line; `cpu_hours` counts this process's processor time."""

    def __init__(self, path: Path, spent: float = 0.0):
        self.path, self.spent = path, spent
        path.parent.mkdir(parents=True, exist_ok=True)

    def cpu_hours(self) -> float:
        return self.spent + time.process_time() / 3600

    def write(self, **values) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({**rounded, "cpu_hours": round(self.cpu_hours(), 3)})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
