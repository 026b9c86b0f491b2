"""What went wrong, as types: each carries the exit status that the shell sees."""


class ProgramError(Exception):
    """A failure with one line for the user: `SUBJECT (WHERE): what is wrong; what to do`."""

    exit_status = 1

    def __init__(self, subject: str, problem: str, where: str = "") -> None:
        super().__init__(f"{subject} ({where}): {problem}" if where else f"{subject}: {problem}")


class InputError(ProgramError):
    """An option, prompt line or file that cannot be used."""

    exit_status = 2


class EnvironmentFault(ProgramError):
    """The machine does not let the run go on: a full disk, a folder taken away, a device that failed."""

    exit_status = 4


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, noticed between two batches or, the second time, at once."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.exit_status = 128 + signal_number
