"""Errors that a user can cause. Each message contains the value, the rule that the value breaks and a fix."""


class _ProblemsError(Exception):
    """Base class of errors that report one or more problems.

    Args:
        problems: one message per problem.
    """

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__(problems[0] if len(problems) == 1 else "\n".join(f"- {problem}" for problem in problems))


class ConfigError(_ProblemsError, ValueError):
    """A setting or a combination of settings is invalid. Raised before anything is launched or written."""


class DataError(ValueError):
    """A text, tokenizer or indexed dataset is missing, empty or damaged, or does not match the others."""


class DamagedFileError(DataError):
    """A file of an output directory does not have the content that was written.

    Args:
        path: path of the damaged file.
        fault: verb phrase that describes the damage, e.g. "is empty".
        way_out: sentence that states what the user can do.
    """

    def __init__(self, path: object, fault: str, way_out: str):
        self.fault = fault
        super().__init__(f"{path} {fault}. {way_out}")


class CheckpointError(_ProblemsError, RuntimeError):
    """A Hugging Face or Megatron checkpoint is missing or damaged, belongs to another run or model, or already exists."""


class OutputError(_ProblemsError, OSError):
    """A file or directory cannot be written: the disk is full or read-only, or a permission is missing. The class derives from OSError, so
    that code which can continue without the file needs to catch only OSError."""


class BackendUnavailableError(RuntimeError):
    """The run needs a GPU, a kernel library or an optional package that this machine does not have."""


class TrainingError(RuntimeError):
    """A training step has an invalid loss or invalid gradients, and training must not continue."""


class RunInterrupted(BaseException):
    """A signal stopped the run at a point from which the same command resumes it. The class derives from BaseException, like
    KeyboardInterrupt, so that `except Exception` does not catch it."""


USER_ERRORS = (ConfigError, DataError, CheckpointError, OutputError, BackendUnavailableError, TrainingError)

# Exit statuses of a run, in addition to 0 (success) and 1 (any other exception)
EXIT_INTERRUPTED = 1  # Ctrl-C
EXIT_USER_ERROR = 2
EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: try again
