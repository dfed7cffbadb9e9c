"""What a study is: which methods, how many seeds, compared with which. One dataclass, its rules, and the runs it asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from endprompt_megatron.errors import ConfigError

BUDGETS = ("tokens", "seconds")
_STEPS = "trainer.max_steps="
KEPT = ("evaluation", "model", "all")


@dataclass
class StudyConfig:
    """One comparison, as recipes/compare.py takes it.

    Attributes:
        name: of the study.
        output_dir: where its runs, its page and its pictures go.
        base_experiment: of conf/experiment, what every run starts from; may be null where only `collect` names runs.
        methods: labels of rows: names of conf/method, or labels of your own whose `overrides_of` holds a `method=`.
        seeds: every method's, unless seeds_of names others.
        seeds_of: {label: seeds}.
        overrides: of every run, as recipes/extend.py takes them.
        overrides_of: {label: further overrides}.
        reference: label that the others are tested against.
        budgets: tokens: every run as configured; seconds: methods whose steps cost more or less than the reference's are trained again
            with as many steps as fit into its time.
        same_time_within: how far (as a share) two methods' times for a step may differ and still count as the same time.
        jobs: runs at once; they share the machine, so give each its part (cpu_threads).
        keep: of a finished run: evaluation (no weights), model (the export), all (training checkpoints too).
        write_only: start no run; write the page from what is there.
        collect: output directories of runs made elsewhere, as DIR, a row by its own method, or LABEL=DIR.
        evaluations: output directories of recipes/evaluate.py, as LABEL=DIR: compare these and no runs. Directories with one label are
            those of several seeds of the training.
    """

    name: str = "???"
    output_dir: str = "outputs/${name}"
    base_experiment: str | None = None
    methods: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1])
    seeds_of: dict[str, list[int]] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    overrides_of: dict[str, list[str]] = field(default_factory=dict)
    reference: str = "control_short_pi"
    budgets: list[str] = field(default_factory=lambda: ["tokens"])
    same_time_within: float = 0.1
    jobs: int = 1
    keep: str = "model"
    write_only: bool = False
    collect: list[str] = field(default_factory=list)
    evaluations: list[str] = field(default_factory=list)

    def validate(self, known_methods: tuple[str, ...]) -> None:
        """Check every rule at once.

        Args:
            known_methods: names in conf/method.
        Raises:
            ConfigError: with every problem found.
        """
        if self.evaluations:
            self._validate_evaluations()
            return
        problems = []
        if not (self.methods or self.collect):
            problems.append("methods=[]: name at least one method, or finished runs in collect, or evaluations.")
        if self.methods and not self.base_experiment:
            problems.append("base_experiment=null: the runs of `methods` start from an experiment, e.g. base_experiment=tiny_random.")
        for label in self.methods:
            if label not in known_methods and not any(text.startswith("method=") for text in self.overrides_of.get(label, [])):
                problems.append(
                    f"methods: {label} is none of {', '.join(known_methods)}. For a variant name its method, e.g. "
                    f"overrides_of.{label}=[method=endprompt, optim.lr=1e-4]."
                )
            seeds = self.seeds_of.get(label, self.seeds)
            if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
                problems.append(f"seeds of {label}: {list(seeds)}. Name at least one, each once, none below 0.")
            if not re.fullmatch(r"[\w.+-]+", label):
                problems.append(f"methods: the label {label!r} names a directory: use letters, digits and . _ + - alone.")
        if len(set(self.methods)) < len(self.methods):
            problems.append(f"methods={self.methods}: each label once.")
        if len({entry.split("=")[-1] for entry in self.collect}) < len(self.collect):
            problems.append(f"collect={self.collect}: each directory once.")
        if not self.collect and self.reference not in self.methods:
            problems.append(f"reference={self.reference}: must be one of methods={self.methods}. Set reference to one of them.")
        if not self.budgets or set(self.budgets) - set(BUDGETS):
            problems.append(f"budgets={self.budgets}: choose from {', '.join(BUDGETS)}.")
        if self.keep not in KEPT:
            problems.append(f"keep={self.keep}: choose one of {', '.join(KEPT)}.")
        if self.jobs < 1:
            problems.append(f"jobs={self.jobs}: must be >= 1.")
        if not 0 < self.same_time_within < 1:
            problems.append(f"same_time_within={self.same_time_within}: must be between 0 and 1. The default is 0.1.")
        for text in [*self.overrides, *(text for texts in self.overrides_of.values() for text in texts)]:
            for key in ("seed", "output_dir", "name", "+experiment"):
                if text.startswith(f"{key}="):
                    problems.append(f"override {text}: the study sets {key} itself.")
            if text.replace(" ", "").lower() == "probes.enabled=false":
                problems.append(f"override {text}: a run without probes has nothing to compare. Leave it out.")
        if problems:
            raise ConfigError(*problems)

    def evaluated(self) -> dict[str, list[str]]:
        """`evaluations` by label, in the order named."""
        found: dict[str, list[str]] = {}
        for entry in self.evaluations:
            label, _, directory = entry.rpartition("=")
            found.setdefault(label, []).append(directory)
        return found

    def _validate_evaluations(self) -> None:
        problems = []
        if self.methods or self.collect:
            problems.append("evaluations stand alone: leave methods and collect empty.")
        if not all(self.evaluated()):
            problems.append(f"evaluations={self.evaluations}: write LABEL=DIR, e.g. evaluations=\"['base=outputs/a','after=outputs/b']\".")
        elif self.reference not in self.evaluated():
            problems.append(f"reference={self.reference}: no evaluation has this label. Choose one of {', '.join(self.evaluated())}.")
        if len({entry.rpartition("=")[2] for entry in self.evaluations}) < len(self.evaluations):
            problems.append(f"evaluations={self.evaluations}: each directory once.")
        if problems:
            raise ConfigError(*problems)

    def unused(self) -> list[str]:
        """What is said of labels that are not in methods, in words."""
        return [
            f"{key}.{label} is not used: {label} is not in methods"
            for key in ("seeds_of", "overrides_of")
            for label in sorted(set(getattr(self, key)) - set(self.methods))
        ]

    def runs(self) -> list[RunRequest]:
        """The runs of the token budget, one seed of every method before the next: what there is after an hour compares them all."""
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
        label: its row.
        seed: of weights, sample order, positions and probes.
        overrides: of recipes/extend.py, without seed and output_dir.
        budget: tokens | seconds.
    """

    label: str
    seed: int
    overrides: tuple[str, ...]
    budget: str = "tokens"

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.label}_seed{self.seed}" + ("" if self.budget == "tokens" else f"_same_{self.budget}")

    def with_steps(self, steps: int) -> RunRequest:
        """The same run over another number of optimizer steps."""
        kept = tuple(text for text in self.overrides if not text.startswith(_STEPS))
        return replace(self, overrides=(*kept, f"{_STEPS}{steps}"))

    @staticmethod
    def steps_in(overrides: list[str]) -> int | None:
        """The number of optimizer steps that overrides name; the last counts."""
        named = [text.removeprefix(_STEPS) for text in overrides if text.startswith(_STEPS)]
        return int(named[-1]) if named else None
