"""Strict checks of manifests with no cluster: an unknown or misspelt field is an error.

The built-in kinds are checked against Kubernetes' own schemas; a JobSet against what its API
(jobset.x-k8s.io/v1alpha2) has of the fields below, and the Jobs in it as Jobs.
"""

import jsonschema
import kubernetes_validate

VERSION = "1.32"
NAME = {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$", "maxLength": 63}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {"name": NAME, "namespace": NAME, "labels": TEXTS, "annotations": TEXTS}
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
           "RestartJobAndIgnoreMaxRestarts"]  # fmt: skip
# The reasons for which a Job fails (Kubernetes, batch/v1).
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
           "PodFailurePolicy"]  # fmt: skip


def strict(properties, *required):
    return {"type": "object", "properties": properties, "additionalProperties": False,
            "required": list(required)}  # fmt: skip


RULE = strict(
    {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": {"enum": ACTIONS},
        "onJobFailureReasons": {"type": "array", "items": {"enum": REASONS}, "uniqueItems": True},
        "targetReplicatedJobs": {"type": "array", "items": NAME},
    },
    "name",
    "action",
)
COUNT = {"type": "integer", "minimum": 0}
JOBSET = strict(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": strict(METADATA, "name"),
        "spec": strict(
            {
                "network": strict(
                    {
                        "enableDNSHostnames": {"type": "boolean"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                        "subdomain": NAME,
                    }
                ),
                "failurePolicy": strict(
                    {"maxRestarts": COUNT, "rules": {"type": "array", "items": RULE}}
                ),
                "suspend": {"type": "boolean"},
                "ttlSecondsAfterFinished": COUNT,
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": strict(
                        {
                            "name": NAME,
                            "replicas": COUNT,
                            "template": strict({"metadata": strict(METADATA), "spec": {}}, "spec"),
                        },
                        "name",
                        "template",
                    ),
                },
            },
            "replicatedJobs",
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)


def check(document):
    """Raises if a manifest is not one that its API takes."""
    if document["kind"] != "JobSet":
        kubernetes_validate.validate(document, VERSION, strict=True)
        if document["kind"] == "Job":
            check_job(document["spec"], document["metadata"]["name"], [])
        return
    jsonschema.validate(document, JOBSET)
    spec, name = document["spec"], document["metadata"]["name"]
    for group in spec["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}}
        kubernetes_validate.validate(job | group["template"], VERSION, strict=True)
        last = f"{name}-{group['name']}-{group['replicas'] - 1}"
        check_job(group["template"]["spec"], last, spec["failurePolicy"]["rules"])


def check_job(spec, name, rules):
    """What no schema says, but Kubernetes' validation does."""
    pod = spec["template"]["spec"]
    names = [container["name"] for container in pod["containers"]]
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy needs it"
    assert len(f"{name}-{spec['completions'] - 1}") <= 63, "a host name"
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert len({e["name"] for e in container["env"]}) == len(container["env"])
    for rule in spec["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        codes = rule.get("onExitCodes")
        if codes:
            assert codes["containerName"] in names
            assert codes["values"] == sorted(set(codes["values"])), "ordered, each once"
            assert codes["operator"] != "In" or 0 not in codes["values"]
        if rule["action"] == "FailIndex":
            assert "backoffLimitPerIndex" in spec
        if rule["action"] == "FailJob" and rules:
            assert any("PodFailurePolicy" in r["onJobFailureReasons"] for r in rules)
