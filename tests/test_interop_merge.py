"""Weights that are not quite the model's: what is adapted, what is refused, what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitjax
from vitjax import experiment, warm_start
from vitjax import train as train_lib
from vitjax.errors import InputError
from vitjax.interop.layout import named_leaves
from vitjax.interop.merge import plan_merge
from vitjax.models.patches import adapt_patch_channels, resize_patch_kernel
from vitjax.models.positions import RESAMPLINGS, resize_matrix, resize_positions
from vitjax.models.vit import patchify, vit

SMALL = {"channels": 3, "num_classes": 5, "width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 4}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def small(size=16, patch=4, **options):
    return vit(image_size=size, patch_size=patch, **(SMALL | options))


def merged(source, target, **options):
    params = jax.tree.map(lambda x: x + 0.1, source.init(jax.random.key(0)))
    merge = plan_merge(
        named_leaves(params), source, named_leaves(target.abstract_params), target, **options
    )
    return (
        params,
        merge,
        merge.apply(named_leaves(params), named_leaves(target.init(jax.random.key(1)))),
    )


@pytest.mark.parametrize("sizes", [(7, 12), (12, 5), (9, 9), (4, 17)], ids=str)
@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        ("bicubic", {"mode": "bicubic"}),
        ("bicubic_antialias", {"mode": "bicubic", "antialias": True}),
        ("bilinear_antialias", {"mode": "bilinear", "antialias": True}),
        ("bilinear_corners", {"mode": "bilinear", "align_corners": True}),
    ],
)
def test_resampling_equals_torch(sizes, method, theirs):
    torch = pytest.importorskip("torch", reason="needs torch")
    grid, new = (sizes[0], 6), (sizes[1], 11)
    table = np.random.default_rng(0).normal(size=(sizes[0] * 6, 8)).astype(np.float32)
    square = torch.from_numpy(table.reshape(1, *grid, 8).transpose(0, 3, 1, 2).copy())
    wanted = torch.nn.functional.interpolate(square, size=new, **theirs)
    wanted = wanted.numpy()[0].transpose(1, 2, 0).reshape(-1, 8)
    np.testing.assert_allclose(resize_positions(table, grid, new, method), wanted, atol=5e-6)
    there = resize_positions(jnp.asarray(table), grid, new, method)
    np.testing.assert_allclose(there, wanted, atol=5e-6)


@pytest.mark.parametrize("method", RESAMPLINGS)
def test_resampling_keeps_constants(method):
    for size, new in ((5, 9), (9, 5), (14, 16)):
        np.testing.assert_allclose(resize_matrix(size, new, method).sum(1), 1, atol=1e-6)


def test_a_larger_patch_embedding_of_a_resized_patch_is_the_same():
    """FlexiViT's promise: where patches grow, the tokens of enlarged images do not change."""
    kernel = np.random.default_rng(0).normal(size=(4 * 4 * 3, 10)).astype(np.float32)
    patches = np.random.default_rng(1).normal(size=(5, 4, 4, 3)).astype(np.float32)
    line = resize_matrix(4, 7, "bilinear_antialias")
    larger = np.einsum("ay,bx,nyxc->nabc", line, line, patches)
    new = resize_patch_kernel(kernel, 4, 7, 3)
    np.testing.assert_allclose(
        larger.reshape(5, -1) @ new, patches.reshape(5, -1) @ kernel, atol=1e-4
    )


@pytest.mark.parametrize("new", [1, 2, 3, 4, 6])
def test_input_channels(new):
    kernel = np.random.default_rng(0).normal(size=(2 * 2 * 3, 7)).astype(np.float32)
    adapted = adapt_patch_channels(kernel, 2, 3, new)
    assert adapted.shape == (4 * new, 7)
    grey = np.random.default_rng(1).normal(size=(1, 4, 4, 1)).astype(np.float32)

    def embedded(kernel, channels):
        images = jnp.asarray(np.repeat(grey, channels, -1))
        return np.asarray(patchify(images, 2)) @ kernel

    if new % 3 == 0 or new == 1:
        np.testing.assert_allclose(embedded(adapted, new), embedded(kernel, 3), atol=1e-5)


@pytest.mark.parametrize("options", [
    {"pool": "cls"}, {"pool": "gap"}, {"pool": "cls", "num_registers": 3},
    {"pool": "cls", "num_registers": 3, "position_prefix": "all"},
    {"pool": "cls", "position_prefix": "none"},
], ids=str)  # fmt: skip
def test_positions_are_resampled_and_other_tokens_kept_apart(options):
    source, target = small(16, **options), small(24, **options)
    params, merge, taken = merged(source, target)
    assert list(merge.report.resampled) == ["positions"]
    assert "4 x 4 to 6 x 6" in merge.report.resampled["positions"]
    prefix = len(params["positions"]) - 16
    np.testing.assert_array_equal(taken["positions"][:prefix], params["positions"][:prefix])
    wanted = resize_positions(
        np.asarray(params["positions"])[prefix:], (4, 4), (6, 6), "bicubic_antialias"
    )
    np.testing.assert_array_equal(taken["positions"][prefix:], wanted)


def test_a_merge_accounts_for_every_array():
    source = small(16, pool="cls", mask_token=True)
    target = small(24, patch=6, channels=1, num_classes=7, pool="gap", qk_norm=True)
    with pytest.raises(InputError, match=r"differ in 6 arrays[\s\S]*query_norm/scale") as error:
        merged(source, target)
    assert "init.skip" in str(error.value)
    params, merge, taken = merged(
        source, target, skip=("head/.*", ".*_norm/scale"), drop=("cls_token", "mask_token")
    )
    report = merge.report
    assert set(report.resampled) == {"patch_embed/kernel", "positions"}
    assert "patches of 4 to 6 pixels" in report.resampled["patch_embed/kernel"]
    assert "3 to 1 input channels" in report.resampled["patch_embed/kernel"]
    assert report.resampled["positions"] == "1 to 0 rows of tokens before the patches"
    assert {*report.fresh} >= {"head/kernel", "head/bias", "blocks/attention/query_norm/scale"}
    assert {*report.dropped} == {"cls_token", "mask_token", "head/kernel", "head/bias"}
    everything = [*report.loaded, *report.resampled, *report.fresh]
    assert sorted(everything) == sorted(named_leaves(target.abstract_params))
    assert not np.asarray(taken["head/kernel"]).any()
    for name in report.loaded:
        np.testing.assert_array_equal(taken[name], named_leaves(params)[name])
    assert "loaded: " in str(report) and "fresh: 4" in str(report)


def test_another_width_is_refused_by_shape():
    with pytest.raises(
        InputError, match=r"patch_embed/kernel: \(48, 32\) there, \(48, 64\) wanted"
    ):
        merged(small(), small(width=64), skip=("blocks/.*", "norm/.*", "head/.*"))


@pytest.mark.parametrize(
    "changes", [{"image_size": 24}, {"patch_size": 8}, {"image_size": 32, "patch_size": 8}], ids=str
)
def test_loading_at_another_size(changes, native, tmp_path):
    native(pool="cls").save(tmp_path / "a")
    ours = vitjax.load(tmp_path / "a", **changes)
    size, patch = changes.get("image_size", 16), changes.get("patch_size", 4)
    images = np.zeros((2, 30, 40, 3), np.uint8)
    assert ours.tokens(images).shape == (2, 1 + (size // patch) ** 2, 32)
    assert ours.preprocess.image_size == size and ours.report.resampled
    ours.save(tmp_path / "b")
    again = vitjax.load(tmp_path / "b")
    np.testing.assert_array_equal(again.embed(images), ours.embed(images))


def test_another_size_equals_resampling_on_the_way(native, tmp_path):
    """A model resampled once, and one that resamples as it runs, give the same numbers."""
    first = native(pool="cls")
    first.save(tmp_path / "a")
    images = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    resampled = vitjax.load(tmp_path / "a", image_size=24)
    np.testing.assert_allclose(
        resampled.tokens(images, preprocessed=True),
        first.tokens(images, preprocessed=True),
        atol=1e-5,
    )


def test_bad_sizes_are_refused(native, tmp_path):
    native().save(tmp_path / "a")
    for changes, message in (
        ({"image_size": 18}, "image size 18 is not divisible by patch size 4"),
        ({"patch_size": 5}, "image size 16 is not divisible by patch size 5"),
    ):
        with pytest.raises(InputError, match=message):
            vitjax.load(tmp_path / "a", **changes)


def test_training_starts_from_foreign_weights(native, tmp_path, make_config, caplog):
    """An npz of another size, channels and head: adapted, said, and really used."""
    native(size=16, pool="gap", num_classes=3).save(tmp_path / "a.npz", format="npz")
    config = make_config(
        total_steps=3, model__mlp_dim=48, model__num_heads=4, model__patch_size=2,
        model__positions="learned",
    )  # fmt: skip
    config.init.checkpoint = str(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"head/kernel: \(32, 3\) there, \(32, 10\) wanted"):
        train_lib.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.init.skip = ("head/.*",)
    exp = experiment.build(config)
    caplog.set_level("INFO", "vitjax")
    warm_start.check_init(exp)
    assert "resampled: patch_embed/kernel: patches of 4 to 2 pixels" in caplog.text
    assert "3 to 1 input channels" in caplog.text
    started = warm_start.load_init(exp, exp.fresh_state())
    source = vitjax.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(
        started.params["blocks"]["mlp"]["up"]["kernel"],
        source.params["blocks"]["mlp"]["up"]["kernel"],
    )
    assert not np.asarray(started.params["head"]["kernel"]).any()
    train_lib.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()


def test_another_input_contract_is_said(native, tmp_path, make_config, caplog):
    first = native(size=8, channels=1, num_classes=10, patch_size=2, pool="gap")
    first.contract["preprocess"] |= {"mean": (0.2,), "std": (0.1,)}
    first.save(tmp_path / "a")
    config = make_config(model__mlp_dim=48, model__num_heads=4, model__patch_size=2)
    config.model.positions = "learned"
    config.init.checkpoint = str(tmp_path / "a")
    with caplog.at_level("WARNING", "vitjax"):
        warm_start.check_init(experiment.build(config))
    assert "data.mean=(0.2,), this run has" in caplog.text
