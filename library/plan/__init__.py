"""From prompt lines and options to jobs, batches and names: all that a run will do, without torch."""
