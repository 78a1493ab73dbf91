"""What every objective must do in a run, beside what it learns."""

import json
import shutil

import numpy as np
from conftest import use_one_device

from vitjax.checkpoints.store import read_contract
from vitjax.telemetry import read_metrics
from vitjax.train import train

MESHES = ({"replica": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2})


def losses(workdir):
    return [row["train/loss"] for row in read_metrics(workdir)]


def arrays_of(step):
    """Names and checksums of everything that was saved."""
    return json.dumps(read_contract(step)["arrays"], sort_keys=True)


def check_mesh(config, mesh, finished, workdir, rtol):
    """Over a mesh of eight devices it has the losses of the finished run, of one device."""
    config.mesh.update({"replica": 1, "fsdp": 1, "tensor": 1} | mesh)
    train(config, workdir)
    np.testing.assert_allclose(losses(workdir), losses(finished), rtol=rtol)


def check_resume(config, finished, workdir, patch):
    """From step 2 of the finished run it ends at step 4 with the same bits."""
    use_one_device(patch)
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints/4")
    train(config, workdir)
    assert losses(workdir) == losses(finished)
    assert arrays_of(workdir / "checkpoints/4") == arrays_of(finished / "checkpoints/4")
