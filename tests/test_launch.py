"""The job files of examples/launch: their commands are commands of `dials`, their numbers agree."""

import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from dials_jax.commands import CommandLine, Hosts
from dials_jax.config import TrainConfig

LAUNCH = Path(__file__).parents[1] / "examples" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
JOB_SETS = sorted(LAUNCH.glob("*.yaml"))


def read_command(words):
    """What `dials train ...` is told, and its settings."""
    assert words[:2] == ["dials", "train"]
    given = CommandLine.read("", words[2:])
    return given, given.settings(TrainConfig)


def read_job(path):
    """The one job of a JobSet, its container, and the words of its command."""
    job_set = yaml.safe_load(path.read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = job_set["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = container["command"]
    if words[:2] == ["sh", "-c"]:
        words = shlex.split(words[2].replace('"$JOB_COMPLETION_INDEX"', "1"))
        assert words.pop(0) == "exec"  # so that SIGTERM reaches the command
    return job_set["metadata"]["name"], job, pod, container, words


@pytest.mark.parametrize("path", JOB_SETS, ids=lambda path: path.name)
def test_a_job_set_starts_as_many_processes_as_its_mesh_needs(path):
    name, job, pod, container, words = read_job(path)
    spec, (given, config) = job["template"]["spec"], read_command(words)
    (chips,) = container["resources"]["limits"].values()
    hosts = spec["parallelism"]
    assert spec["completions"] == hosts and spec["backoffLimit"] == 0  # JobSet starts all again
    assert config.mesh.data == job["replicas"] * hosts * chips
    if given.hosts:
        first = f"{name}-{job['name']}-0-0.{name}"
        (port,) = container["ports"]
        assert given.hosts == Hosts(f"{first}:{port['containerPort']}", hosts, 1)
    else:
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert given.distributed and math.prod(map(int, topology.split("x"))) == hosts * chips


@pytest.mark.parametrize("path", JOB_SETS, ids=lambda path: path.name)
def test_results_go_to_what_all_pods_have(path):
    _, _, pod, container, words = read_job(path)
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    given, _ = read_command(words)
    assert given.workdir.startswith(mount["mountPath"] + "/") and mount["name"] == volume["name"]
    assert "claimName" in volume["persistentVolumeClaim"]
    assert pod["terminationGracePeriodSeconds"] >= 300  # a step is saved


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_command_in_the_head_of_a_script_is_one(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    usage = re.search(rf"{path.name} (train (?:[^\\\n]|\\\n# )*)\n", text)[1].replace("\\\n#", "")
    given, config = read_command(["dials", *shlex.split(usage), "--distributed"])
    assert given.workdir and config.mesh.data > 1
    sizes = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", text, re.M))
    if sizes:
        assert sizes["ntasks-per-node"] == sizes["gpus-per-node"]  # Slurm: a process per GPU
        assert config.mesh.data == int(sizes["nodes"]) * int(sizes["gpus-per-node"])


def test_a_slurm_job_that_was_stopped_goes_back_into_the_queue(tmp_path):
    """With stand-ins for Slurm's programs, whose `srun` ends as a run that SIGTERM has stopped."""
    for name, body in (("srun", 'exit "$STATUS"'), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for status, said in ((143, "requeue 7\n"), (0, ""), (2, "")):
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "STATUS": str(status)}
        command = ["bash", str(LAUNCH / "slurm.sh"), "train"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, said)
