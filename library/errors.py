"""What went wrong, as types: each carries the exit status that the shell sees."""

from collections.abc import Sequence


class ProgramError(Exception):
    """A failure with one line for the user: `SUBJECT (WHERE): what is wrong; what to do`."""

    exit_status = 1

    def __init__(self, subject: str, problem: str, where: str = "") -> None:
        super().__init__(f"{subject} ({where}): {problem}" if where else f"{subject}: {problem}")

    def __reduce__(self) -> tuple[object, ...]:
        """As other processes are sent it."""
        return _again, (type(self), str(self)), vars(self)


def _again(kind: type[ProgramError], text: str) -> ProgramError:
    problem = kind.__new__(kind)
    Exception.__init__(problem, text)
    return problem


class InputError(ProgramError):
    """An option, prompt line or file that cannot be used."""

    exit_status = 2


class InputErrors(InputError):
    """Several of them, found together; of very many the first ones."""

    _SHOWN = 20

    def __init__(self, problems: Sequence[InputError]) -> None:
        self.problems = list(problems[: self._SHOWN])
        if more := len(problems) - len(self.problems):
            self.problems.append(InputError(f"{more} more", "lines have faults, too; mend these first"))
        Exception.__init__(self, "; ".join(map(str, self.problems)))


class EnvironmentFault(ProgramError):
    """The machine does not let the run go on: a full disk, a folder taken away, a device that failed."""

    exit_status = 4


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, noticed between two batches or, the second time, at once."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.exit_status = 128 + signal_number
