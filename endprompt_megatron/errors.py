"""The errors a user can meet. Each message quotes the value, the rule it breaks and the way out."""


class _ProblemsError(Exception):
    """One problem or several, each in a sentence or two."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__(problems[0] if len(problems) == 1 else "\n".join(f"- {problem}" for problem in problems))


class ConfigError(_ProblemsError, ValueError):
    """A setting, or a combination of settings, that cannot work. Raised before anything is launched or written."""


class DataError(ValueError):
    """Text, tokenizer or indexed dataset that is missing, empty, damaged or does not belong together."""


class CheckpointError(_ProblemsError, RuntimeError):
    """A Hugging Face or Megatron checkpoint that is missing, damaged, foreign or already there."""


class BackendUnavailableError(RuntimeError):
    """A GPU, a kernel library or an optional package that this run needs and this machine lacks."""


class TrainingError(RuntimeError):
    """A step whose figures say that going on would spoil the weights."""


class RunInterrupted(BaseException):
    """The run was asked to stop and did so at a point from which the same command goes on. Like KeyboardInterrupt it passes through
    `except Exception`."""


USER_ERRORS = (ConfigError, DataError, CheckpointError, BackendUnavailableError, TrainingError)

# Exit statuses of a run, beside 0 and Python's own 1
EXIT_USER_ERROR = 2
EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: try again
