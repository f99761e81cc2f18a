"""The launch recipes: what they print can be run, and what they do when a run ends.

No cluster is here: `srun`, `scontrol`, `gcloud` and the container are stand-ins that run the
command line they are given, with the variables that the real ones set.
"""

import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from luspo_jax.hosts.files import PlaceError
from luspo_jax.metrics import read_metrics
from luspo_jax.run.workdir import check_place

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
QUICKSTART = "--config=configs/quickstart.py"
TOLD = "16 prompts × 8 responses = 128 responses a step"  # by a dry run of the quickstart


def _script(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def call(tmp_path):
    """Runs a recipe, or another command line; `tmp_path/bin` comes first in PATH."""
    (tmp_path / "bin").mkdir()
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "XLA_", "JAX_"))}
    base |= {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "RETRY_S": "0",
    }

    def run(*command, **variables):
        return subprocess.run(
            command, cwd=ROOT, env=base | variables, capture_output=True, text=True, timeout=200
        )

    run.environment = base
    return run


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_shell_is_well_formed_and_says_how_it_is_used(path, call):
    assert call("bash", "-n", str(path)).returncode == 0
    ran = call("bash", str(path))
    assert ran.returncode == 2, "without flags there is nothing to start"
    assert f"launch/{path.name}" in ran.stderr
    assert f"launch/{path.name}" in path.read_text().split("set -euo")[0]


# ---------------------------------------------------------------------- one host


def test_one_host_prints_a_command_that_runs(call, tmp_path):
    ran = call("bash", "launch/one_host.sh", "--dry_run", QUICKSTART, f"--workdir={tmp_path}/a run")
    assert ran.returncode == 0, ran.stderr
    *exports, command = ran.stdout.splitlines()
    assert all(line.startswith("export ") for line in exports)
    assert shlex.split(command)[-1] == f"--workdir={tmp_path}/a run"
    ran = call("bash", "-c", "\n".join([*exports, f"{command} --dry_run"]))
    assert ran.returncode == 0, ran.stderr
    assert TOLD in ran.stdout
    assert not (tmp_path / "a run").exists()


def _ends_with(tmp_path, *statuses):
    """A stand-in for Python that ends with one status after the other."""
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    return _script(
        tmp_path / "bin" / "fake_python",
        f'cd {tmp_path}; echo "$@" >>calls; s=$(head -1 statuses); sed -i 1d statuses; exit $s',
    )


@pytest.mark.parametrize(
    ("statuses", "calls", "ends"),
    [
        ((0,), 1, 0),
        ((1, 137, 0), 3, 0),  # the same command continues
        ((2,), 1, 2),  # a configuration that no retry mends
        ((1, 1, 1, 1, 1), 4, 1),  # three retries
    ],
)
def test_one_host_continues_what_can_be_continued(call, tmp_path, statuses, calls, ends):
    ran = call(
        "bash", "launch/one_host.sh", QUICKSTART, f"--workdir={tmp_path}/runs/x",
        PYTHON=str(_ends_with(tmp_path, *statuses)),
    )  # fmt: skip
    assert ran.returncode == ends
    made = (tmp_path / "calls").read_text().splitlines()
    assert made == [f"-m experiments.train {QUICKSTART} --workdir={tmp_path}/runs/x"] * calls
    assert (tmp_path / "runs" / "x.log").exists()
    assert not (tmp_path / "runs" / "x").exists(), "a workdir must be empty before the run"


def test_one_host_passes_a_signal_on_and_does_not_retry(call, tmp_path):
    fake = _script(
        tmp_path / "bin" / "fake_python",
        f"trap 'echo asked >>{tmp_path}/calls; kill $!; exit 143' TERM\n"
        f"echo started >>{tmp_path}/calls; sleep 60 & wait",
    )
    process = subprocess.Popen(
        ["bash", "launch/one_host.sh", QUICKSTART, f"--workdir={tmp_path}/run"],
        cwd=ROOT, env=call.environment | {"PYTHON": str(fake)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _wait_for(tmp_path / "calls", "started")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "the same command continues the run" in said
    assert (tmp_path / "calls").read_text() == "started\nasked\n"


@pytest.mark.slow
def test_one_host_continues_a_run_that_was_killed(call, tmp_path):
    workdir = tmp_path / "run"
    flags = (
        "--config.num_steps=6", "--config.output.checkpoint_every=1",
        "--config.eval.num_problems=8", "--config.eval.every=0",
    )  # fmt: skip
    # The first start tells its number, and is killed once it has written a checkpoint.
    _script(
        tmp_path / "bin" / "python",
        f'[[ -e {tmp_path}/pid ]] || echo $$ >{tmp_path}/pid; exec {sys.executable} "$@"',
    )
    process = subprocess.Popen(
        ["bash", "launch/one_host.sh", QUICKSTART, f"--workdir={workdir}", *flags],
        cwd=ROOT, env=call.environment | {"PYTHON": "python"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _wait_for(workdir / "metrics.jsonl", '"step": 3', seconds=200)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert process.wait(timeout=200) == 0
    steps = [record["step"] for record in read_metrics(workdir / "metrics.jsonl")]
    assert steps == list(range(7))
    said = (tmp_path / "run.log").read_text()
    assert "exit status 137: continuing in 0 s" in said
    assert said.count("objective : luspo") == 2
    assert said.count("step 1/6 |") == 1, "it started over instead of going on"


def _wait_for(path, text, seconds=60.0):
    until = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, path.read_text() if path.exists() else f"no {path}"
        time.sleep(0.1)


# ---------------------------------------------------------------------- SLURM


def _slurm(tmp_path, status=None):
    """Stand-ins: srun starts tasks with SLURM's variables, or ends with a status."""
    task = f"sleep {status}" if status == "60" else f"exit {status}"
    real = (
        "while [[ $1 == --* ]]; do shift; done\n"
        "export SLURM_STEP_NODELIST=127.0.0.1 SLURM_LOCALID=0\n"
        "for ((i = 1; i < SLURM_NTASKS; i++)); do\n"
        '  SLURM_PROCID=$i "$@" --dry_run &\n'
        "done\n"
        'SLURM_PROCID=0 "$@" --dry_run && wait'
    )
    _script(tmp_path / "bin" / "srun", real if status is None else task)
    _script(tmp_path / "bin" / "scontrol", f'echo "$@" >>{tmp_path}/scontrol')


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_slurm_prints_a_command_that_runs(call, tmp_path, tasks):
    _slurm(tmp_path)
    arguments = ("launch/slurm.sbatch", "--dry_run", QUICKSTART, f"--workdir={tmp_path}/run")
    ran = call("bash", *arguments, SLURM_GPUS_ON_NODE="4")
    assert ran.returncode == 0, ran.stderr
    *exports, command = ran.stdout.splitlines()
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3" in exports  # all GPUs to the one process
    assert command.startswith("srun ")
    assert "--distributed=auto" in command
    ran = call(
        "bash", "-c", "\n".join([*exports, command]),
        SLURM_JOB_ID="7", SLURM_NTASKS=str(tasks), JAX_COORDINATOR_PORT=_free_port(),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for index in range(tasks):
        assert f"process {index} of {tasks} on " in ran.stdout
    assert ran.stdout.count("found through SLURM") == tasks
    assert ran.stdout.count(TOLD) == 1


def test_slurm_with_a_task_a_gpu_leaves_the_choice_to_jax(call):
    ran = call(
        "bash", "launch/slurm.sbatch", "--dry_run", QUICKSTART, "--workdir=x",
        SLURM_NTASKS_PER_NODE="8",
    )  # fmt: skip
    assert "JAX_LOCAL_DEVICE_IDS" not in ran.stdout


def test_jax_reads_the_variable_that_the_recipe_sets(call):
    """jax's own rule under SLURM is one GPU a process, that of its number on the host."""
    code = (
        "import logging, jax\n"
        "logging.basicConfig(level='INFO')\n"
        "jax.distributed.initialize(initialization_timeout=30)"
    )
    variables = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    }  # fmt: skip
    for ids, expected in ((None, "0"), ("0,1,2,3", "0,1,2,3")):
        given = {} if ids is None else {"JAX_LOCAL_DEVICE_IDS": ids}
        ran = call(
            sys.executable, "-c", code, JAX_COORDINATOR_PORT=_free_port(), **variables, **given
        )
        assert f"initialized with visible devices: {expected}\n" in ran.stderr


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [
        ("0", "0", False),
        ("1", "0", True),
        ("137", "3", True),
        ("1", "20", False),  # as often as MAX_RESTARTS
        ("2", "0", False),  # a configuration
        ("143", "0", False),  # scancel must not bring it back
    ],
)
def test_slurm_queues_again_what_can_be_continued(call, tmp_path, status, restarts, again):
    _slurm(tmp_path, status)
    ran = call(
        "bash", "launch/slurm.sbatch", QUICKSTART, "--workdir=x",
        SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts,
    )  # fmt: skip
    assert ran.returncode == int(status)
    made = tmp_path / "scontrol"
    assert (made.read_text() if made.exists() else "") == ("requeue 7\n" if again else "")


def test_slurm_queues_again_before_the_time_limit(call, tmp_path):
    _slurm(tmp_path, "60")
    process = subprocess.Popen(
        ["bash", "launch/slurm.sbatch", QUICKSTART, "--workdir=x"],
        cwd=ROOT, env=call.environment | {"SLURM_JOB_ID": "7"}, start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(1.5)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    os.killpg(process.pid, signal.SIGKILL)  # the stand-in of the step


def test_sbatch_asks_for_what_the_recipe_counts_on():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.M))
    assert options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("B:USR1@")  # to this script, not to the tasks
    assert {"requeue", "open-mode", "exclusive"} <= set(options)


# ---------------------------------------------------------------------- TPU VMs


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tpu_vm_prints_a_command_that_runs(call, tmp_path, real):
    where = {"TPU": "slice", "ZONE": "zone"}
    workdir = f"--workdir={tmp_path}/a 'run'"
    run = ("run", "--dry_run", QUICKSTART, workdir)
    ran = call("bash", "launch/tpu_vm.sh", *run, **where, RETRIES="0")
    (line,) = ran.stdout.splitlines()
    assert shlex.split(line)[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert "--worker=all" in line
    # A host: its checkout and environment, of which Python leaves out what only a slice can tell.
    (tmp_path / "luspo_jax").symlink_to(ROOT)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    started = f'exec {sys.executable} "${{@/--distributed=auto/--dry_run}}"'
    told = "printf '<%s>' \"$@\"; echo ' in' ${PWD##*/}; exit 0"
    _script(tmp_path / "venv" / "bin" / "python", started if real else told)
    _script(
        tmp_path / "bin" / "gcloud",
        'for a in "$@"; do case $a in --command=*) exec bash -c "${a#--command=}";; esac; done',
    )
    ran = call("bash", "-c", line)
    assert ran.returncode == 0, ran.stderr
    expected = f"<-m><experiments.train><--distributed=auto><{QUICKSTART}><{workdir}> in luspo_jax"
    _wait_for(tmp_path / "train.log", TOLD if real else expected, seconds=120)


def test_tpu_vm_installs_on_every_host(call):
    where = {"TPU": "slice", "ZONE": "zone", "PROJECT": "mine", "NFS": "10.0.0.2:/runs"}
    ran = call("bash", "launch/tpu_vm.sh", "install", "--dry_run", **where)
    copy, install, mount = map(shlex.split, ran.stdout.splitlines())
    for command in (copy, install, mount):
        assert {"--zone=zone", "--project=mine", "--worker=all"} <= set(command)
    assert copy[4] == "scp"
    assert "./luspo_jax[tpu,gs]" in install[-1]
    assert "10.0.0.2:/runs /mnt/runs" in mount[-1]
    for command in (install, mount):
        assert call("bash", "-n", "-c", command[-1].removeprefix("--command=")).returncode == 0


def test_tpu_vm_stops_by_name_without_stopping_itself(call):
    ran = call("bash", "launch/tpu_vm.sh", "stop", "--dry_run", TPU="slice", ZONE="zone")
    assert "[e]xperiments.train" in ran.stdout


# ---------------------------------------------------------------------- Kubernetes


def _manifest(call, *flags, **variables):
    given = {"IMAGE": "registry/luspo_jax:1", "CLAIM": "runs"} | variables
    ran = call("bash", "launch/gke_job.sh", "--dry_run", QUICKSTART, *flags, **given)
    assert ran.returncode == 0, ran.stderr
    service, job = yaml.safe_load_all(ran.stdout)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    return service, job, job["spec"]["template"]["spec"]


@pytest.mark.parametrize("hosts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_kubernetes_container_runs(call, tmp_path, hosts):
    workdir = f'--workdir={tmp_path}/a "run" $(HOME)\\'
    _, _, pod = _manifest(call, workdir, HOSTS=str(hosts))
    (container,) = pod["containers"]
    # Kubernetes reads $$( in an argument as $(.
    arguments = [argument.replace("$$(", "$(") for argument in container["args"]]
    assert arguments[-1] == workdir
    *command, script, name = container["command"]
    if hosts == 2:  # of which the one here is to be the only one
        place = f"127.0.0.1:{_free_port()}"
        script = script.replace("luspo-0.luspo:8476", place).replace("processes=2", "processes=1")
        assert place in script
    (tmp_path / "bin" / "python").symlink_to(
        _script(tmp_path / "python", f'exec {sys.executable} "$@"')
    )
    ran = call(*command, script, name, *arguments, "--dry_run", JOB_COMPLETION_INDEX="0")
    assert ran.returncode == 0, ran.stderr
    assert TOLD in ran.stdout
    assert ("process 0 of 1" in ran.stdout) == (hosts == 2)


def test_kubernetes_pods_find_each_other_and_come_back(call):
    service, job, pod = _manifest(call, "--workdir=/runs/x", HOSTS="4", NAME="mine")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"] == "mine"
    assert "--coordinator=mine-0.mine:8476" in pod["containers"][0]["command"][2]
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 4
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"]}
    assert rules["FailJob"]["onExitCodes"]["values"] == [2]
    assert rules["Ignore"]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert pod["restartPolicy"] == "Never"  # which a failure policy needs
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_pods_need_no_claim_where_a_bucket_is_the_workdir(call):
    given = {"CLAIM": "", "ACCOUNT": "trainer"}
    _, _, pod = _manifest(call, "--workdir=gs://bucket/run", **given)
    assert pod["serviceAccountName"] == "trainer"
    assert {"name": "runs", "emptyDir": {}} in pod["volumes"]
    ran = call("bash", "launch/gke_job.sh", QUICKSTART, "--workdir=/runs/x", IMAGE="i")
    assert ran.returncode == 2
    assert "without CLAIM, which is mounted at /runs, the workdir must be in a bucket" in ran.stderr


def test_one_host_keeps_the_log_of_a_bucket_here(call, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho ran; exit 2\n")
    (tmp_path / "python").chmod(0o755)
    recipe = ROOT / "launch" / "one_host.sh"
    line = f"cd {tmp_path} && bash {recipe} {QUICKSTART} --workdir=gs://bucket/run/"
    ran = call("bash", "-c", line, PYTHON=str(tmp_path / "python"))
    assert ran.returncode == 2, ran.stderr
    assert (tmp_path / "run.log").read_text() == "ran\n"
    assert not (tmp_path / "gs:").exists()


def test_kubernetes_tpu_slices_are_asked_for(call):
    slice_ = {"ACCELERATOR": "tpu", "TPU_TYPE": "tpu-v5p-slice", "TPU_TOPOLOGY": "2x2x4"}
    _, _, pod = _manifest(call, "--workdir=/runs/x", HOSTS="4", **slice_)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert "--distributed=auto" in container["command"][2]
    assert "--coordinator" not in container["command"][2]


def test_kubernetes_slices_must_have_the_chips_of_the_hosts(call):
    given = {"IMAGE": "i", "CLAIM": "c", "ACCELERATOR": "tpu", "TPU_TYPE": "t", "HOSTS": "2"}
    ran = call(
        "bash", "launch/gke_job.sh", "--dry_run", QUICKSTART, "--workdir=/runs/x",
        TPU_TOPOLOGY="2x2x4", **given,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "2x2x4 has 16 chips, and HOSTS=2 of CHIPS=4 make 8" in ran.stderr


# ---------------------------------------------------------------------- what is promised


def test_another_kind_of_address_is_refused_and_no_folder_of_its_name_made(call):
    with pytest.raises(PlaceError, match="az:// is not known"):
        check_place("az://bucket/run")
    ran = call(
        sys.executable, "-m", "experiments.train", QUICKSTART, "--workdir=az://bucket/run",
        "--coordinator=127.0.0.1:1", "--num_processes=1", "--process_id=0",
    )  # fmt: skip
    assert ran.returncode == 1
    assert "az://bucket/run: az:// is not known: name a folder, gs:// or s3://" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (ROOT / "az:").exists()


@pytest.mark.parametrize("path", ["runs/x", "/mnt/a:b/x", "", "gs://bucket/run", "s3://b"])
def test_paths_of_the_file_system_are_taken(path):
    check_place(path)


def test_messages_in_the_page_are_those_of_the_code():
    """Every message of the table of failures, piece by piece between its dots."""
    page = (ROOT / "docs" / "launch.md").read_text()
    table = page.split("## When it does not start")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(messages) >= 10
    sources = "\n".join(
        file.read_text()
        for folder in ("luspo_jax", "experiments")
        for file in (ROOT / folder).rglob("*.py")
    )
    joined = re.sub(r'"\s*\n\s*(?:\+ )?\(?f?"', "", sources)  # one literal over several lines
    missing = [
        piece
        for message in messages
        for piece in map(str.strip, message.split("…"))
        if piece and piece not in joined
    ]
    assert not missing


def test_metrics_and_files_in_the_page_exist():
    from luspo_jax.metrics import declared

    page = (ROOT / "docs" / "launch.md").read_text()
    prefixes = ("rollout_corr/", "rollout/", "packing/", "timing_s/", "perf/", "actor/")
    names = [n for n in re.findall(r"`([a-z_0-9]+/[a-z_/0-9@]+)`", page) if n.startswith(prefixes)]
    assert names
    for name in names:
        declared(name)
    files = re.findall(r"\b(?:launch|configs)/[a-zA-Z_0-9.]+\w", page)
    assert files
    assert all((ROOT / file).is_file() for file in files)
