"""RULER's forms put to the model of a Hugging Face directory on Megatron-Core: the same maths as in training, no lm-eval, no
generation server; prompts are read in chunks, so that a long one fits. Same door as evaluation.harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.checkpoint.hf.tokenizer import end_tokens, load_tokenizer
from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.evaluation.lm_eval_harness.harness import Sample
from endprompt_megatron.evaluation.ruler import tasks
from endprompt_megatron.evaluation.ruler.haystack_texts import read_texts
from endprompt_megatron.evaluation.ruler.qa import make_qa_samples, read_questions
from endprompt_megatron.evaluation.ruler.tasks import QA_TASKS, make_samples, score
from endprompt_megatron.evaluation.suite import PREFILL_CHUNK, EvaluateConfig
from endprompt_megatron.evaluation.tasks import PROBE_PREFIX, HarnessTask, prose_of
from endprompt_megatron.inference.generation import greedy_generate
from endprompt_megatron.model.backends import Backend
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.model.gpt import EndPromptGPTModel

_SAMPLES = 100  # a task and length where suite.samples is null


def load_model(
    model_dir: Path, *, precision: str, backend: Backend, device: torch.device, parallel: ParallelConfig | None = None
) -> list[EndPromptGPTModel]:
    """This rank's chunks of the model of a Hugging Face directory, in evaluation mode, with the RoPE scaling that its config.json names.

    Args:
        model_dir: with config.json and safetensors.
        precision: fp32 | bf16.
        backend: which kernels.
        device: where it goes.
        parallel: how the model is cut over the ranks; None: not at all.
    Raises:
        CheckpointError: the directory lacks something, or is of a family that is not known.
    """
    config = read_hf_config(model_dir)
    architecture = architecture_from_hf(config)
    chunks = build_model_chunks(
        architecture,
        rope=rope_from_hf(config),
        max_sequence_length=int(config["max_position_embeddings"]),
        parallel=parallel or ParallelConfig(),
        precision=precision,
        backend=backend,
        device=device,
    )
    load_hf_weights(chunks, model_dir, architecture)
    return [chunk.eval() for chunk in chunks]


class MegatronProbes:
    """One model on the built-in tasks.

    Args:
        config: of the evaluation.
        model: this rank's chunks of the model that it names.
        device: of the model.
    """

    def __init__(self, config: EvaluateConfig, model: list[EndPromptGPTModel], *, device: torch.device):
        self.config, self.model, self.device = config, model, device
        self.tokenizer = load_tokenizer(Path(config.model))
        bos = self.tokenizer.bos_token_id
        self.before = [bos] if config.bos == "one" and bos is not None else []
        self.stop_tokens = end_tokens(Path(config.model), self.tokenizer)

    def run(self, task: HarnessTask, *, length: int, label: str, **_: Any) -> list[Sample]:
        """Ask one task.

        Args:
            task: of the suite `probes`.
            length: tokens that a prompt, BOS included, and its answer may take.
            label: for the progress display.
        Returns:
            the samples in order of their index, scored.
        Raises:
            DataError: the task's smallest prompt does not fit, or a local source cannot be read or holds too little.
        """
        name = task.name.removeprefix(PROBE_PREFIX)
        samples = self._make(task, name, length)
        prompts = [[*self.before, *self.encode(sample.prompt)] for sample in samples]
        written = greedy_generate(
            self.model,
            prompts,
            max_new_tokens=samples[0].max_new_tokens,
            stop_tokens=self.stop_tokens,
            prefill_chunk=PREFILL_CHUNK,
            device=self.device,
            label=label,
        )
        outputs = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
        return [
            Sample(sample.index, score(name, output, sample.references), output, list(sample.references), len(prompt))
            for sample, prompt, output in zip(samples, prompts, outputs, strict=True)
        ]

    def _make(self, task: HarnessTask, name: str, length: int) -> list[tasks.Sample]:
        """The task's samples, of local sources where it has any."""
        paths = vars(self.config.suite.sources)
        options = dict(length=length, count=self.config.suite.samples or _SAMPLES, seed=self.config.seed)
        if name in QA_TASKS:
            (source,) = task.needs
            return make_qa_samples(self.encode, read_questions(name, Path(paths[source]).expanduser()), **options)
        prose = prose_of(task, paths)
        text = None if prose is None else (prose, read_texts(Path(paths[prose])))
        return make_samples(self.encode, task=name, text=text, **options)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
