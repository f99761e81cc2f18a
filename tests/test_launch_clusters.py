"""The JobSet that the recipe of GKE prints, and the task of SkyPilot: field by field, and by the
projects' own packages where they are installed.
"""

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLAGS = ("--config=configs/quickstart.py", "--workdir=/runs/x")
SLICE = {
    "ACCELERATOR": "tpu", "TPU_TYPE": "tpu-v5p-slice", "TPU_TOPOLOGY": "2x2x4", "HOSTS": "4",
}  # fmt: skip
GPUS = {"HOSTS": "4"}


def _print(*flags, **variables):
    given = {"IMAGE": "registry/luspo_jax:1", "CLAIM": "runs"} | variables
    return subprocess.run(
        ["bash", "launch/gke_job.sh", "--dry_run", *flags],
        cwd=ROOT, env={"PATH": os.environ["PATH"]} | given, capture_output=True, text=True,
    )  # fmt: skip


def _documents(*flags, **variables):
    ran = _print(*FLAGS, *flags, **variables)
    assert ran.returncode == 0, ran.stderr
    return list(yaml.safe_load_all(ran.stdout))


# ---------------------------------------------------------------------- JobSet


@pytest.mark.parametrize("slices", [1, 3])
def test_a_jobset_has_a_job_of_all_hosts_for_each_slice(slices):
    (jobset,) = _documents("--config.a=$(x)", SLICES=str(slices), NAME="mine", **SLICE)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"] == {
        "name": "mine",
        "labels": {},
        "annotations": {  # a slice is a node pool, and a node pool holds one Job
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == slices
    job = replicated["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 4
    assert job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"] == [*FLAGS, "--config.a=$$(x)"]
    # What tells processes and slices of each other comes from GKE; a value of ours would hide it.
    assert "--distributed=auto" in container["command"][2]
    assert not [e for e in container["env"] if e["name"].startswith(("MEGASCALE_", "TPU_"))]


def test_pods_of_a_jobset_are_those_of_the_job():
    """What a container runs, mounts and asks for does not depend on the kind."""
    _, job = _documents(**SLICE)
    (jobset,) = _documents(SLICES="2", **SLICE)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["template"]["spec"]["template"] == job["spec"]["template"]


def _action_of_jobset(spec, reason, message):
    """JobSet's rule (v0.12): the first whose reasons and patterns both match, else a restart."""
    for rule in spec["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("exit_code", "disrupted", "action"),
    [
        (2, False, "FailJobSet"),  # a flag or configuration
        (143, False, "RestartJobSetAndIgnoreMaxRestarts"),  # asked to end, with another
        (143, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),  # preempted, and not done in time
        (137, False, "RestartJobSet"),  # out of memory
        (1, False, "RestartJobSet"),
        (12, False, "RestartJobSet"),
        (22, False, "RestartJobSet"),
    ],
)
def test_a_failure_of_one_slice_restarts_all_unless_it_is_a_configuration(
    exit_code, disrupted, action
):
    """Kubernetes takes the first rule that matches a failed pod; the Job's message names it."""
    (jobset,) = _documents(SLICES="2", RETRIES="7", **SLICE)
    spec = jobset["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    assert spec["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        end = f"matching FailJob rule at index {index}"
        if exit_code in rule.get("onExitCodes", {}).get("values", []):
            reason = "PodFailurePolicy"
            message = f"Container train for pod a/b failed with exit code {exit_code} {end}"
            break
        if disrupted and rule.get("onPodConditions"):
            reason, message = "PodFailurePolicy", f"Pod a/b has condition DisruptionTarget {end}"
            break
    assert _action_of_jobset(spec, reason, message) == action


@pytest.mark.parametrize("variables", [{}, {"SLICES": "1"}, SLICE, SLICE | {"SLICES": "2"}])
def test_a_queue_and_the_grace_are_set_where_asked(variables):
    for given, labels, grace in (
        ({}, {}, 30),
        ({"QUEUE": "team", "GRACE_S": "300"}, {"kueue.x-k8s.io/queue-name": "team"}, 300),
    ):
        *_, workload = _documents(**variables, **given)
        assert workload["metadata"]["labels"] == labels
        job = workload["spec"]
        if workload["kind"] == "JobSet":
            job = job["replicatedJobs"][0]["template"]["spec"]
        assert job["template"]["spec"]["terminationGracePeriodSeconds"] == grace


def test_hosts_of_gpus_are_one_slice_that_finds_its_first_pod():
    (jobset,) = _documents(SLICES="1", NAME="mine", **GPUS)
    assert jobset["metadata"]["annotations"] == {}, "they share a node pool with others"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    # jobset-job-index of the job-index of the pod.network
    first = f"mine-{replicated['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    assert f"--coordinator={first}:8476 --num_processes=4" in pod["containers"][0]["command"][2]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (GPUS | {"SLICES": "2"}, "hosts of GPUs are one slice"),
        (SLICE | {"HOSTS": "1", "TPU_TOPOLOGY": "2x2x1", "SLICES": "2"}, "slices of several hosts"),
    ],
)
def test_slices_that_cannot_be_joined_are_refused(variables, message):
    ran = _print(*FLAGS, **variables)
    assert ran.returncode == 2
    assert message in ran.stderr


# ---------------------------------------------------------------------- SkyPilot


@pytest.fixture
def task():
    return yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())


def _run(task, tmp_path, **variables):
    given = task["envs"] | {"WORKDIR": f"{tmp_path}/a run", "FLAGS": "--dry_run"}
    given |= {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "0"} | variables
    return subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=ROOT, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | given,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, []),
        ({"EXTRA": "tpu"}, []),
        (
            {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"},
            ["--coordinator=10.0.0.1:8476", "--num_processes=2", "--process_id=1"],
        ),
        (
            {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "EXTRA": "tpu"},
            ["--distributed=auto"],
        ),
    ],
)
def test_skypilot_starts_the_run_on_every_node(task, tmp_path, variables, place):
    flags = "--dry_run --config.reward.options='{\"a b\": 1}'"
    ran = _run(task, tmp_path, FLAGS=flags, **variables)
    assert ran.returncode == 0, ran.stderr
    *exports, command = map(shlex.split, ran.stdout.splitlines())
    assert command == [
        f"{tmp_path}/venv/bin/python", "-m", "experiments.train",
        f"--config={task['envs']['CONFIG']}", f"--workdir={tmp_path}/a run", *place,
        '--config.reward.options={"a b": 1}',
    ]  # fmt: skip
    assert ["export", f"JAX_COMPILATION_CACHE_DIR={tmp_path}/.cache/xla"] in exports


def test_skypilot_keeps_the_status_and_the_log_of_each_node(task, tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text("#!/bin/sh\necho ran; exit 2\n")
    python.chmod(0o755)
    ran = _run(task, tmp_path, FLAGS="")
    assert ran.returncode == 2, "an error of the configuration must not be retried"
    assert (tmp_path / "train.log").read_text() == "ran\n"
    assert not (tmp_path / "a run.log").exists(), "nodes must not write one log together"


def test_skypilot_takes_a_bucket_and_keeps_what_is_compiled_on_the_node(task, tmp_path):
    ran = _run(task, tmp_path, FLAGS="--dry_run", WORKDIR="gs://bucket/run")
    assert ran.returncode == 0, ran.stderr
    *exports, command = map(shlex.split, ran.stdout.splitlines())
    assert "--workdir=gs://bucket/run" in command
    kept = [path for _, path in exports if path.startswith("JAX_COMPILATION_CACHE_DIR=")]
    assert kept == [f"JAX_COMPILATION_CACHE_DIR={tmp_path}/.cache/luspo_jax/xla"]


def test_skypilot_refuses_a_workdir_that_a_spot_machine_would_take_with_it(task, tmp_path):
    ran = _run(task, tmp_path, WORKDIR="/mnt/runs/x")
    assert ran.returncode == 2
    assert "nothing is mounted there" in ran.stderr


def test_skypilot_recovers_what_was_asked_to_end_and_nothing_else(task):
    resources = task["resources"]
    assert resources["use_spot"] is True
    assert resources["job_recovery"] == {"strategy": "FAILOVER", "recover_on_exit_codes": [143]}
    assert all(isinstance(value, str) for value in task["envs"].values())
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["setup"] + task["run"]))
    assert set(task["envs"]) - {"RETRIES"} <= used, "a variable that nothing reads"
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


# ---------------------------------------------------------------------- by their own packages


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, GPUS, SLICE, SLICE | {"QUEUE": "team"}])
@pytest.mark.parametrize("version", ["1.30", "1.34", "1.37"])
def test_kubernetes_schemas_take_the_manifests(variables, version):
    """Services and Jobs whole; of a JobSet, whose schema is not Kubernetes', its Job's template."""
    schemas = pytest.importorskip(
        "kubernetes_validate", reason="needs the package kubernetes-validate"
    )
    documents = _documents(**variables)
    (jobset,) = _documents(SLICES="1", **variables)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    for document in [*documents, job | replicated["template"]]:
        schemas.validate(document, version, strict=True)
    with pytest.raises(schemas.ValidationError):
        schemas.validate(documents[-1] | {"spek": {}}, version, strict=True)


@pytest.mark.slow
def test_skypilot_reads_the_task(task):
    sky = pytest.importorskip("sky", reason="needs the package skypilot")
    read = sky.Task.from_yaml(str(ROOT / "launch" / "skypilot.yaml"))
    assert (read.setup, read.run) == (task["setup"], task["run"]), "nothing may be filled in early"
    assert read.envs == task["envs"]
    (resources,) = read.resources
    assert resources.use_spot
    assert resources.accelerators == {"H100": 8}
    assert resources.job_recovery == {"strategy": "FAILOVER", "recover_on_exit_codes": [143]}


@pytest.mark.slow
def test_xpk_prints_a_jobset_that_restarts_what_the_page_says(tmp_path):
    """The page's own lines: all are parsed, and the last is run with --dry-run."""
    pytest.importorskip("xpk", reason="needs the package xpk")
    from xpk.parser.core import set_parser

    lines = re.findall(r"^xpk (.*)$", (ROOT / "docs" / "launch.md").read_text(), re.M)
    for line in lines:
        parser = argparse.ArgumentParser()
        set_parser(parser)
        parser.parse_args(shlex.split(line))  # an unknown flag ends the test
    (line,) = [line for line in lines if line.startswith("workload create ")]
    manifest = tmp_path / "xpk.yaml"
    line = re.sub(r" --storage=\S+", "", line)  # which it looks up in the cluster
    arguments = shlex.split(line.replace("$IMAGE", "i"))
    ran = subprocess.run(
        [sys.executable, "-m", "xpk.main", *arguments, "--dry-run",
         f"--output-manifest-file={manifest}", "--project=p", "--zone=us-east5-a"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    jobset = yaml.safe_load(manifest.read_text())
    assert jobset["kind"] == "JobSet"
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 1
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {1, 137, 143} <= set(rule["onExitCodes"]["values"])
    assert 2 not in rule["onExitCodes"]["values"]
