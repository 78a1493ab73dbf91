"""Evaluators that look at patches, attention and the spread of features."""

import io
import logging
import math
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix
from test_evals_classifiers import Pixels, make_loader

from vitjax.data.loader import Loader
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources.arrays import Digits
from vitjax.data.sources.segmentation_folder import IGNORED, SegmentationFolder
from vitjax.errors import InputError, UnreadableImage
from vitjax.evals import (
    attention_distance,
    feature_pca,
    health,
    reconstruction,
    ridge,
    segmentation,
)
from vitjax.evals.evaluation import run
from vitjax.models.convnext import convnext
from vitjax.models.vit import vit
from vitjax.objectives.objective import Objective
from vitjax.objectives.supervised import Supervised
from vitjax.parallel import make_mesh
from vitjax.precision import Precision

SIZE = 8


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"fsdp": 8})


def make_objective(size=SIZE, channels=1, **options):
    block = {"width": 16, "depth": 2, "mlp_dim": 16, "num_heads": 2, "patch_size": 2}
    model = vit(image_size=size, channels=channels, precision=Precision(),
                **block | {"num_classes": 3} | options)  # fmt: skip
    return Supervised(model)


def make_state(objective, seed=0):
    params = objective.model.init(jax.random.key(seed))
    return types.SimpleNamespace(eval_params=params, extra={})


def digits(**options):
    return Loader(Digits("test"), Preprocess(SIZE, 1), num_threads=0, **options)


def size_of(png):
    return Image.open(io.BytesIO(png)).size


# Segmentation


def write_folder(root, count=24, size=16, classes=3):
    """Images of blocks, whose class is their grey value; the last row of masks is of no class."""
    generator = np.random.default_rng(len(str(root)))
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        classes_of = (
            generator.integers(0, classes, (size // 4, size // 4)).repeat(4, 0).repeat(4, 1)
        )
        image = (classes_of * 90 + generator.integers(0, 30, (size, size))).astype(np.uint8)
        mask = (classes_of * 100).astype(np.uint8)
        mask[-1] = 250
        Image.fromarray(image).save(root / "images" / f"{i:02d}_image.png")
        Image.fromarray(mask).save(root / "masks" / f"{i:02d}_mask.gif")
    return SegmentationFolder(
        str(root), values=(0, 100, 200)[:classes], ignored=(250,), pattern=r"(\d+)_.*"
    )


def test_iou_is_that_of_a_plain_confusion_matrix(mesh):
    generator = np.random.default_rng(0)
    truth, found = generator.integers(-1, 4, (5, 9, 7)), generator.integers(0, 3, (5, 9, 7))
    counts = np.asarray(segmentation.confusion(jnp.asarray(truth), jnp.asarray(found), 5))
    known = truth >= 0
    expected = confusion_matrix(truth[known], found[known], labels=range(5))
    np.testing.assert_array_equal(counts, expected)
    each, right = segmentation.scores(counts)
    for c in range(4):
        both = ((truth == c) & (found == c)).sum()
        either = (((truth == c) | (found == c)) & known).sum()
        assert each[c] == pytest.approx(both / either)
    assert np.isnan(each[4])
    assert right == pytest.approx((truth == found)[known].mean())


def test_class_shares_are_those_of_known_pixels():
    masks = np.full((1, 4, 4), -1)
    masks[0, :2, :2] = [[0, 1], [1, 1]]
    masks[0, :2, 2:] = [[0, -1], [-1, -1]]
    shares, weight = segmentation.class_shares(jnp.asarray(masks), (2, 2), 2)
    np.testing.assert_allclose(shares[0], [[0.25, 0.75], [1, 0], [0, 0], [0, 0]])
    np.testing.assert_allclose(weight[0], [1, 0.25, 0, 0])


def test_a_segmentation_equals_a_plain_one(tmp_path, mesh):
    """Tokens, ridge regression, and the upsampled outputs' classes, image by image."""
    objective = make_objective(size=16, patch_size=4)
    state = make_state(objective)
    preprocess = Preprocess(16, 1)
    sources = [write_folder(tmp_path / name) for name in ("train", "test_of_it")]
    train, test = (Loader(s, preprocess, num_threads=0) for s in sources)
    evaluator = segmentation.Segmentation(objective, test, train, mesh, batch_size=8)
    found, pictures = run({"seg": evaluator}, state)

    def read(source):
        batch = Loader(source, preprocess, num_threads=0)._read(np.arange(len(source)))
        images = preprocess.normalise(jnp.asarray(batch["images"]) / 255.0)
        return objective.model.apply(state.eval_params, images)["tokens"], batch["masks"]

    tokens, masks = read(sources[0])
    assert (masks[:, -1] == IGNORED).all() and masks[:, :-1].max() == 2
    held = ridge.hold_out(24)
    rows = {False: [], True: []}
    for i in range(24):
        for p in range(16):
            r, c = divmod(p, 4)
            part = masks[i, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
            known = part[part != IGNORED]
            share = [(known == k).mean() for k in range(3)]
            rows[bool(held[i])].append((np.asarray(tokens[i, p]), share, len(known) / 16))
    parts = [ridge.take_both(
        *(jnp.asarray(np.array(v), jnp.float32) for v in zip(*rows[side], strict=True)),
        jnp.full(len(rows[side]), side)) for side in (False, True)]  # fmt: skip
    chosen = ridge.choose(parts)
    assert found["eval/seg/penalty"] == chosen.penalty
    tokens, masks = read(sources[1])
    logits = chosen.linear(np.asarray(tokens).reshape(-1, 16)).reshape(-1, 4, 4, 3)
    places = (np.arange(16) + 0.5) / 4 - 0.5  # bilinear between the patches' middles
    low = np.floor(places).astype(int)
    share = (places - low)[:, None]
    across = np.zeros((16, 4))
    np.put_along_axis(across, np.clip(low, 0, 3)[:, None], 1 - share, 1)
    across[np.arange(16), np.clip(low + 1, 0, 3)] += share[:, 0]
    across = across / across.sum(1, keepdims=True)
    full = np.einsum("yr,xc,brck->byxk", across, across, logits)
    counts = confusion_matrix(masks[masks != IGNORED], full.argmax(-1)[masks != IGNORED])
    each, right = segmentation.scores(counts)
    assert found["eval/seg/miou"] == pytest.approx(np.nanmean(each), abs=2e-3)
    assert found["eval/seg/pixel_accuracy"] == pytest.approx(right, abs=2e-3)
    assert found["eval/seg/examples"] == 24 and right > 0.8
    assert size_of(pictures["seg/segmentation"])[1] > 300


def test_masks_follow_their_images(tmp_path):
    """Each way to bring an image to the model's size takes the mask to the same places."""
    source = write_folder(tmp_path / "x", count=1)
    mask = np.zeros((10, 20), np.uint8)
    mask[2:5, 12:17] = 1
    record = {"mask": mask}
    pixels = np.repeat(mask[..., None] * np.uint8(200), 3, axis=2)
    for options in ({}, {"resize": "squash"}, {"resize": "pad"}, {"crop_fraction": 0.8}):
        preprocess = Preprocess(40, 3, interpolation="bilinear", **options)
        fitted = source.fitted_mask(record, preprocess)
        image = preprocess.fit(pixels)[..., 0]
        differs = (image > 100) != (fitted == 1)
        assert differs.mean() < 0.01, options
        assert (fitted == IGNORED).any() == (options.get("resize") == "pad")


def test_a_source_of_masks_says_what_is_wrong(tmp_path):
    source = write_folder(tmp_path / "a")
    assert source.mask_names == ("0", "1", "2") and len(source) == 24
    assert source[3]["id"].endswith("03_image.png")
    (tmp_path / "a" / "masks" / "05_mask.gif").unlink()
    with pytest.raises(InputError, match=r"05_image.png has no mask in .*masks, as have 1 of 24"):
        SegmentationFolder(str(tmp_path / "a"), values=(0, 100), pattern=r"(\d+)_.*")
    with pytest.raises(InputError, match="no such folder"):
        SegmentationFolder(str(tmp_path / "b"))
    with pytest.raises(InputError, match=r"both are '0' by"):
        SegmentationFolder(str(tmp_path / "a"), pattern=r"(\d).*")
    with pytest.raises(InputError, match="values must be two or more"):
        SegmentationFolder(str(tmp_path / "a"), values=(3,))
    with pytest.raises(InputError, match="3 class_names, but 2 values"):
        SegmentationFolder(str(tmp_path / "a"), class_names=("a", "b", "c"))
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(tmp_path / "a/masks/03_mask.gif")
    with pytest.raises(UnreadableImage, match="has the value 7, which is neither"):
        source[3]
    Image.fromarray(np.zeros((16, 12), np.uint8)).save(tmp_path / "a/masks/03_mask.gif")
    with pytest.raises(UnreadableImage, match=r"\(16, 16\) pixels, but its mask of \(16, 12\)"):
        source[3]


def test_a_segmentation_needs_masks(tmp_path, mesh):
    objective, folder = make_objective(), write_folder(tmp_path / "x")
    with_masks = Loader(folder, Preprocess(SIZE, 1), num_threads=0)
    with pytest.raises(InputError, match=r"source \(Digits\) gives no masks"):
        segmentation.Segmentation(objective, digits(), with_masks, mesh)
    with pytest.raises(InputError, match=r"train_source \(Digits\) gives no masks"):
        segmentation.Segmentation(objective, with_masks, digits(), mesh)
    two = Loader(write_folder(tmp_path / "two", classes=2), Preprocess(SIZE, 1), num_threads=0)
    with pytest.raises(InputError, match="source has the classes 0, 1, but train_source has 0, 1"):
        segmentation.Segmentation(objective, two, with_masks, mesh)


def test_vessels_are_found_in_retinas(test_data, tmp_path, mesh):
    """A network that has learned nothing tells more than that the whole image may be one."""
    with zipfile.ZipFile(test_data / "medical" / "drive_vessels.zip") as archive:
        archive.extractall(tmp_path)
    loaders = []
    for split in ("training", "testing"):
        source = SegmentationFolder(
            str(tmp_path / split), masks="1st_manual", pattern=r"(\d+)_.*",
            class_names=("background", "vessel"),
        )  # fmt: skip
        assert len(source) == 20
        loaders.append(Loader(source, Preprocess(64, 3), num_threads=2))
    model = convnext(image_size=64, channels=3, blocks=(1,), widths=(32,), patch_size=2,
                     num_classes=3, layer_scale=None, precision=Precision())  # fmt: skip
    objective = Supervised(model)
    state = make_state(objective)
    given = (objective, loaders[1], loaders[0], mesh, 8)
    found = segmentation.Segmentation(*given, balance=True)(state)
    masks = loaders[1]._read(np.arange(20))["masks"]
    share = (masks == 1).mean()
    assert 0.05 < share < 0.15
    assert found["iou_vessel"] > 1.3 * share and found["examples"] == 20
    plain = segmentation.Segmentation(*given)(state)
    assert plain["pixel_accuracy"] == pytest.approx(1 - share, abs=0.01)


# Reconstruction


class Painter(Objective):
    """Paints masked patches black, or as they are plus 0.1."""

    def __init__(self, model, offset=None):
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "offset", offset)

    def reconstruct(self, params, extra, batch, key):
        images = batch["images"]
        masked = jax.random.bernoulli(key, 0.5, (len(images), 16))
        hidden = reconstruction.on_pixels(masked, (4, 4), (8, 8))
        made = images + self.offset if self.offset is not None else jnp.full_like(images, -1.0)
        return {"reconstruction": jnp.where(hidden, made, images), "masked": masked}


def test_psnr_is_of_masked_pixels_in_unit_range(mesh):
    model = make_objective().model
    loader = digits()
    state = types.SimpleNamespace(eval_params={}, extra={})
    off = reconstruction.Reconstruction(Painter(model, 0.002), loader, mesh)(state)
    # 0.002 in the model's range is 0.001 of [0, 1]; values of exactly 1 are cut off.
    assert off["psnr"] == pytest.approx(60, abs=1)
    black = reconstruction.Reconstruction(Painter(model), loader, mesh, batch_size=360)
    found, key = black(state), jax.random.fold_in(jax.random.key(0), 0)
    masked = np.asarray(jax.random.bernoulli(key, 0.5, (360, 16)))
    hidden = masked.reshape(-1, 4, 4).repeat(2, 1).repeat(2, 2)
    error = ((loader.source.images[:360] / 255.0) ** 2)[hidden].mean()
    assert found["masked_mse"] == pytest.approx(error, rel=1e-5)
    assert found["psnr"] == pytest.approx(10 * math.log10(1 / error), abs=1e-3)
    assert found["examples"] == 360
    assert black(state) == found, "the masks are the same every time"
    assert list(reconstruction.COLUMNS) == ["original", "masked", "reconstruction"]
    _, first = black._results(state)
    shown = {k: first[k].astype(int)[..., 0] for k in reconstruction.COLUMNS}
    assert (shown["original"] == loader.source.images[:8]).all()
    assert (shown["masked"][hidden[:8]] == 128).all()
    assert (shown["masked"][~hidden[:8]] == shown["original"][~hidden[:8]]).all()
    assert (shown["reconstruction"][hidden[:8]] == 0).all()
    (png,) = black.pictures(state).values()
    assert size_of(png)[0] > 400


def test_pixels_come_back_from_any_range():
    preprocess = Preprocess(8, 3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), value_range=(-1, 2))
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 3)), jnp.float32)
    np.testing.assert_allclose(
        reconstruction.to_pixels(preprocess.normalise(x), preprocess), x, atol=1e-6
    )


def test_a_classifier_reconstructs_nothing(mesh):
    with pytest.raises(InputError, match="the objective Supervised reconstructs no images"):
        reconstruction.Reconstruction(make_objective(), digits(), mesh)


# Attention


def test_distances_of_attention_made_by_hand():
    distances = attention_distance.patch_distances((2, 3), 4)
    assert distances[0].tolist() == pytest.approx([0, 4, 8, 4, 32**0.5, 80**0.5])
    eye, same = np.eye(6), np.full((6, 6), 1 / 6)
    attention = np.stack([eye, same, 0.5 * same])[:, None, None].repeat(2, 2)
    found = attention_distance.mean_distances(
        jnp.asarray(attention, jnp.float32), jnp.asarray(distances)
    )
    assert found.shape == (3, 1, 2)
    np.testing.assert_allclose(found[:, 0, 0], [0, distances.mean(), distances.mean()], rtol=1e-6)


def test_attention_distance_is_the_mean_over_images_and_leaves_out_other_tokens(mesh):
    objective = make_objective(pool="cls", num_registers=2)
    state, loader = make_state(objective), digits()
    evaluator = attention_distance.AttentionDistance(objective, loader, mesh, 16, num_images=21)
    found, pictures = run({"d": evaluator}, state)
    images = loader.preprocess.normalise(jnp.asarray(loader.source.images[:21, ..., None]) / 255.0)
    seen = objective.model.apply(state.eval_params, images, intermediates=True)
    weights = np.asarray(seen["blocks"]["attention_weights"])[..., 3:, 3:]
    weights = weights / weights.sum(-1, keepdims=True)
    expected = (weights * attention_distance.patch_distances((4, 4), 2)).sum(-1).mean((1, 2, 3))
    assert found["eval/d/first_layer"] == pytest.approx(expected[0], rel=1e-5)
    assert found["eval/d/last_layer"] == pytest.approx(expected[-1], rel=1e-5)
    assert found["eval/d/examples"] == 21
    assert abs(found["eval/d/uniform"] - expected[0]) > 1e-4
    assert size_of(pictures["d/attention_distance"])[0] > 400


def test_attention_distance_needs_attention(mesh):
    model = convnext(image_size=8, channels=1, blocks=(1, 1), widths=(8, 16), patch_size=2,
                     num_classes=3, precision=Precision())  # fmt: skip
    with pytest.raises(InputError, match="needs a Vision Transformer"):
        attention_distance.AttentionDistance(Supervised(model), digits(), mesh)


# Principal components


def test_components_are_scikit_learns_up_to_sign():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 8)) * np.arange(1, 9) + 5
    found, share = feature_pca.components(x.astype(np.float32))
    pca = PCA(3).fit(x.astype(np.float32).astype(np.float64))
    expected = pca.transform(x)
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found * signs, expected, atol=1e-4)
    assert share == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-6)
    turned, _ = feature_pca.components(np.asarray(x[::-1], np.float32))
    np.testing.assert_allclose(turned[::-1], found, atol=1e-6)
    axes = np.linalg.lstsq(x - x.mean(0), found, rcond=None)[0]
    assert (axes[np.abs(axes).argmax(0), range(3)] > 0).all()


def test_the_picture_of_components_shows_the_first_images(mesh):
    objective = make_objective(pool="cls")
    evaluator = feature_pca.FeaturePCA(objective, digits(), mesh, num_images=5)
    state = make_state(objective)
    found, pictures = run({"pca": evaluator}, state)
    assert 0.2 < found["eval/pca/explained"] < 1 and found["eval/pca/examples"] == 5
    share, colours, pixels = evaluator._results(state)
    assert colours.shape == (5, 4, 4, 3) and share == found["eval/pca/explained"]
    assert (pixels[..., 0] == Digits("test").images[:5]).all()
    assert size_of(pictures["pca/feature_pca"])[0] > 300


# Health


def test_effective_rank_of_known_matrices():
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 6)))[0]
    assert health.effective_rank(orthogonal) == pytest.approx(6, rel=1e-4)
    assert health.effective_rank(np.ones((40, 6))) == pytest.approx(1, rel=1e-4)
    assert health.effective_rank(orthogonal[:, :4].T @ np.eye(40)) == pytest.approx(4, rel=1e-4)
    shares = np.array([0.5, 0.25, 0.25])
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert health.effective_rank(orthogonal[:, :3] * shares[None]) == pytest.approx(expected, 1e-4)


def test_mean_cosine_is_over_pairs():
    x = np.random.default_rng(0).normal(size=(7, 3)) + 1
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [u[i] @ u[j] for i in range(7) for j in range(7) if i != j]
    assert health.mean_cosine(x) == pytest.approx(np.mean(pairs))


class Collapsed(Pixels):
    def __init__(self, to):
        self.to = to

    def embed(self, params, extra, batch):
        return self.to(super().embed(params, extra, batch))


STATES = {
    "healthy": (lambda x: x, 0),
    "one point": (lambda x: x * 1e-3 + 1, 1),
    "one way": (lambda x: x * 0.03 + 1, 1),
    "a line": (lambda x: x[:, :1] * jnp.asarray([[1.0, -2.0, 0.5]]), 1),
    "no numbers": (lambda x: x / 0, 1),
}


@pytest.mark.parametrize("name", STATES)
def test_collapse_is_told(name, mesh, caplog):
    to, collapsed = STATES[name]
    state = types.SimpleNamespace(eval_params={}, extra={})
    loader = make_loader(60, 0)
    logging.getLogger("vitjax").propagate = True
    rule = {"min_rank": 1.0} if name == "one way" else {}  # so that the cosine alone tells
    found = health.Health(Collapsed(to), loader, mesh, **rule)(state)
    assert found["collapsed"] == collapsed
    assert ("have collapsed" in caplog.text) == bool(collapsed)
    assert all(np.isfinite(v) for v in found.values())
    if name == "healthy":
        assert found["effective_rank"] > 10 and found["std"] > 0.5
        few = health.Health(Collapsed(to), loader, mesh, num_images=25)(state)
        assert few["examples"] == 20


def test_health_needs_two_images(mesh):
    with pytest.raises(InputError, match="needs at least 2 images, got num_images=1 of 60"):
        health.Health(Pixels(), make_loader(60, 0), mesh, num_images=1)
