"""Run the tasks of suite ruler_offline by greedy generation on Megatron-Core. The computation is the same as in training, and needs neither
lm-eval nor a generation server. Prompts are read in chunks to bound the memory. The interface is that of
lm_eval_harness.harness.Harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.tokenizer import end_tokens, load_tokenizer
from endprompt_megatron.evaluation.ruler.haystack_texts import read_texts
from endprompt_megatron.evaluation.ruler.qa import make_qa_samples, read_questions
from endprompt_megatron.evaluation.ruler.samples import QA_TASKS, RulerSample, make_samples, score
from endprompt_megatron.evaluation.sample import Sample
from endprompt_megatron.evaluation.suite import PREFILL_CHUNK, EvaluateConfig
from endprompt_megatron.evaluation.task_sources import prose_source_of
from endprompt_megatron.evaluation.tasks import Task
from endprompt_megatron.inference.generation import greedy_generate
from endprompt_megatron.model.gpt import EndPromptGPTModel

_DEFAULT_SAMPLES = 100  # number of samples for each task and length if suite.samples is null


class GenerationTasks:
    """Runs tasks that are scored by greedy generation.

    Args:
        config: configuration of the evaluation.
        model: this rank's chunks of the model that `config` names, in evaluation mode.
        device: device of the model.
    """

    def __init__(self, config: EvaluateConfig, model: list[EndPromptGPTModel], *, device: torch.device):
        self.config, self.model, self.device = config, model, device
        self.tokenizer = load_tokenizer(Path(config.model))
        bos = self.tokenizer.bos_token_id
        self.prefix = [bos] if config.bos == "one" and bos is not None else []
        self.stop_tokens = end_tokens(Path(config.model), self.tokenizer)

    def run(self, task: Task, *, length: int, label: str, **_: Any) -> list[Sample]:
        """Run one task.

        Args:
            task: a task of suite ruler_offline.
            length: maximum number of tokens of a prompt and its answer together. BOS does not count; see ruler/samples.py.
            label: text of the progress display.
        Returns:
            The scored samples, sorted by index.
        Raises:
            DataError: the task's smallest prompt does not fit the length, or a local source cannot be read or has too little text.
        """
        samples = self._make_samples(task, length)
        prompts = [[*self.prefix, *self.encode(sample.prompt)] for sample in samples]
        generated = greedy_generate(
            self.model,
            prompts,
            max_new_tokens=samples[0].max_new_tokens,
            stop_tokens=self.stop_tokens,
            prefill_chunk=PREFILL_CHUNK,
            device=self.device,
            label=label,
        )
        outputs = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in generated]
        return [
            Sample(sample.index, score(sample.task, output, sample.references), output, list(sample.references), len(prompt))
            for sample, prompt, output in zip(samples, prompts, outputs, strict=True)
        ]

    def _make_samples(self, task: Task, length: int) -> list[RulerSample]:
        """Return the task's samples, from local sources if the task uses any."""
        paths = vars(self.config.suite.sources)
        assert task.form is not None  # every task of suite ruler_offline has a form
        options = dict(length=length, count=self.config.suite.samples or _DEFAULT_SAMPLES, seed=self.config.seed)
        if task.form in QA_TASKS:
            (source,) = task.needs
            return make_qa_samples(self.encode, read_questions(task.form, Path(paths[source]).expanduser()), **options)
        prose = prose_source_of(task, paths)
        text = None if prose is None else (prose, read_texts(Path(paths[prose])))
        return make_samples(self.encode, task=task.form, text=text, **options)

    def encode(self, text: str) -> list[int]:
        """Encode a text without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
