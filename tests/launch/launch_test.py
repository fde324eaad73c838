"""What can be checked of the scripts without the services that they ask."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

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


def tpu_vm(*arguments, **variables):
    env = os.environ | {"DRY": "1", "ZONE": "us-x", "PROJECT": "p"} | variables
    command = ["bash", FOLDER / "tpu_vm.sh", *arguments]
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
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    workdir = next(a for a in container["command"] if a.startswith("--workdir="))
    assert workdir.startswith(f"--workdir={container['volumeMounts'][0]['mountPath']}/")


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
