"""The errors a user can meet. Each message quotes the value, the rule it breaks and the way out."""


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work. Raised before anything is launched or written."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__(problems[0] if len(problems) == 1 else "\n".join(f"- {problem}" for problem in problems))


class DataError(ValueError):
    """Text, tokenizer or indexed dataset that is missing, empty, damaged or does not belong together."""


class CheckpointError(RuntimeError):
    """A Hugging Face or Megatron checkpoint that is missing, damaged, foreign or already there."""


class BackendUnavailableError(RuntimeError):
    """A GPU, a kernel library or an optional package that this run needs and this machine lacks."""


USER_ERRORS = (ConfigError, DataError, CheckpointError, BackendUnavailableError)
