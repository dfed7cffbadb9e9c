"""Errors that a user can cause. Each message quotes the value, states the rule it breaks and gives a way out."""


class _ProblemsError(Exception):
    """One or more problems, each described in a sentence or two."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__(problems[0] if len(problems) == 1 else "\n".join(f"- {problem}" for problem in problems))


class ConfigError(_ProblemsError, ValueError):
    """An invalid setting or combination of settings. Raised before anything is launched or written."""


class DataError(ValueError):
    """A text, tokenizer or indexed dataset that is missing, empty or damaged, or that does not match the others."""


class DamagedFileError(DataError):
    """A file of an output directory that does not have the content that was written.

    Args:
        path: the file.
        fault: what is wrong with it, as a verb phrase.
        way_out: what the user can do, as a sentence.
    """

    def __init__(self, path: object, fault: str, way_out: str):
        self.fault = fault
        super().__init__(f"{path} {fault}. {way_out}")


class CheckpointError(_ProblemsError, RuntimeError):
    """A Hugging Face or Megatron checkpoint that is missing, damaged, of another run or model, or already there."""


class OutputError(_ProblemsError, OSError):
    """A file or directory that cannot be written: the disk is full or read-only, or a permission is missing. It is an OSError, so that code
    that can do without the file catches it as one."""


class BackendUnavailableError(RuntimeError):
    """The run needs a GPU, a kernel library or an optional package that this machine does not have."""


class TrainingError(RuntimeError):
    """A training step with invalid loss or gradients, after which training must not continue."""


class RunInterrupted(BaseException):
    """The run stopped after a signal, at a point from which the same command resumes. Like KeyboardInterrupt, `except Exception` does not
    catch it."""


USER_ERRORS = (ConfigError, DataError, CheckpointError, OutputError, BackendUnavailableError, TrainingError)

# Exit statuses of a run, in addition to 0 and Python's 1
EXIT_INTERRUPTED = 1  # Ctrl-C
EXIT_USER_ERROR = 2
EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: try again
