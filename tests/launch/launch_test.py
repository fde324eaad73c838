"""What can be checked of the scripts without the services that they ask."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from tests.train import process_

FOLDER = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(p for p in FOLDER.iterdir() if p.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def tpu_vm(*arguments, folder=FOLDER, **variables):
    env = os.environ | {"DRY": "1", "ZONE": "us-x", "PROJECT": "p"} | variables
    command = ["bash", folder / "tpu_vm.sh", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_commands_for_tpu_vms():
    code, said, _ = tpu_vm("create", "mine", SPOT="1")
    assert code == 0
    assert said.split()[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mine"]
    assert {"--accelerator-type=v5litepod-16", "--zone=us-x", "--spot"} <= set(said.split())
    _, said, _ = tpu_vm("run", "mine", "--config.augment=flip | mixup(0.2)")
    assert "--worker=all" in said and "experiments.main" in said and "--distributed" in said
    assert r"\'--config.augment=flip\ \|\ mixup\(0.2\)\'" in said
    code, said, error = tpu_vm("start", "mine")
    assert code == 2 and said == "" and "asks for the slice" in error


def fields(schema, given, where="manifest"):
    """Raises unless a manifest has the fields that a schema of nested dicts and types asks for."""
    if isinstance(schema, type):
        assert isinstance(given, schema), where
    elif isinstance(schema, list):
        assert isinstance(given, list) and given, where
        for number, part in enumerate(given):
            fields(schema[0], part, f"{where}[{number}]")
    elif isinstance(schema, dict):
        assert isinstance(given, dict), where
        unknown = {name for name in given if name not in schema and f"{name}?" not in schema}
        assert not unknown, f"{where} has {unknown}"
        for name, part in schema.items():
            if not name.endswith("?") or name[:-1] in given:
                bare = name.removesuffix("?")
                assert bare in given, f"{where} needs {bare}"
                fields(part, given[bare], f"{where}.{bare}")
    else:
        assert given == schema, where


# Of the Kubernetes API (batch/v1 Job, v1 Pod) and jobset.x-k8s.io/v1alpha2 what the manifest uses.
POD = {
    "restartPolicy": "Never", "terminationGracePeriodSeconds?": int, "nodeSelector": dict,
    "containers": [{
        "name": str, "image": str, "command": [str], "resources": {"limits": dict},
        "volumeMounts": [{"name": str, "mountPath": str}],
    }],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}  # fmt: skip
JOB = {
    "parallelism": int, "completions": int, "completionMode": "Indexed", "backoffLimit": int,
    "template": {"spec": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": str},
    "spec": {
        "failurePolicy?": {"maxRestarts": int},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}  # fmt: skip


def test_the_manifest():
    manifest = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    fields(JOBSET, manifest)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"]  # all hosts at once
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert "--config=digits" in container["command"]  # no path: the image need not hold a clone
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    workdir = next(a for a in container["command"] if a.startswith("--workdir="))
    assert workdir.startswith(f"--workdir={container['volumeMounts'][0]['mountPath']}/")


def script(path, *lines):
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines]))
    path.chmod(0o755)
    return path


@pytest.fixture
def install(tmp_path):
    """(folder of the script) -> the project's folder on a host, after one more install."""
    (host := tmp_path / "host").mkdir()
    script(tmp_path / "gcloud", f"cd {host}", 'if [[ $4 == scp ]]; then cp "$5" .; exit; fi',
           'for a; do [[ $a != --command=* ]] || HOME=$PWD bash -c "${a#*=}"; done')  # fmt: skip
    script(tmp_path / "uv", 'echo "$@" >> uv; mkdir -p .venv')

    def run(folder=FOLDER):
        path = f"{tmp_path}:{os.environ['PATH']}"
        code, _, error = tpu_vm("install", "mine", folder=folder, DRY="0", PATH=path)
        assert code == 0, error
        return host / "saflex_jax"

    return run


@pytest.mark.skipif(not (FOLDER.parent / ".git").exists(), reason="needs the repository")
def test_tpu_vms_get_the_last_commit_and_are_installed_again(install):
    install()
    folder = install()
    there = {path.name for path in folder.iterdir()}
    assert {"setup.py", "experiments", ".venv"} <= there and not {".git", "data", "runs"} & there
    made, installed = (folder / "uv").read_text().splitlines()[2:]
    assert made == "venv -q --allow-existing --python >=3.11 .venv"
    assert installed == "pip install -q -e .[experiments] jax[tpu]"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_tpu_vms_keep_no_file_that_was_deleted_here_and_all_that_is_theirs(install, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(FOLDER, repository / "launch")
    (repository / "a b").mkdir()
    for name in ("gone.py", "a b/gone.py", "a b/stays.py"):
        (repository / name).write_text("old")

    def commit():
        git = ["git", "-C", repository, "-c", "user.name=x", "-c", "user.email=x"]
        for command in (["init", "-q"], ["add", "--all"], ["commit", "-qm", "x"]):
            subprocess.run([*git, *command], check=True)

    commit()
    there = install(repository / "launch")
    (there / "data").mkdir()
    (there / "data" / "gone.py").touch()
    for name in ("gone.py", "a b/gone.py"):
        assert (there / name).exists()
        (repository / name).unlink()
    (repository / "a b" / "stays.py").write_text("new")
    commit()
    install(repository / "launch")
    files = {str(path.relative_to(there)) for path in there.rglob("*.py")}
    assert files == {"a b/stays.py", "data/gone.py"}
    assert (there / "a b" / "stays.py").read_text() == "new" and (there / ".venv").exists()


def test_all_processes_end_when_one_fails(tmp_path):
    lines = ["[[ $1 != -c ]] || exec echo 1234", "[[ $* != *--process=1* ]] || exit 3"]
    python = script(tmp_path / "python", *lines, "exec sleep 60")
    begun = time.monotonic()
    command, env = [FOLDER / "local.sh", "3"], os.environ | {"PYTHON": str(python)}
    assert subprocess.run(command, env=env, timeout=30).returncode == 3
    assert time.monotonic() - begun < 20


def test_each_slurm_process_sees_the_gpus_of_its_node(tmp_path):
    # JAX takes GPU number SLURM_LOCALID.
    said = dict(
        re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (FOLDER / "slurm.sbatch").read_text(), re.M)
    )
    assert said["gpus-per-node"] == said["ntasks-per-node"] and "gpus-per-task" not in said
    script(tmp_path / "srun", 'echo "$@"')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "8"}
    command = ["bash", FOLDER / "slurm.sbatch", "--config=digits"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    options, program = done.stdout.split(" python -m experiments.main ")
    assert {"--gpu-bind=none", "--cpus-per-task=8"} <= set(options.split())
    assert program.split() == ["--distributed", "--noprogress", "--config=digits"]


@pytest.mark.slow
def test_a_run_of_four_processes_on_this_host(tmp_path):
    env = process_.environment(tmp_path / "compiled") | {"PYTHON": sys.executable}
    options = [f"--config.{name}={value}" for name, value in process_.OVERRIDES.items()]
    command = [FOLDER / "local.sh", "4", "--config=experiments/configs/wdbc.py", "--noprogress"]
    command += [f"--workdir={tmp_path / 'run'}", *options, "--config.train.steps=12"]
    done = subprocess.run(
        command, env=env, cwd=process_.ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 12
    said = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert len(said) == 1  # the first process alone says so
