"""Plans: targets, what a compiled program says, and what does not fit."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vitjax import cli, config, experiment, parallel
from vitjax.errors import InputError
from vitjax.planning import estimate, plan, program, search, targets

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs vitjax[tpu] (or [plan])"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs vitjax[plan]"
)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tpu:v5e:15x16", r"no v5e slice 15x16; close ones: 16x16"),
        ("tpu:v5p:4x4", "not of the form AxBxC"),
        ("tpu:v9:4x4", r"unknown kind 'v9'; did you mean 'v4'"),
        ("gpu:h100:8", "SLICESxHOSTSxGPUS"),
        ("gpu:a100:1x1x8", "unknown kind 'a100'"),
        ("cpu:0", "cpu:N"),
        ("tpv:v5e:4x4", "did you mean 'tpu'"),
        ("tpu:v5e", "SLICES"),
    ],
)
def test_a_target_that_does_not_exist_is_refused_with_close_ones(name, words):
    with pytest.raises(InputError, match=words):
        targets.parse_target(name)


def test_targets_count_their_devices():
    counts = {"tpu:v5e:16x16": 256, "tpu:v5p:4x4x8:2": 256, "gpu:h100:2x4x8": 64,
              "tpu:tpu7x:4x4x4": 128, "cpu:12": 12}  # fmt: skip
    assert {name: targets.parse_target(name).num_devices for name in counts} == counts


def test_a_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'vitjax\[tpu\]'"):
        targets.prepare(targets.parse_target("tpu:v5e:4x4"))


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,2]<=[4]", [0, 1]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [0, 2]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [0, 2]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}", [0, 2]),
        ("source_target_pairs={{0,0},{1,3}}", [1, 3]),
        ("", [0, 1, 2, 3]),
    ],
)
def test_every_notation_of_groups_is_read(text, group):
    assert program.first_group(text, 4) == group


def test_collectives_inside_a_scan_count_every_trip():
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
    weights = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    rows = NamedSharding(mesh, PartitionSpec("fsdp", None))

    def run(x, stacked):
        def body(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return jax.lax.scan(body, x, stacked)[0]

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32, sharding=weights)
    text = jax.jit(run).lower(x, w).compile().as_text()
    found = program.collectives(text, dict(mesh.shape))
    gathers = [c for c in found if c.kind == "all-gather"]
    assert [(c.axes, c.group_size, c.payload, c.count) for c in gathers] == [
        (("fsdp",), 4, 32 * 32 * 4, 7)
    ]
    assert gathers[0].bytes_moved == 7 * 32 * 32 * 4 * 3 / 4


def test_a_send_between_slices_is_an_all_reduce_of_the_first_axis():
    text = """
ENTRY %main () -> f32[] {
  %send.1 = (bf16[16,8]{1,0}, u32[], token[]) send(%x, %y), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2,3,4}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""  # noqa: E501
    (found,) = program.collectives(text, {"replica": 4, "fsdp": 4, "tensor": 1})
    assert (found.kind, found.axes, found.group_size) == ("all-reduce", ("replica",), 4)
    assert found.payload == 256
    assert found.bytes_moved == 2 * 256 * 3 / 4


def tiny(make_config, **changes):
    return make_config(model__width=64, model__mlp_dim=256, model__num_heads=4, **changes)


def test_state_of_a_device_is_its_share(make_config):
    config = tiny(make_config)
    config.mesh = {"replica": 1, "fsdp": 4, "tensor": 2}
    exp = experiment.build(config)
    parts = estimate.state_bytes(exp)
    state = exp.fresh_state()
    held = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(state))
    assert sum(parts.values()) == held
    assert held < 1.1 * sum(x.nbytes for x in jax.tree.leaves(state)) / 8


@pytest.mark.parametrize("mesh", [(1, 8, 1), (8, 1, 1), (2, 4, 1), (1, 2, 4)])
def test_the_least_traffic_is_that_of_the_table(mesh, make_config):
    """By hand: every matrix twice gathered and once scattered, or its gradient all-reduced."""
    config = tiny(make_config)
    config.mesh = dict(zip(parallel.AXES, mesh, strict=True))
    exp = experiment.build(config)
    total = sum(c.bytes_moved for c in estimate.least_collectives(exp))
    replica, fsdp, tensor = mesh
    leaves = jax.tree.leaves_with_path(exp.abstract_state.params)
    expected = 0.0
    for path, leaf in leaves:
        name = parallel.path_name(path)
        split = tensor > 1 and name.startswith("blocks/") and (
            "kernel" in name or name.endswith(("qkv/bias", "up/bias"))
        )  # fmt: skip
        size = leaf.size * 4 / (tensor if split else 1)
        spec = jax.tree.leaves(exp.state_shardings.params)[[p for p, _ in leaves].index(path)].spec
        used = [a for entry in spec for a in (entry if isinstance(entry, tuple) else (entry,)) if a]
        ways = int(np.prod([exp.mesh.shape[a] for a in used if not (split and a == "tensor")]))
        expected += 3 * size * (ways - 1) / ways
        data = [n for n, a in ((replica, "replica"), (fsdp, "fsdp")) if n > 1 and a not in used]
        copies = int(np.prod(data))
        expected += 2 * size / ways * (copies - 1) / copies
    if tensor > 1:
        payload = 32 // (replica * fsdp) * 16 * 64 * 4
        expected += 4 * config.model.depth * 2 * payload * (tensor - 1) / tensor
    assert total == pytest.approx(expected, rel=0.02)


def test_parameters_that_no_axis_divides_are_said_to_stay_whole(make_config):
    config = make_config(model__width=792, model__num_heads=12, model__mlp_dim=1024)
    config.mesh = {"replica": 1, "fsdp": 8, "tensor": 1}
    exp = experiment.build(config)
    assert estimate.whole_bytes(exp) == (0, 0)
    config.model.update(width=780, num_heads=12, mlp_dim=1020)
    exp = experiment.build(config)
    qkv, out, mlp = 3 * 780 * 780, 780 * 780, 2 * 780 * 1020
    assert estimate.whole_bytes(exp) == (2 * 4 * (qkv + out + mlp), 4)


def test_a_plan_for_virtual_devices_quotes_no_memory_that_it_cannot_know(make_config):
    config = tiny(make_config)
    config.mesh = {"replica": 1, "fsdp": 8, "tensor": 1}
    target = targets.parse_target("cpu:8")
    found = plan.make_plan(config, target, jax.devices(), name="tiny")
    assert found.available is None and found.fits is None and found.run is None
    assert found.flops["model"] == found.flops["hardware"]
    text = plan.report.table(found)
    assert "not known" in text and "all-gather over fsdp" in text


def test_auto_mesh_is_resolved_and_recorded_as_asked(make_config):
    changed = config.override(make_config(), ["mesh=auto"])
    exp = experiment.build(changed)
    assert dict(exp.mesh.shape) == {"replica": 1, "fsdp": 8, "tensor": 1}
    with pytest.raises(InputError, match="'auto'"):
        experiment.build(search.changed(changed, mesh="automatic"))


def test_search_tries_every_legal_mesh_and_ranks_what_fits_first(make_config):
    target = targets.Target("gpu:h100:1x1x8", "gpu", "h100", (1, 8))
    found = search.candidates(tiny(make_config), target, jax.devices())
    assert {c.remat for c in found} == set(search.REMAT)
    assert {c.batch_size for c in found} == {8, 16, 32, 64, 128}
    wanted = {(r, 8 // r // t, t) for t in (1, 2, 4) for r in (1, 2, 4, 8) if 8 % (r * t) == 0}
    assert {tuple(c.mesh.values()) for c in found} == wanted  # four heads: no tensor axis of 8
    rates = [c.images_per_second for c in found]
    assert rates == sorted(rates, reverse=True)
    shapes = {tuple(m.values()) for m in search.meshes(8, 2, 4)}
    assert shapes == {(2, 4, 1), (4, 2, 1), (8, 1, 1), (2, 2, 2), (4, 1, 2), (2, 1, 4)}


def run_plan(tmp_path, *words):
    """A plan in a process of its own, as a user runs it."""
    out = tmp_path / "plan.json"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "vitjax", "plan", *words, f"--json={out}"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def by_axis(lines):
    totals: dict = {}
    for _, axes, size in lines:
        totals[axes] = totals.get(axes, 0.0) + size
    return totals


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("tpu:v5e:16x16", marks=needs_tpu),
        pytest.param("gpu:h100:1x32x8", marks=needs_cuda),
    ],
)
def test_vit_22b_fits_256_devices_and_moves_no_more_than_it_must(target, tmp_path):
    words = ["--config=vit_22b", f"--target={target}", "--config.batch_size=1024"]
    found, text = run_plan(tmp_path, *words, "--price=1")
    state = sum(found["state"].values())
    assert state == pytest.approx(found["state_total"] / 256, rel=0.02)
    assert found["fits"] and found["memory"]["peak"] < 6e9
    assert found["memory"]["arguments"] == pytest.approx(state, rel=0.02)
    moved, least = by_axis(found["collectives"]), by_axis(found["least"])
    for axes in ("fsdp", "tensor"):
        assert moved[axes] == pytest.approx(least[axes], rel=0.1)
    assert found["run"]["cost_high"] == pytest.approx(found["run"]["device_hours_high"])
    assert "binds" in text and "fsdp 64, tensor 4" in text


@needs_tpu
def test_what_does_not_fit_says_by_how_much_and_what_would(tmp_path):
    words = ["--config=vit_l16_jft", "--target=tpu:v5e:2x4", "--config.model.remat=none"]
    found, text = run_plan(tmp_path, *words)
    assert not found["fits"] and found["headroom"] < 0
    assert "DOES NOT FIT, by" in text
    assert any("remat=" in line or "batch_size=" in line for line in found["advice"])


@needs_tpu
def test_only_gradients_cross_between_slices(tmp_path):
    words = ["--config=vit_l16_jft", "--target=tpu:v5e:2x4:2", "--config.mesh.replica=2"]
    found, _ = run_plan(tmp_path, *words, "--config.batch_size=256")
    moved = by_axis(found["collectives"])
    whole = 2 * found["num_params"] / 8  # bfloat16, each device its part; a ring of two
    assert moved["replica"] == pytest.approx(whole, rel=0.1)


@needs_tpu
def test_offloading_moves_activations_and_slots_off_the_device(tmp_path):
    words = ["--config=vit_l16_jft", "--target=tpu:v5e:4x4", "--config.batch_size=512"]
    kept, _ = run_plan(tmp_path, *words, "--config.model.remat=full")
    moved, _ = run_plan(
        tmp_path, *words, "--config.model.remat=offload", "--config.optimizer.offload=True"
    )
    tokens = 512 // 16 * 196 * 1024 * 2 * 24
    assert kept["memory"]["temporary"] - moved["memory"]["temporary"] > 0.8 * tokens
    saved = kept["memory"]["arguments"] - moved["memory"]["arguments"]
    assert saved > 0.9 * kept["state"]["optimizer"]  # tiling pads the slots on the device
    assert moved["state"]["optimizer"] < 1000  # step counts stay


def test_wrong_options_are_refused(capsys):
    base = ["plan", "--config=quickstart", "--target=cpu:1"]
    for words, expected in (
        (["--price=-1"], "--price"),
        (["--best=0"], "--best"),
    ):
        assert cli.main([*base, *words]) == cli.WRONG_INPUT
        assert expected in capsys.readouterr().err
