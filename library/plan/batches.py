"""Filling batches with jobs that can be drawn together."""

from collections.abc import Callable, Iterable

from library.plan.job import Job


def group_into_batches(jobs: Iterable[Job], batch_size: int, key: Callable[[Job], object]) -> list[list[Job]]:
    """Fill batches with jobs of equal key from anywhere in the run; batches are in the order of their first job."""
    batches: list[list[Job]] = []
    filling: dict[object, list[Job]] = {}
    for job in jobs:
        job_key = key(job)
        batch = filling.get(job_key)
        if batch is None or len(batch) == batch_size:
            batch = filling[job_key] = []
            batches.append(batch)
        batch.append(job)
    return batches
