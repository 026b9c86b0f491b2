"""What the demo's training scripts share: the loop, learning rates, average of the weights, checkpoints, a log."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch

Model = TypeVar("Model", bound=torch.nn.Module)
Rate = Callable[[int], float]  # step → learning rate


def cosine(steps: int, peak: float, warmup: int = 100) -> Rate:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""

    def rate(step: int) -> float:
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        return peak * min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * max(0.0, share))))

    return rate


def plateau(steps: int, peak: float, warmup: int = 200, fall: float = 0.3) -> Rate:
    """Linear warm-up, a plateau, and a linear fall to zero in the last `fall` of the steps.

    Unlike a cosine it lets a run grow longer or end early: only the fall depends on `steps` (Hägele et al. 2024).
    """
    return lambda step: peak * min(1.0, (step + 1) / warmup, (steps - step) / (fall * steps))


def descend(
    optimizer: torch.optim.Optimizer,
    gradients: Callable[[int], float],
    log: Log,
    rate: Rate,
    steps: range,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Minimise: `gradients(step)` leaves the parameters' gradients behind and returns the loss."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    recent = None
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = gradients(step)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = loss if recent is None else recent + 0.05 * (loss - recent)
        if step % 50 == 0 or step == steps[-1]:
            log.write(step=step, loss=recent)
        after(step)


class Average(Generic[Model]):
    """Exponential moving average of a module's weights, with a start that forgets quickly."""

    def __init__(self, module: Model, decay: float):
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: Model) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(list(self.module.parameters()), [p.detach() for p in module.parameters()], 1 - decay)


class Run(Generic[Model]):
    """A long training that an interruption does not end: model, average of its weights, optimizer, log in one file."""

    def __init__(self, path: Path, model: Model, optimizer: torch.optim.Optimizer, decay: float):
        self.path, self.model, self.optimizer = path, model, optimizer
        self.average, self.log, self.start = Average(model, decay), Log(path.with_suffix(".jsonl")), 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
            self.average.module.load_state_dict(state["average"])
            optimizer.load_state_dict(state["optimizer"])
            self.start, self.log.spent = state["step"], state["cpu_hours"]
            self.average.updates = self.start

    def after(self, step: int) -> None:
        """Update the average, and now and then the checkpoint."""
        self.average.update(self.model)
        if step % 100 == 99:
            self.save(step + 1)

    def save(self, step: int) -> None:
        save_checkpoint(
            self.path,
            {
                "model": self.model.state_dict(),
                "average": self.average.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": step,
                "cpu_hours": self.log.cpu_hours(),
            },
        )


def save_checkpoint(path: Path, state: dict) -> None:
    """Write beside the old checkpoint, then replace it: an interruption loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


class Log:
    """Training log, one JSON object a line; `cpu_hours` counts this process's processor time."""

    def __init__(self, path: Path):
        self.path, self.spent = path, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def cpu_hours(self) -> float:
        return self.spent + time.process_time() / 3600

    def write(self, **values) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({**rounded, "cpu_hours": round(self.cpu_hours(), 3)})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
