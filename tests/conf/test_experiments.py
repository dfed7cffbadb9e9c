"""Every experiment composes onto the typed schema, validates, dry-runs and fits, without weights, GPUs or a network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _entry import ROOT, clear_empty_dicts, to_dataclass, to_run_config  # recipes/_entry.py
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from endprompt_megatron.comparison.study import StudyConfig
from endprompt_megatron.config.schema import RunConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.jobs.dry_run import dry_run
from endprompt_megatron.jobs.preflight import plan_request, resolve
from endprompt_megatron.launch import launcher
from endprompt_megatron.planning.run_plan import describe_plan
from tests.support.compose import compose
from tests.support.tools import load_tool

predict = load_tool(ROOT / "tools" / "predict.py")

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def _plan(config) -> list[str]:
    world_size = launcher.planned_world_size(config)
    return describe_plan(plan_request(resolve(config, world_size=world_size, runs_here=False), num_prompt_tokens=None))


# The hub's own counts
PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "llama2_7b": 6_738_415_616,
    "mistral_7b": 7_248_023_552,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_dry_runs_and_fits(name, tmp_path, monkeypatch):
    """Composed, validated, built group by group and stage by stage, compared with its GPUs; its header says what that gave."""
    monkeypatch.chdir(tmp_path)  # no models/ and datasets/ here: a dry run needs none
    config = to_run_config(compose(f"+experiment={name}"))
    assert config.name == ("llama3_8b_endprompt_65536" if name == "paper" else name) and config.output_dir == f"outputs/{config.name}"
    lines = list(dry_run(config, world_size=launcher.planned_world_size(config)))
    told = "\n".join(lines)
    assert f"{config.rope.target_context_length:,}" in told
    assert "does NOT fit" not in told and "tight" not in told and "SPAN NODES" not in told
    if config.model.name in PUBLISHED and config.adapter.type == "none":
        assert f"  parameters   {PUBLISHED[config.model.name]:,} in the whole model" in told
    if config.parallel.tensor_model_parallel_size > 1:
        assert (
            f"{config.parallel.tensor_model_parallel_size} tensor: 0..{config.parallel.tensor_model_parallel_size - 1}".replace(
                "0..1", "0, 1"
            )
            in told
        )
    header = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().partition("defaults:")[0].splitlines()
    if config.launch.nproc_per_node == 8:  # on a cluster, where the paper's budget is trained
        assert config.trainer.global_batch_size == 64
        seq_length = config.rope.target_context_length if config.method.full_length else config.data.seq_length
        assert seq_length * 64 * config.trainer.max_steps == pytest.approx(1e9, rel=0.005)
    if config.accelerator == "gpu":
        assert predict.predicted(lines) in header, f"python tools/predict.py {name} writes the line anew"
    assert list(tmp_path.iterdir()) == []


def test_there_is_an_experiment_for_every_model_and_window():
    """mistral_7b_32k is none: 32,768 is its own window."""
    lengths = {
        "llama3_8b": (32, 64, 96, 128, 256),
        "llama2_7b": (32, 64, 96, 128, 256),
        "mistral_7b": (64, 96, 128, 256),
        "llama3_70b": (64, 128),
    }
    wanted = {f"{model}_{length}k" for model in lengths for length in lengths[model]}
    rivals = {"llama3_8b_64k_full", "llama3_8b_64k_longlora", "llama3_70b_64k_full"}
    variants = {"llama3_8b_64k_fp8", "llama3_70b_64k_fp8", "llama3_70b_64k_h100x32", "llama3_70b_128k_h100x32"}
    assert wanted | rivals | variants <= set(EXPERIMENTS)


def test_the_page_of_experiments_states_what_the_headers_predict():
    """Of one experiment of each row; the others of a row have the same figures."""
    table = [line for line in (ROOT / "docs" / "experiments.md").read_text().splitlines() if line.startswith("| ") and "GiB, " in line]
    told = [re.findall(r"([\d.]+ GiB), ([\d.]+ (?:min|h))", line) for line in table]
    rows = [
        ["smollm2_135m_64k"], ["llama3_8b_64k"], ["llama2_7b_64k"], ["mistral_7b_64k"], ["llama3_70b_64k", "llama3_70b_64k_h100x32"],
        ["llama3_8b_64k_fp8", "llama3_70b_64k_fp8"], ["llama3_8b_64k_full", "llama3_8b_64k_longlora", "llama3_70b_64k_full"],
    ]  # fmt: skip
    headers = {}
    for name in EXPERIMENTS:
        found = re.search(
            r"^# Predicted: ([\d.]+ GiB) per GPU, .+, (.+) in total",
            (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text(),
            flags=re.MULTILINE,
        )
        headers[name] = found.groups() if found else None
    for row in rows:
        assert [headers[name] for name in row] in told
    for model in ("llama3_8b", "llama2_7b", "mistral_7b", "llama3_70b"):
        windows = {headers[name] for name in EXPERIMENTS if re.fullmatch(rf"{model}_\d+k", name)}
        assert len(windows) == 1, "samples stay as long whatever the window"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama3_8b_64k", ["cluster=a100x8"]),
        ("llama2_7b_256k", ["cluster=a800x8"]),
        ("mistral_7b_128k", ["precision=fp8_attention"]),
        ("llama3_8b_64k_longlora", ["precision=fp8"]),
        ("llama3_8b_64k_full", ["parallel=tp8", "cluster=h100x8"]),
        ("llama3_8b_64k_full", ["method=lceg_yarn", "precision=fp8"]),
        ("llama3_70b_64k", ["precision=fp8"]),
        ("llama3_70b_128k_h100x32", ["precision=fp8_blockwise"]),
        ("llama3_70b_64k_full", ["precision=fp8"]),
    ],
)
def test_other_gpus_precisions_and_layouts_are_an_override_away(name, overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = to_run_config(compose(f"+experiment={name}", *overrides))
    told = "\n".join(dry_run(config, world_size=launcher.planned_world_size(config)))
    assert "tight" not in told and "SPAN NODES" not in told and "  time         " in told and "not estimated" not in told
    for override in overrides:
        group, _, value = override.partition("=")
        if group == "precision":
            assert config.precision.name == value and f", {value}\n" in told
        if group == "cluster":
            assert config.launch.gpu == f"{value[:4].upper()}-80GB"


@pytest.mark.parametrize(("precision", "cluster", "able"), [("fp8", "a100x8", "B200, H100-80GB, H200"), ("mxfp8", "h100x8", "B200")])
def test_a_precision_that_a_gpu_lacks_is_refused(precision, cluster, able):
    config = to_run_config(compose("+experiment=llama3_8b_64k", f"cluster={cluster}", f"precision={precision}"))
    with pytest.raises(
        ConfigError, match=f"precision.name={precision}: {config.launch.gpu} has no tensor cores for it. Set .* one of {able}."
    ):
        list(dry_run(config, world_size=8))


@pytest.mark.parametrize(
    ("name", "ranks"), [("h100x8", 8), ("a100x8", 8), ("a800x8", 8), ("h100x32", 32), ("h100x64", 64), ("h100x256", 256)]
)
def test_every_cluster_has_the_gpus_of_its_name(name, ranks):
    config = to_run_config(compose("+experiment=paper", f"cluster={name}"))
    assert launcher.planned_world_size(config) == ranks and config.accelerator == "gpu"
    assert {path.stem for path in (ROOT / "conf" / "cluster").glob("*.yaml")} == {
        "h100x8",
        "a100x8",
        "a800x8",
        "h100x32",
        "h100x64",
        "h100x256",
    }


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "parallel").glob("*.yaml")))
def test_every_layout_is_the_one_of_its_name(name):
    parallel = to_run_config(compose("+experiment=paper", f"parallel={name}")).parallel
    if name in ("single", "data_parallel_8"):
        assert parallel.model_parallel_size == 1
        return
    sizes = {"tp": parallel.tensor_model_parallel_size, "pp": parallel.pipeline_model_parallel_size, "cp": parallel.context_parallel_size}
    sizes["vpp"] = parallel.virtual_pipeline_model_parallel_size or 1
    assert name == "_".join(f"{key}{sizes[key]}" for key in ("tp", "pp", "cp", "vpp") if sizes[key] > 1)
    assert parallel.sequence_parallel and parallel.use_distributed_optimizer


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_obeys_another_length(name):
    assert to_run_config(compose(f"+experiment={name}", "length=128k")).rope.target_context_length == 131072


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_opens_with_its_command(name):
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ") and "python recipes/extend.py" in text


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")))
def test_model_numbers_are_the_published_ones(name):
    from endprompt_megatron.jobs.preflight import known_base
    from endprompt_megatron.planning.flops import count_parameters

    config = to_run_config(compose("+experiment=tiny_random", f"model={name}", f"model.hf_path=/nonexistent/{name}"))
    if name in PUBLISHED:
        assert count_parameters(known_base(config)[0]) == PUBLISHED[name]
    else:
        assert name == "tiny_random" and known_base(config)[0].num_layers == 2


METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
LENGTHS = sorted(path.stem for path in (ROOT / "conf" / "length").glob("*k.yaml"))
MODELS = ("llama2_7b", "mistral_7b", "llama3_8b", "llama3_70b")


@pytest.mark.parametrize(
    "method", [name if name in ("endprompt", "full", "lceg_ntk") else pytest.param(name, marks=pytest.mark.repeated) for name in METHODS]
)
def test_every_method_goes_with_every_model_and_length(method, tmp_path, monkeypatch):
    """By composition: the factor, the sample length and NTK's f follow from the base's own window."""
    monkeypatch.chdir(tmp_path)
    windows = {"llama2_7b": 4096, "mistral_7b": 32768, "llama3_8b": 8192, "llama3_70b": 8192}
    for model, length in [("llama3_8b", length) for length in LENGTHS] + [(model, "64k") for model in MODELS if model != "llama3_8b"]:
        composed = to_run_config(compose("+experiment=paper", f"model={model}", f"length={length}", f"method={method}"))
        target = composed.rope.target_context_length
        assert target == int(length.removesuffix("k")) * 1024
        config = resolve(composed, world_size=8, runs_here=False).config
        assert config.name == f"{model}_{method}_{target}" and config.method.name == method
        assert config.rope.factor == target / windows[model]
        assert config.data.seq_length == (target if method in FULL_LENGTH else 8192)
        assert config.trainer.max_steps == (0 if method == "untrained_pi" else 1907)
        if method == "lceg_ntk":
            assert config.rope.ntk_dynamic_factor == -(-target // (2 * windows[model]))
        assert config.rope.type == {"lceg_ntk": "ntk", "lceg_yarn": "yarn"}.get(method, "pi")


FULL_LENGTH = ("full", "lceg_pi", "lceg_ntk", "lceg_yarn", "longlora")


def test_a_window_that_is_none_is_refused():
    config = to_run_config(compose("+experiment=paper", "model=mistral_7b", "length=32k"))
    with pytest.raises(ConfigError, match="must be larger than the native window of 32768"):
        resolve(config, world_size=8)


def test_the_methods_of_the_paper_are_all_there():
    assert set(METHODS) >= {
        *FULL_LENGTH, "pose", "endprompt", "endprompt_random", "endprompt_pose", "control_short_pi", "untrained_pi",
    }  # fmt: skip


@pytest.mark.parametrize("study", sorted(path.stem for path in (ROOT / "conf" / "study").glob("*.yaml")))
def test_every_study_requests_valid_runs(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    requested = to_dataclass(compose(f"+study={study}", config="compare"), StudyConfig)
    requested.validate(tuple(METHODS))
    first = {run.label: run for run in reversed(requested.runs())}
    assert set(first) == set(requested.methods)
    for run in first.values():
        resolve(to_run_config(compose(*run.overrides, f"seed={run.seed}")), world_size=1, runs_here=False)
    assert (ROOT / "conf" / "study" / f"{study}.yaml").read_text().count(f"recipes/compare.py +study={study}\n") == 1


def _pairs(methods: list[str], choices: list[str]) -> list:
    """Every pair; `make test` takes each method and each choice once or more, `make test-all` the other pairs too."""
    short = {(methods[at % len(methods)], choices[at % len(choices)]) for at in range(max(len(methods), len(choices)))}
    return [
        pytest.param(method, choice, marks=() if (method, choice) in short else pytest.mark.repeated)
        for method in methods
        for choice in choices
    ]


@pytest.mark.parametrize(("method", "rope"), _pairs(METHODS, sorted(path.stem for path in (ROOT / "conf" / "rope").glob("*.yaml"))))
def test_every_method_goes_with_every_scaling(method, rope, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["rope.theta=1e6"] if rope == "abf" else []
    config = to_run_config(compose("+experiment=smollm2_135m_64k", f"method={method}", f"rope={rope}", *base))
    assert config.method.name == method and config.rope.type == rope.removesuffix("_dynamic")
    assert _plan(config)
    for folder, name in (("method", method), ("rope", rope)):
        text = (ROOT / "conf" / folder / f"{name}.yaml").read_text()
        assert text.removeprefix("# @package _global_\n").startswith("# ")


@pytest.mark.parametrize(("method", "adapter"), _pairs(METHODS, sorted(path.stem for path in (ROOT / "conf" / "adapter").glob("*.yaml"))))
def test_every_method_goes_with_adapters_and_with_s2_attention(method, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = to_run_config(compose("+experiment=smollm2_135m_64k", f"method={method}", f"adapter={adapter}", "method.attention=s2"))
    assert config.adapter.type == adapter and config.adapter.rank == 8 and config.adapter.alpha == 16
    assert _plan(config)
    assert (ROOT / "conf" / "adapter" / f"{adapter}.yaml").read_text().startswith("# ")


def test_every_key_of_the_schema_is_read_somewhere():
    """A key that only the schema and its rules name would be a promise that nothing keeps."""
    import dataclasses

    from endprompt_megatron.config.schema import RunConfig

    sources = [path for folder in ("endprompt_megatron", "recipes") for path in (ROOT / folder).rglob("*.py")]
    config = ROOT / "endprompt_megatron" / "config"
    text = "\n".join(path.read_text() for path in sources if path.parent != config)
    rules = (config / "validation.py").read_text()

    def keys(cls: type) -> list[str]:
        found = []
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.default_factory):
                found += keys(field.default_factory)
            else:
                found.append(field.name)
        return found

    rules_only = {"original_context_length"}  # compared with the base's own window, nothing else
    resolved = {"full_length"}  # config/resolved.py derives data.seq_length from it
    unread = [key for key in keys(RunConfig) if f".{key}" not in text and key not in rules_only | resolved]
    assert unread == []
    assert all(f".{key}" in rules for key in rules_only)
    assert all(f".{key}" in (ROOT / "endprompt_megatron" / "config" / "resolved.py").read_text() for key in resolved)


def test_unknown_experiment_key_and_type():
    with pytest.raises(MissingConfigException, match="no_such"):
        compose("+experiment=no_such")
    with pytest.raises(ConfigCompositionException, match="trainer.max_stepz"):
        compose("+experiment=tiny_random", "trainer.max_stepz=3")
    with pytest.raises(ConfigError, match="trainer.max_stepz"):
        to_run_config(compose("+experiment=tiny_random", "+trainer.max_stepz=3"))
    with pytest.raises(ConfigError, match="trainer.max_steps"):
        to_run_config(compose("+experiment=tiny_random", "trainer.max_steps=many"))


def test_paths_in_conf_are_relative():
    for path in (ROOT / "conf").rglob("*.yaml"):
        for line in path.read_text().splitlines():
            if not line.lstrip().startswith("#"):
                assert ": /" not in line, f"{path.name}: {line}"
    assert Path(to_run_config(compose("+experiment=tiny_random")).data.directory) == Path("datasets")


def test_an_empty_dictionary_on_the_command_line_clears_the_defaults():
    overrides = clear_empty_dicts(["+experiment=tiny_random", "model.hf_config={}", "optim.lr=1e-3"])
    assert overrides == ["+experiment=tiny_random", "~model.hf_config", "optim.lr=1e-3"]
    config = to_run_config(compose(*overrides))
    assert config.model.hf_config == {} and config.model.hf_path == "models/tiny_random"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_key_of_the_schema_can_be_set_without_a_plus(name):
    """Hydra takes `key=value` only for what the composed files name."""

    def leaves(node, prefix=""):
        for key in node:
            child = node._get_node(key)
            yield from leaves(child, f"{prefix}{key}.") if OmegaConf.is_dict(child) and len(child) else [prefix + key]

    schema, composed = OmegaConf.structured(RunConfig), compose(f"+experiment={name}")
    assert [key for key in leaves(schema) if OmegaConf.select(composed, key, default=...) is ...] == []
