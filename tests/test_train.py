"""The step, the loop and the run directory."""

import json
import os
import signal
import threading

import jax
import numpy as np
import pytest
from conftest import draw_curves, use_one_device

from vitjax import curves, experiment, parallel, warm_start
from vitjax import train as train_lib
from vitjax.checkpoints import steps, store
from vitjax.errors import InputError, Preempted
from vitjax.telemetry import MetricWriter, read_metrics

MESHES = {"8-1-1": (8, 1, 1), "1-8-1": (1, 8, 1), "2-2-2": (2, 2, 2), "1-4-2": (1, 4, 2)}


def run_steps(config, steps=3, devices=None):
    """Losses of a few steps, and the state after them."""
    exp = experiment.build(config, devices=devices)
    loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
    step, state = exp.compile(), exp.fresh_state()
    losses = []
    for i in range(steps):
        batch = parallel.to_global(
            loader.train_batch(i, config.batch_size, config.seed), exp.mesh, config.batch_size
        )
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state, exp


@pytest.fixture(scope="module")
def one_device():
    from conftest import tiny_config

    return run_steps(tiny_config(), devices=jax.devices()[:1])[0]


@pytest.fixture(autouse=True)
def single_device(monkeypatch, request):
    """Runs through train() use one of the eight devices."""
    if "mesh" not in request.node.name:
        use_one_device(monkeypatch)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_every_mesh_gives_the_losses_of_one_device(mesh, one_device, make_config):
    config = make_config()
    config.mesh = dict(zip(parallel.AXES, mesh, strict=True))
    losses, state, _ = run_steps(config)
    np.testing.assert_allclose(losses, one_device, rtol=1e-5)
    kernel = state.params["blocks"]["mlp"]["up"]["kernel"]
    shards = mesh[1] * mesh[2]
    assert kernel.addressable_data(0).size == kernel.size // shards
    moments = [
        x for p, x in jax.tree.leaves_with_path(state.opt_state)
        if parallel.path_name(p).endswith("mu/blocks/mlp/up/kernel")
    ]  # fmt: skip
    assert moments[0].addressable_data(0).size == kernel.size // shards


def test_accumulation_equals_the_whole_batch(one_device, make_config):
    losses, _, _ = run_steps(
        make_config(optimizer__accumulation_steps=4), devices=jax.devices()[:1]
    )
    np.testing.assert_allclose(losses, one_device, rtol=1e-5)


def test_unrolled_layers_train_the_same(one_device, make_config):
    losses, _, _ = run_steps(make_config(model__scan=False), devices=jax.devices()[:1])
    np.testing.assert_allclose(losses, one_device, rtol=1e-5)


def test_the_first_loss_is_exactly_log_of_the_classes(one_device):
    assert one_device[0] == pytest.approx(np.log(10), abs=1e-6)


def test_a_step_is_deterministic_and_the_seed_matters(one_device, make_config):
    assert run_steps(make_config(), devices=jax.devices()[:1])[0] == one_device
    assert run_steps(make_config(seed=1), devices=jax.devices()[:1])[0][1:] != one_device[1:]


def test_a_run_leaves_what_the_interface_promises(tmp_path, make_config, monkeypatch):
    monkeypatch.setattr(curves, "_draw", draw_curves)
    config = make_config(optimizer__ema_decay=0.9)
    train_lib.train(config, tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["config"]["total_steps"] == 8
    assert recorded["environment"]["device_count"] == 8
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for name in ("train/loss", "train/learning_rate", "examples", "perf/images_per_second",
                 "perf/mfu", "perf/data_wait_fraction", "time"):  # fmt: skip
        assert all(name in row for row in rows), name
    assert [r["step"] for r in rows if "eval/test/accuracy" in r] == [4, 8]
    assert rows[-1]["eval/test/examples"] == 360
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval/test/accuracy"] == rows[-1]["eval/test/accuracy"]
    assert 0 < summary["goodput"] < 1 and summary["wall_seconds"] > 0
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").open()]
    assert [e for e in events if e not in ("saved", "progress")] == [
        "start", "compile", "first_step", "checkpoint", "checkpoint", "stop",
    ]  # fmt: skip
    assert events.count("saved") == 2
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    log = (tmp_path / "train.log").read_text()
    for word in ("parameters", "GFLOP", "state:", "compiled", "step 8/8", "lr", "img/s", "ETA"):
        assert word in log
    contract = store.read_contract(tmp_path / "checkpoints" / "8")
    assert contract["preprocess"]["image_size"] == 8
    assert contract["description"]["patch_size"] == 2
    assert contract["class_names"] == [str(i) for i in range(10)]


def interrupt_at(monkeypatch, step, error):
    """Makes the loop fail when it begins to collect a step."""
    collect = train_lib._Run._collect

    def failing(self):
        if self.in_flight[0][0] == step:
            error()
        collect(self)

    monkeypatch.setattr(train_lib._Run, "_collect", failing)


@pytest.mark.parametrize("ema", ["None", "0.9"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch, make_config, ema):
    config = make_config(optimizer__ema_decay=ema, model__drop_path_rate=0.2)
    train_lib.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:

        def crash():
            raise KeyboardInterrupt

        interrupt_at(patch, 6, crash)
        with pytest.raises(KeyboardInterrupt):
            train_lib.train(config, tmp_path / "broken")
    train_lib.train(config, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 8)


def assert_same_run(a, b, step):
    """Equal fingerprints of parameters, optimizer and average, equal metrics, each step once."""
    prints = [store.read_contract(d / "checkpoints" / str(step))["arrays"] for d in (a, b)]
    assert prints[0] == prints[1]
    values = []
    for folder in (a, b):
        rows = read_metrics(folder)
        assert len({row["step"] for row in rows}) == len(rows)
        keep = ("train/", "eval/", "step")
        values.append([{k: v for k, v in row.items() if k.startswith(keep)} for row in rows])
    assert values[0] == values[1]


def test_sigterm_saves_and_leaves_and_the_next_start_goes_on(tmp_path, monkeypatch, make_config):
    config = make_config()
    train_lib.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Preempted) as caught:
            train_lib.train(config, tmp_path / "broken")
    assert caught.value.exit_code == 75
    steps = [int(p.name) for p in (tmp_path / "broken" / "checkpoints").iterdir()]
    assert caught.value.step in steps
    train_lib.train(config, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 8)


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, make_config):
    config = make_config(checkpoint__keep_last=1, eval_every=2, checkpoint_every=2)
    config.checkpoint.metric = "eval/test/loss"
    config.checkpoint.mode = "max"  # the untrained model has the largest loss
    train_lib.train(config, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "8"]


def test_fingerprints_see_values_and_places_but_no_sharding():
    from vitjax.fingerprint import fingerprint

    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    mesh = parallel.make_mesh({"fsdp": 8}, jax.devices())
    spread = jax.device_put(x, parallel.batch_sharding(mesh))
    assert fingerprint({"x": x}) == fingerprint({"x": spread})
    swapped, flipped = x.copy(), x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    flipped.view(np.uint32)[3, 3] ^= 1
    prints = [fingerprint({"x": v})["x"] for v in (x, swapped, flipped, x.reshape(8, 16) * 1)]
    assert len(set(prints[:3])) == 3


def test_only_harmless_changes_may_go_on_in_a_workdir(tmp_path, make_config):
    train_lib.train(make_config(total_steps=4), tmp_path)
    with pytest.raises(InputError, match=r"another experiment[\s\S]*optimizer.peak_lr"):
        train_lib.train(make_config(total_steps=4, optimizer__peak_lr=1e-5), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    summary = train_lib.train(make_config(total_steps=4, log_every=2), tmp_path)
    assert summary["step"] == 4
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_that_is_older_than_a_key_goes_on(tmp_path, make_config):
    train_lib.train(make_config(total_steps=4), tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())
    del recorded["config"]["optimizer"]["offload"]
    del recorded["config"]["precision"]["gradients"]
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    train_lib.train(make_config(total_steps=4), tmp_path)
    with pytest.raises(InputError, match=r"optimizer\.offload"):
        train_lib.train(make_config(total_steps=4, optimizer__offload=True), tmp_path)


def test_a_start_that_got_nowhere_does_not_block_the_workdir(tmp_path, make_config, monkeypatch):
    config = make_config(total_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(experiment.Experiment, "compile", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_lib.train(config, tmp_path)
    train_lib.train(make_config(total_steps=2), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["total_steps"] == 2


def test_a_lost_summary_is_written_again(tmp_path, make_config):
    config = make_config(total_steps=4)
    summary = train_lib.train(config, tmp_path)
    (tmp_path / "summary.json").unlink()
    again = train_lib.train(config, tmp_path)
    assert again["eval/test/accuracy"] == summary["eval/test/accuracy"]
    assert (tmp_path / "summary.json").exists()


def test_too_many_unreadable_images_stop_training(tmp_path, make_config):
    from PIL import Image

    for i in range(60):
        (tmp_path / "data" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        path = tmp_path / "data" / f"{i % 2}" / f"{i}.png"
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(path)
        if i % 10 == 0:
            path.write_bytes(b"broken")
    config = make_config()
    folder = "vitjax.data.sources.folders:ImageFolder"
    config.data.unlock()
    config.data.source = {"target": folder, "root": str(tmp_path / "data")}
    with pytest.raises(InputError, match=r"are unreadable[\s\S]*0/\d0.png"):
        train_lib.train(config, tmp_path / "run")


def test_init_takes_weights_and_refuses_those_of_another_model(tmp_path, make_config):
    train_lib.train(make_config(total_steps=4), tmp_path / "a")
    config = make_config(total_steps=4)
    config.init.checkpoint = str(tmp_path / "a")
    exp = experiment.build(config)
    started = warm_start.load_init(exp, exp.fresh_state())
    _, _, trained = steps.open_newest(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, started.params, trained)

    config.model.width = 64
    exp = experiment.build(config)
    with pytest.raises(InputError, match=r"differ in \d+ arrays[\s\S]*blocks/attention/out/bias"):
        train_lib.train(config, tmp_path / "b")
    assert not (tmp_path / "b").exists()

    config.model.update(width=32, num_classes=12)
    config.init.skip = ("head/.*",)
    exp = experiment.build(config)
    started = warm_start.load_init(exp, exp.fresh_state())
    assert started.params["head"]["kernel"].shape == (32, 12)
    assert not started.params["head"]["kernel"].any()
    np.testing.assert_array_equal(started.params["norm"]["scale"], trained["norm"]["scale"])


def test_a_half_written_line_is_cut_off_and_no_step_is_written_twice(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.add(1, {"train/loss": 1.0})
    writer.add(2, {"train/loss": 2.0})
    writer.flush()
    writer.add(3, {"train/loss": 3.0})
    writer.close()  # the row of step 3 may not be whole: its step is run again
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\0" * 40 + '\n{"step": 3, "tra')  # a power cut, and a kill
    writer = MetricWriter(tmp_path)
    for step in (2, 3):
        writer.add(step, {"train/loss": 9.0})
    writer.add(3, {"eval/x": 1.0})
    writer.flush()
    writer.close()
    rows = read_metrics(tmp_path)
    assert [(r["step"], r["train/loss"]) for r in rows] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert rows[-1]["eval/x"] == 1.0


def test_the_loop_leaves_steps_in_flight(tmp_path, monkeypatch, make_config):
    """The metrics of a step are read only after later steps were sent off."""
    lags = []
    collect = train_lib._Run._collect

    def watched(self):
        lags.append(len(self.in_flight) - 1)
        collect(self)

    monkeypatch.setattr(train_lib._Run, "_collect", watched)
    train_lib.train(make_config(eval_every=0, checkpoint_every=0), tmp_path)
    assert lags == [2, 2, 2, 2, 2, 2, 1, 0] or lags[:6] == [2] * 6


BAD = [
    ({"model__patch_size": 3}, "6 and 9"),
    ({"batch_size": 31, "optimizer__accumulation_steps": 2}, "not divisible"),
    ({"model__num_classes": 9}, "10 classes, more than the head's model.num_classes=9"),
    ({"data__source__split": "val"}, "train, test"),
    ({"total_steps": 0}, "total_steps must be at least 1"),
    ({"mesh__tensor": 2}, "does not fit"),
    ({"optimizer__ema_decay": 2.0}, "ema_decay"),
    ({"objective__loss_type": "hinge"}, "softmax, sigmoid"),
    ({"precision__compute": "float16"}, "float32, bfloat16"),
    ({"init__checkpoint": "/nowhere"}, "no such checkpoint"),
    ({"data__std": (0.0,)}, "std must be positive"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_bad_input_is_refused_before_anything_is_written(change, words, tmp_path, make_config):
    with pytest.raises(InputError, match=words):
        train_lib.train(make_config(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_signals_are_left_alone_outside_the_main_thread(make_config, tmp_path):
    failures = []

    def work():
        try:
            train_lib.train(make_config(total_steps=2), tmp_path)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
