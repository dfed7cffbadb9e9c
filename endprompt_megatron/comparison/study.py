"""The config of a study. It contains the methods, seeds and reference, checks them, and lists the runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Annotated

from endprompt_megatron.config.ranges import Name, PathText, Range, Seed, Text, range_problems
from endprompt_megatron.errors import ConfigError

BUDGETS = ("tokens", "seconds")
_STEPS = "trainer.max_steps="
KEPT = ("evaluation", "model", "all")
Override = Annotated[str, Text(10_000)]


@dataclass
class StudyConfig:
    """The config of recipes/compare.py.

    Attributes:
        name: name of the study.
        output_dir: directory for the runs, the page and the figures of the study.
        base_experiment: name of the experiment in conf/experiment that every run of `methods` starts from; may be null if `methods` is
            empty.
        methods: labels of rows. A label is a name in conf/method, or any other name with a `method=` in `overrides_of`.
        seeds: seeds of every method without an entry in seeds_of.
        seeds_of: {label: seeds of this method}.
        overrides: overrides of recipes/extend.py for every run.
        overrides_of: {label: further overrides}.
        reference: label of the method with which the others are compared.
        budgets: `tokens` trains every run as configured. `seconds` does the same, and then trains each method whose training time differs
            from the reference's once more, with the number of steps that takes as long as the reference.
        same_time_within: relative difference up to which the times of two methods count as equal.
        jobs: number of parallel runs. They share the machine, so limit cpu_threads of each run.
        keep: what to keep of a finished run. `evaluation` keeps no weights, `model` keeps the export, and `all` also keeps training
            checkpoints.
        write_only: whether to start no run and write the page from existing results.
        collect: output directories of other runs, as DIR (the label is the run's method) or LABEL=DIR.
        evaluations: output directories of recipes/evaluate.py, as LABEL=DIR, to compare instead of runs. Directories with the same label
            are evaluations of several training seeds.
    """

    name: Name = "???"
    output_dir: PathText = "outputs/${name}"
    base_experiment: Name | None = None
    methods: list[Name] = field(default_factory=list)
    seeds: list[Seed] = field(default_factory=lambda: [1])
    seeds_of: dict[str, list[Seed]] = field(default_factory=dict)
    overrides: list[Override] = field(default_factory=list)
    overrides_of: dict[str, list[Override]] = field(default_factory=dict)
    reference: Name = "control_short_pi"
    budgets: list[Name] = field(default_factory=lambda: ["tokens"])
    same_time_within: Annotated[float, Range(0, 1, excludes_least=True, excludes_most=True)] = 0.1
    jobs: Annotated[int, Range(1, 1024)] = 1
    keep: Name = "model"
    write_only: bool = False
    collect: list[PathText] = field(default_factory=list)
    evaluations: list[PathText] = field(default_factory=list)

    def validate(self, known_methods: tuple[str, ...]) -> None:
        """Check all rules.

        Args:
            known_methods: names in conf/method.
        Raises:
            ConfigError: lists every problem.
        """
        if self.evaluations:
            self._validate_evaluations()
            return
        problems = [words for found in range_problems(self).values() for words in found]
        if not (self.methods or self.collect):
            problems.append("methods=[]: set at least one method, or finished runs in collect, or evaluations.")
        if self.methods and not self.base_experiment:
            problems.append("base_experiment=null: runs of `methods` need an experiment. Set for example base_experiment=tiny_random.")
        for label in self.methods:
            if label not in known_methods and not any(text.startswith("method=") for text in self.overrides_of.get(label, [])):
                problems.append(
                    f"methods: {label} is none of {', '.join(known_methods)}. For a variant, set its method, e.g. "
                    f"overrides_of.{label}=[method=endprompt, optim.lr=1e-4]."
                )
            seeds = self.seeds_of.get(label, self.seeds)
            if not seeds or len(set(seeds)) < len(seeds):
                problems.append(f"seeds of {label}: {list(seeds)}. Set at least one seed, each once.")
            if not re.fullmatch(r"[\w.+-]+", label):
                problems.append(f"methods: the label {label!r} is the name of a directory. Use only letters, digits and . _ + -.")
        if len(set(self.methods)) < len(self.methods):
            problems.append(f"methods={self.methods}: labels must be unique. Remove the repeated one.")
        if len({entry.split("=")[-1] for entry in self.collect}) < len(self.collect):
            problems.append(f"collect={self.collect}: directories must be unique. Remove the repeated one.")
        if not self.collect and self.reference not in self.methods:
            problems.append(f"reference={self.reference}: must be one of methods={self.methods}. Set reference to one of them.")
        if not self.budgets or set(self.budgets) - set(BUDGETS):
            problems.append(f"budgets={self.budgets}: choose from {', '.join(BUDGETS)}.")
        if self.keep not in KEPT:
            problems.append(f"keep={self.keep}: choose one of {', '.join(KEPT)}.")
        for text in [*self.overrides, *(text for texts in self.overrides_of.values() for text in texts)]:
            own = [key for key in ("seed", "output_dir", "name", "+experiment") if text.startswith(f"{key}=")]
            problems += [f"override {text}: the study sets {key}. Remove this override." for key in own]
            if text.replace(" ", "").lower() == "probes.enabled=false":
                problems.append(f"override {text}: a run without probes has nothing to compare. Remove this override.")
        if problems:
            raise ConfigError(*problems)

    def evaluated(self) -> dict[str, list[str]]:
        """Return the directories in `evaluations` by label, in their order."""
        found: dict[str, list[str]] = {}
        for entry in self.evaluations:
            label, _, directory = entry.rpartition("=")
            found.setdefault(label, []).append(directory)
        return found

    def _validate_evaluations(self) -> None:
        problems = [words for found in range_problems(self).values() for words in found]
        if self.methods or self.collect:
            problems.append("evaluations cannot be combined with methods or collect. Leave those empty.")
        if not all(self.evaluated()):
            problems.append(f"evaluations={self.evaluations}: write LABEL=DIR, e.g. evaluations=\"['base=outputs/a','after=outputs/b']\".")
        elif self.reference not in self.evaluated():
            problems.append(f"reference={self.reference}: no evaluation has this label. Choose one of {', '.join(self.evaluated())}.")
        if len({entry.rpartition("=")[2] for entry in self.evaluations}) < len(self.evaluations):
            problems.append(f"evaluations={self.evaluations}: directories must be unique. Remove the repeated one.")
        if problems:
            raise ConfigError(*problems)

    def unused(self) -> list[str]:
        """Return warnings about labels in seeds_of and overrides_of that are not in methods."""
        return [
            f"{key}.{label} is not used: {label} is not in methods"
            for key in ("seeds_of", "overrides_of")
            for label in sorted(set(getattr(self, key)) - set(self.methods))
        ]

    def runs(self) -> list[RunRequest]:
        """Return the runs of the token budget: the first seed of every method, then the second seed of every method, and so on. Early
        results therefore already compare all methods."""
        requests = [
            RunRequest(label, seed, tuple(self._overrides(label)))
            for label in self.methods
            for seed in self.seeds_of.get(label, self.seeds)
        ]
        return sorted(requests, key=lambda run: self.seeds_of.get(run.label, self.seeds).index(run.seed))

    def _overrides(self, label: str) -> list[str]:
        own = self.overrides_of.get(label, [])
        method = [] if any(text.startswith("method=") for text in own) else [f"method={label}"]
        return [f"+experiment={self.base_experiment}", *method, *self.overrides, *own]


@dataclass(frozen=True)
class RunRequest:
    """One run of a study.

    Attributes:
        label: label of the run's row in tables.
        seed: seed of weights, sample order, positions and probes.
        overrides: overrides of recipes/extend.py, without seed and output_dir.
        budget: tokens | seconds.
    """

    label: str
    seed: int
    overrides: tuple[str, ...]
    budget: str = "tokens"

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return f"{self.label}_seed{self.seed}" + ("" if self.budget == "tokens" else f"_same_{self.budget}")

    def with_steps(self, steps: int) -> RunRequest:
        """Return the same run with another number of optimizer steps."""
        kept = tuple(text for text in self.overrides if not text.startswith(_STEPS))
        return replace(self, overrides=(*kept, f"{_STEPS}{steps}"))

    @staticmethod
    def steps_in(overrides: list[str]) -> int | None:
        """Return the number of optimizer steps in the overrides, or None if no override sets it. The last override counts."""
        named = [text.removeprefix(_STEPS) for text in overrides if text.startswith(_STEPS)]
        return int(named[-1]) if named else None
