"""`vitjax launch k8s`: manifests that its APIs take, and what the processes in the pods read."""

import copy
import json
import os
import subprocess

import jsonschema
import k8s_schema
import kubernetes_validate
import pytest
import stand_ins
import yaml
from jax._src.clusters import cloud_tpu_cluster

from vitjax import cli, processes

IMAGE = ["--image=registry.example.com/vitjax:1", "--pvc=runs:/runs"]
TRAIN = ["--", "train", "--config=quickstart", "--workdir=/runs/x"]


@pytest.fixture
def render(capsys):
    """The documents for some options and words, all of them checked."""

    def make(*options, words=TRAIN):
        argv = ["launch", "k8s", "--dry-run", "--no-check", *IMAGE, *options, *words]
        assert cli.main(argv) == 0, capsys.readouterr().err
        found = list(yaml.safe_load_all(capsys.readouterr().out))
        for document in found:
            k8s_schema.check(document)
        return found

    return make


def job_of(documents):
    return documents[-1]["spec"]["replicatedJobs"][0]


def pod_of(documents):
    last = documents[-1]
    job = job_of(documents)["template"] if last["kind"] == "JobSet" else last
    return job["spec"]["template"]["spec"]


def variables(documents, index, **own):
    """What the container of a pod finds: the manifest's, with the pod's own annotations."""
    found = {}
    for entry in pod_of(documents)["containers"][0]["env"]:
        if "value" in entry:
            found[entry["name"]] = entry["value"]
        elif "fieldRef" in entry["valueFrom"]:
            path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            assert entry["valueFrom"]["fieldRef"] == {"fieldPath": path}
            found[entry["name"]] = str(index)
    return found | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index)} | own


def test_gpus_are_one_indexed_job_whose_pods_find_each_other(render, monkeypatch):
    documents = render("--nodes=4", "--gpus-per-node=8", "--name=big", "--namespace=team")
    assert [d["kind"] for d in documents] == ["ServiceAccount", "JobSet"]
    job = job_of(documents)
    assert job["replicas"] == 1
    spec = job["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert pod_of(documents)["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    for index in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", variables(documents, index))
            # JobSet names a pod's host NAME-JOB-JOBINDEX-PODINDEX, in the subdomain NAME.
            assert processes.given() == ("big-train-0-0.big:8476", 4, index)
            # All four given, JAX asks no cluster, and sees all of the pod's GPUs.
            assert os.environ["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7"
            assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"


@pytest.mark.parametrize(
    ("tpu", "slices", "hosts", "chips", "labels"),
    [
        ("v5e:4x4:2", 2, 4, 4, ("tpu-v5-lite-podslice", "4x4")),
        ("v5p:2x2x4", 1, 4, 4, ("tpu-v5p-slice", "2x2x4")),
        ("v6e:2x4", 1, 1, 8, ("tpu-v6e-slice", "2x4")),
        ("v4:2x2x1", 1, 1, 4, ("tpu-v4-podslice", "2x2x1")),
    ],
)
def test_tpu_slices_are_a_job_each_and_jax_reads_what_gke_writes(
    tpu, slices, hosts, chips, labels, render, monkeypatch
):
    documents = render(f"--tpu={tpu}", "--name=big")
    job, pod = job_of(documents), pod_of(documents)
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (slices, hosts)
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert tuple(pod["nodeSelector"].values()) == labels
    topology = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert documents[-1]["metadata"]["annotations"] == topology
    cluster = cloud_tpu_cluster.GkeTpuCluster
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cluster, "wait_for_coordinator", lambda *_: None)
    metadata = "get_tpu_env_value_from_metadata"  # of the node, which knows no other slice
    monkeypatch.setattr(cloud_tpu_cluster, metadata, lambda _: None)
    ranks = []
    for number in range(slices):
        for index in range(hosts):
            # What GKE's admission adds to the pods of a JobSet on TPUs.
            names = ",".join(f"big-train-{number}-{i}.big" for i in range(hosts))
            own = {"TPU_WORKER_ID": str(index), "TPU_WORKER_HOSTNAMES": names}
            if slices > 1:
                own |= {"MEGASCALE_NUM_SLICES": str(slices), "MEGASCALE_SLICE_ID": str(number),
                        "MEGASCALE_COORDINATOR_ADDRESS": "big-train-0-0.big"}  # fmt: skip
            with monkeypatch.context() as patch:
                patch.setattr(os, "environ", variables(documents, index, **own))
                assert os.environ["JAX_PLATFORMS"] == "tpu,cpu"
                if slices * hosts == 1:
                    assert processes.given()[1:] == (1, 0), "nobody to meet"
                    continue
                assert processes.given() is None and processes._detected() == "Kubernetes"
                assert cluster.is_env_present()
                assert cluster.get_coordinator_address(1, None) == "big-train-0-0.big:8482"
                assert cluster.get_process_count() == slices * hosts
                ranks.append(cluster.get_process_id())
    assert ranks == list(range(slices * hosts if slices * hosts > 1 else 0))


def test_failures_are_told_apart(render):
    """As xpk's --restart-on-exit-codes does: all but these fail the set, which else restarts."""
    documents = render("--nodes=2", "--max-restarts=7", "--grace=300")
    policy = documents[-1]["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"][0] | {"name": ""} == {
        "name": "", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]
    }  # fmt: skip
    spec = job_of(documents)["template"]["spec"]
    rule = spec["podFailurePolicy"]["rules"]
    assert spec["backoffLimit"] == 0 and len(rule) == 1 and rule[0]["action"] == "FailJob"
    codes = {"containerName": "vitjax", "operator": "NotIn", "values": [75, 134, 137, 143]}
    assert rule[0]["onExitCodes"] == codes
    assert pod_of(documents)["terminationGracePeriodSeconds"] == 300
    words = [*TRAIN, "--config.checkpoint.preempt_exit_code=42"]
    spec = job_of(render(words=words))["template"]["spec"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [42, 134, 137, 143]


def test_queue_volumes_rights_and_secrets(render, root, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "the-secret-value")
    documents = render(
        "--queue=team", "--bucket=data:/data", "--secret-env=WANDB_API_KEY=wandb/key",
        "--node-label=pool=big", "--cpus=64", "--memory=500Gi",
    )  # fmt: skip
    account, jobset = documents
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    job, pod = job_of(documents), pod_of(documents)
    assert "kueue" not in json.dumps(job), "Kueue counts the set, not its jobs as well"
    claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [{"claimName": "runs"}]
    mounts = {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/runs", "/data", "/dev/shm"}
    template = job["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["containers"][0]["resources"]["requests"] == {"cpu": "64", "memory": "500Gi"}
    assert pod["nodeSelector"] == {"pool": "big"}
    secret = {"secretKeyRef": {"name": "wandb", "key": "key"}}
    assert {"name": "WANDB_API_KEY", "valueFrom": secret} in pod["containers"][0]["env"]
    assert "the-secret-value" not in json.dumps(documents)
    assert account["automountServiceAccountToken"] is pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == account["metadata"]["name"] == jobset["metadata"]["name"]
    documents = render("--service-account=mine")
    assert len(documents) == 1 and pod_of(documents)["serviceAccountName"] == "mine"
    rights = list(yaml.safe_load_all((root / "launch" / "k8s_rights.yaml").read_text()))
    for document in rights:
        k8s_schema.check(document)
    verbs = {verb for rule in rights[0]["rules"] for verb in rule["verbs"]}
    assert "*" not in json.dumps(rights) and "secrets" not in json.dumps(rights)
    assert verbs == {"create", "get", "list", "watch", "patch", "delete"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "failurePolicy", "rules", 0, "onJobFailureReasons"), ["PodFailure"]),
        (("spec", "network", "subdomain"), "A_B"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completion"), 3),
        (("spec", "replicatedJobs", 0, "template", "spec", "completionMode"), 3),
        (("spec", "replicatedJobs", 0, "template", "spec", "backoffLimit"), "0"),
        (("JOB", "podFailurePolicy", "rules", 0, "onExitCodes", "operater"), "In"),
        (("JOB", "podFailurePolicy", "rules", 0, "onExitCodes", "containerName"), "sweep"),
        (("JOB", "podFailurePolicy", "rules", 0, "onExitCodes", "values"), [143, 75]),
        (("JOB", "template", "spec", "restartPolicy"), "OnFailure"),
        (("JOB", "template", "spec", "containers", 0, "arg"), []),
        (("JOB", "template", "spec", "containers", 0, "args"), [1]),
        (("JOB", "template", "spec", "containers", 0, "volumeMounts", 0, "name"), "shn"),
        (("JOB", "template", "spec", "terminationGracePeriod"), 3),
        (("metadata", "name"), "x" * 60),
    ],
)
def test_planted_errors_are_caught(path, value, render):
    document = copy.deepcopy(render("--nodes=2")[-1])
    if path[0] == "JOB":
        path = ("spec", "replicatedJobs", 0, "template", "spec", *path[1:])
    node = document
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    errors = (jsonschema.ValidationError, kubernetes_validate.ValidationError, AssertionError)
    with pytest.raises(errors):
        k8s_schema.check(document)


def expanded(words):
    """Words as Kubernetes hands them on: $$ is a dollar, and $(NAME) would be a variable."""
    for word in words:
        assert "$(" not in word.replace("$$", "")
    return [word.replace("$$", "$") for word in words]


def test_hostile_arguments_arrive_whole(render):
    given = [f"--config.data.root={text}" for text in stand_ins.HOSTILE]
    hostile = "--workdir=/runs/" + stand_ins.HOSTILE[5]
    documents = render(words=[*TRAIN[:3], hostile, *given])
    assert [d["kind"] for d in documents] == ["ServiceAccount", "JobSet"]
    container = pod_of(documents)["containers"][0]
    assert container["command"] == ["vitjax"]
    assert expanded(container["args"]) == ["train", "--config=quickstart", hostile, *given]


@pytest.mark.parametrize("option", ["name", "namespace", "queue", "image", "pvc", "bucket", "cpus",
                                    "service-account", "secret-env", "node-label", "memory",
                                    "gpu-type", "tpu"])  # fmt: skip
def test_hostile_settings_are_refused(option, capsys):
    for text in stand_ins.HOSTILE:
        argv = ["launch", "k8s", "--dry-run", "--no-check", *IMAGE, f"--{option}={text}", *TRAIN]
        assert cli.main(argv) == 2, text
        assert f"--{option}" in capsys.readouterr().err


def test_a_sweep_is_an_indexed_job_of_what_is_left(render, tmp_path, capsys):
    folder = tmp_path / "sweep"
    argv = ["sweep", "plan", "--config=scaling/digits", f"--workdir={folder}",
            "--sweep.isoflop.budgets=(3e8,9e8,2.7e9,8.1e9)", "--sweep.seeds.extra=()",
            "--sweep.trunks.warmup_images=32"]  # fmt: skip
    assert cli.main(argv) == 0
    from vitjax.sweep import attempts
    from vitjax.sweep.table import read_plan

    plan = read_plan(folder)
    for cell in plan.group(1):
        attempts.record(folder, cell.id, "done")
    fit = sorted({c.group for c in plan.cells if c.stage == "fit"} - {1})
    workdir = "/runs/" + stand_ins.HOSTILE[5]
    words = ["--", "sweep", "run", f"--workdir={workdir}"]
    capsys.readouterr()
    document = render("--array", f"--plan={folder}", "--parallel=3", words=words)[-1]
    spec = document["spec"]
    assert (document["kind"], spec["completions"], spec["parallelism"]) == ("Job", len(fit), 3)
    actions = [(r["action"], r.get("onExitCodes", {}).get("values"))
               for r in spec["podFailurePolicy"]["rules"]]  # fmt: skip
    assert actions == [("Ignore", [75, 143]), ("Ignore", None), ("FailIndex", [1, 2])]
    container = pod_of([document])["containers"][0]
    assert not any("VITJAX" in entry["name"] for entry in container["env"]), "each runs alone"
    stand_ins.install(tmp_path / "bin", tmp_path / "calls", vitjax="")
    for index in (0, len(fit) - 1):
        subprocess.run(
            expanded([*container["command"], *container["args"]]), check=True, cwd=tmp_path,
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "JOB_COMPLETION_INDEX": str(index)},
        )  # fmt: skip
        assert stand_ins.calls(tmp_path / "calls")[-1] == [
            "vitjax", "sweep", "run", f"--workdir={workdir}", "--stage=fit", "--workers=1",
            f"--group={fit[index]}",
        ]  # fmt: skip
    assert not list(tmp_path.rglob("ran"))
    argv = ["launch", "k8s", *IMAGE, "--array", f"--plan={folder}", *words, "--retry"]
    assert cli.main(argv) == 2 and "--plan" in capsys.readouterr().err


def test_it_is_submitted_and_read_back(tmp_path, monkeypatch, capfd):
    record = tmp_path / "calls"
    body = f'open("{tmp_path}/manifest", "w").write(sys.stdin.read()); print("created")'
    stand_ins.install(tmp_path / "bin", record, kubectl=f'if "-" in sys.argv: {body}')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert cli.main(["launch", "k8s", "--no-check", "--namespace=team", *IMAGE, *TRAIN]) == 0
    assert "vitjax launch status vitjax-quickstart --on=k8s" in capfd.readouterr().out
    assert stand_ins.calls(record) == [["kubectl", "apply", "--namespace=team", "-f", "-"]]
    assert "kind: JobSet" in (tmp_path / "manifest").read_text()
    label = "-lapp.kubernetes.io/instance=vitjax-quickstart"
    for action, word in (("status", "get"), ("logs", "logs")):
        argv = ["launch", action, "vitjax-quickstart", "--namespace=team"]
        assert cli.main(argv) == 0
        assert stand_ins.calls(record)[-1][:2] == ["kubectl", word]
        assert {label, "--namespace=team"} <= set(stand_ins.calls(record)[-1])
