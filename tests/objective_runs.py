"""What every objective must do in a run, beside what it learns."""

import json
import shutil

import numpy as np
from conftest import use_one_device

from vitjax import experiment, parallel, warm_start
from vitjax.checkpoints.store import read_contract
from vitjax.telemetry import read_metrics
from vitjax.train import train


def losses(workdir):
    return [row["train/loss"] for row in read_metrics(workdir)]


def arrays_of(step):
    """Names and checksums of everything that was saved."""
    return json.dumps(read_contract(step)["arrays"], sort_keys=True)


def check_mesh(config, finished, rtol):
    """Over eight devices, on every axis, it has the losses of the finished run, of one device.

    That what lies so is saved and restored is shown in test_parallel.py.
    """
    config.mesh.update({"replica": 2, "fsdp": 2, "tensor": 2})
    exp = experiment.build(config)
    loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
    step, state, found = exp.compile(), warm_start.first_state(exp), []
    for number in range(config.total_steps):
        batch = loader.train_batch(number, config.batch_size, config.seed)
        batch = parallel.to_global(batch, exp.mesh, config.batch_size)
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    loader.close()
    np.testing.assert_allclose(found, losses(finished), rtol=rtol)


def check_resume(config, finished, workdir, patch):
    """From step 2 of the finished run it ends at step 4 with the same bits."""
    use_one_device(patch)
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints/4")
    train(config, workdir)
    assert losses(workdir) == losses(finished)
    assert arrays_of(workdir / "checkpoints/4") == arrays_of(finished / "checkpoints/4")
