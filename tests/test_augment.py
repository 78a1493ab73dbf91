"""Augmentation on the device against Pillow, scipy and numpy, and its draws."""

import colorsys
import functools
import io
import math
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image, ImageEnhance, ImageOps

from vitjax import config as config_lib
from vitjax import parallel
from vitjax.data import augment, colour, geometry, policies, randaugment
from vitjax.errors import InputError

HEIGHT, WIDTH = 80, 96


@pytest.fixture(scope="module")
def photos(test_data):
    """Six photographs."""
    with zipfile.ZipFile(test_data / "images" / "photos_jpeg.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".JPEG"))[:6]
        opened = [Image.open(io.BytesIO(archive.read(name))) for name in names]
        return [image.convert("RGB").resize((WIDTH, HEIGHT)) for image in opened]


def blobs(number=8, size=32, channels=3):
    """Smooth random images [B, Y, X, C] in [0, 1]."""
    noise = np.random.default_rng(0).normal(size=(number, size, size, channels))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 4, 4, 0), mode="wrap")
    smooth -= smooth.min((1, 2, 3), keepdims=True)
    return jnp.asarray(smooth / smooth.max((1, 2, 3), keepdims=True), jnp.float32)


def ramp(number, size):
    """Images whose channels hold their own row, their own column, and 0, in [0, 1]."""
    y, x = np.mgrid[:size, :size] / (size - 1)
    return jnp.asarray(np.stack([y, x, 0 * x], -1)[None].repeat(number, 0), jnp.float32)


@functools.cache
def compiled(operation):
    return jax.jit(operation)


def key(seed=0):
    """Not the default kind of key: this one compiles in a third of the time."""
    return jax.random.key(seed, impl="rbg")


def apply(operation, images, seed=0, **more):
    return compiled(operation)(key(seed), {"images": images, **more})


GEOMETRY = [
    augment.RandomFlip(vertical=True),
    augment.RandomShift(3),
    geometry.RandomQuarterTurn(),
    geometry.RandomAffine(30.0, (0.8, 1.2), 0.1, 10.0, fill=0.0),
    geometry.Elastic(40.0, 4.0, fill=0.0),
]
VALUES = [
    geometry.RandomErasing(0.9),
    colour.ColourJitter(0.3, 0.3, 0.3, 0.1),
    colour.GaussianBlur((0.5, 2.0), 0.9),
    colour.GaussianNoise((0.01, 0.1)),
    colour.Solarize(0.5),
    colour.Grayscale(0.5),
    colour.Gamma(0.5, 2.0),
    colour.ThreeAugment(),
]
ALL = [*GEOMETRY, *VALUES, randaugment.RandAugment(2, 20)]


def name_of(operation):
    return type(operation).__name__


# RandAugment


def pillow_affine(image, a, b, c, d, e, f):
    x, y = (image.width - 1) / 2, (image.height - 1) / 2
    centred = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    grey = 128 if image.mode == "L" else (128, 128, 128)
    return image.transform(image.size, Image.Transform.AFFINE, centred, fillcolor=grey)


def pillow_rotate(image, level):
    cosine, sine = math.cos(math.radians(30 * level)), math.sin(math.radians(30 * level))
    return pillow_affine(image, cosine, sine, 0, -sine, cosine, 0)


def pillow_solarize_add(image, level):
    added = image.point(lambda value: min(255, value + int(110 * abs(level))))
    return Image.composite(added, image, image.convert("L").point(lambda v: 255 * (v < 128)))


def pillow_cutout(image, level):
    half, array = int(40 * abs(level) * image.width / 224), np.array(image)
    y, x = CUTOUT
    array[max(0, y - half) : y + half, max(0, x - half) : x + half] = 128
    return Image.fromarray(array)


CUTOUT = (5, 30)  # near the upper border, which cuts it
PILLOW = {
    "autocontrast": lambda im, _: ImageOps.autocontrast(im),
    "equalize": lambda im, _: ImageOps.equalize(im),
    "invert": lambda im, _: ImageOps.invert(im),
    "rotate": pillow_rotate,
    "posterize": lambda im, v: ImageOps.posterize(im, max(1, 8 - round(4 * abs(v)))),
    "solarize": lambda im, v: ImageOps.solarize(im, 256 - int(256 * abs(v))),
    "solarize_add": pillow_solarize_add,
    "color": lambda im, v: ImageEnhance.Color(im).enhance(1 + 0.9 * v),
    "contrast": lambda im, v: ImageEnhance.Contrast(im).enhance(1 + 0.9 * v),
    "brightness": lambda im, v: ImageEnhance.Brightness(im).enhance(1 + 0.9 * v),
    "sharpness": lambda im, v: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * v),
    "shear_x": lambda im, v: pillow_affine(im, 1, 0.3 * v, 0, 0, 1, 0),
    "shear_y": lambda im, v: pillow_affine(im, 1, 0, 0, 0.3 * v, 1, 0),
    "translate_x": lambda im, v: pillow_affine(im, 1, 0, 100 / 224 * im.width * v, 0, 1, 0),
    "translate_y": lambda im, v: pillow_affine(im, 1, 0, 0, 0, 1, 100 / 224 * im.height * v),
    "cutout": pillow_cutout,
}


def to_planes(images):
    """Pillow images as [B, C, Y, X]."""
    stacked = np.stack([np.asarray(image) for image in images])
    return stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)


@functools.partial(jax.jit, static_argnums=3)
def run_layer(images, operation, is_negative, magnitude):
    places = [jnp.full(operation.shape, place) for place in CUTOUT]
    draw = randaugment.Draw(operation, is_negative, *places)
    return randaugment.apply_layer(images, draw, magnitude)[0]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("magnitude", [10, 23])
def test_randaugment_has_the_numbers_of_pillow(mode, magnitude, photos):
    """Exact, but for one step in rounding: autocontrast 0.2% of the values, colour 0.01%."""
    assert tuple(PILLOW) == randaugment.OPERATIONS
    images = [image.convert(mode) for image in photos]
    planes = jnp.asarray(to_planes(images))
    for index, (name, reference) in enumerate(PILLOW.items()):
        for is_negative in (False, True):
            level = magnitude / 30 * (-1 if is_negative else 1)
            chosen = jnp.full(len(images), index), jnp.full(len(images), is_negative)
            found = np.asarray(run_layer(planes, *chosen, magnitude)).astype(int)
            away = np.abs(found - to_planes([reference(image, level) for image in images]))
            share = {"autocontrast": 0.005, "color": 0.0005}.get(name, 0)
            assert away.max() <= 1 and (away > 0).mean() <= share, (name, level)
            may_stay = name == "autocontrast" or (name, mode) == ("color", "L")
            assert may_stay or (found != planes).mean() > 0.01, name


def test_flat_and_dark_images_keep_their_tables(photos):
    values = [np.full((HEIGHT, WIDTH), 77), np.arange(WIDTH)[None].repeat(HEIGHT, 0) % 2 + 100]
    images = [Image.fromarray(v.astype(np.uint8)) for v in values]
    for name in ("autocontrast", "equalize"):
        index = jnp.full(2, randaugment.OPERATIONS.index(name))
        found = run_layer(jnp.asarray(to_planes(images)), index, index < 0, 10)
        np.testing.assert_array_equal(found, to_planes([PILLOW[name](i, 0) for i in images]))


def test_both_histograms_are_numpys(photos):
    planes = to_planes(photos)
    wanted = [[np.bincount(p.ravel(), minlength=256) for p in image] for image in planes]
    np.testing.assert_array_equal(jax.jit(randaugment.histograms)(planes), wanted)
    rows = jnp.asarray(planes[:1].reshape(3, -1))
    np.testing.assert_array_equal(randaugment.count_by_comparing(rows), wanted[0])


def test_randaugment_draws_every_operation_alike_often_and_both_signs():
    number, size = 768, 16
    image = jnp.round(blobs(1, size) * 255) / 255
    once = randaugment.RandAugment(1, 27)  # at 30, solarize would be invert
    made = np.asarray(apply(once, image.repeat(number, 0))["images"])
    planes = jnp.round(image * 255).astype(jnp.uint8).transpose(0, 3, 1, 2).repeat(32, 0)
    known = run_layer(planes, jnp.arange(32) // 2, jnp.arange(32) % 2 == 1, 27)
    known = np.asarray(known.transpose(0, 2, 3, 1) / jnp.float32(255)).reshape(32, -1)
    matches = np.abs(made.reshape(number, 1, -1) - known[None]).max(-1) < 1e-6
    signs = matches.reshape(number, 16, 2)
    directed = [
        randaugment.OPERATIONS.index(n) for n in ("rotate", "shear_x", "color", "sharpness")
    ]
    counts = signs[:, directed].sum(0)
    assert counts.min() > 8 and counts.max() < 48, counts  # 24 is expected
    is_cutout = ~matches[:, :30].any(1)
    for name in ("invert", "equalize", "posterize", "solarize_add"):
        assert 24 < signs[:, randaugment.OPERATIONS.index(name), 0].sum() < 80, name  # 48
    assert 24 < is_cutout.sum() < 80
    grey = np.abs(made[is_cutout] - 128 / 255).max(-1) < 1e-6
    centres = np.array([np.argwhere(g).mean(0) for g in grey if g.any()])
    assert len(np.unique(centres, axis=0)) > 15


def test_randaugment_moves_masks_with_their_images():
    number, size = 64, 24
    image = jnp.asarray(np.random.default_rng(0).integers(0, 128, (1, size, size, 1)))
    image = image.repeat(number, 0)
    operation = jnp.arange(number) % 16
    draw = randaugment.Draw(operation, operation % 3 == 0, operation, operation)
    planes = image.astype(jnp.uint8).transpose(0, 3, 1, 2)
    masks = planes.astype(jnp.int32)
    images, moved = jax.jit(
        lambda x, m: randaugment.apply_layer(x, draw, 30, m, mask_fill=128), static_argnums=()
    )(planes, masks)
    for index, name in enumerate(randaugment.OPERATIONS):
        is_moving = name in ("rotate",) or name.startswith(("shear", "translate"))
        same = images[index] if is_moving else planes[index]
        np.testing.assert_array_equal(moved[index], same, err_msg=name)
    batch = {"images": image / jnp.float32(255), "masks": image[..., 0]}
    made = compiled(randaugment.RandAugment(3, 30, mask_fill=200))(key(), batch)
    assert (made["masks"].dtype, made["masks"].shape) == (image.dtype, image.shape[:3])
    assert (made["masks"] == 200).any()


# Geometry


@pytest.mark.parametrize("fill", [0.25, "edge"])
def test_sampling_is_scipys(fill):
    images = blobs(2, 12)[:, :, :9]
    rng = np.random.default_rng(1)
    y, x = rng.uniform(-4, 16, (2, 2, 12, 9)).astype(np.float32)
    y[0, 0, :3], x[0, 0, :3] = (-1, 0, 11), (8, 9, 8)  # on the borders
    for sample, order in ((geometry.sample_bilinear, 1), (geometry.sample_nearest, 0)):
        found = sample(images, jnp.asarray(y), jnp.asarray(x), fill)
        mode = "nearest" if fill == "edge" else "grid-constant"
        for i in range(2):
            for c in range(3):
                wanted = scipy.ndimage.map_coordinates(
                    images[i, :, :, c], [y[i], x[i]], order=order, mode=mode, cval=0.25
                )
                np.testing.assert_allclose(found[i, :, :, c], wanted, atol=1e-5)


def linear_maps(operation, number=64, size=33, seed=0):
    """Reads each image's map off a ramp: matrices [B, 2, 2] and offsets [B, 2] in pixels."""
    out = np.asarray(apply(operation, ramp(number, size), seed)["images"])[..., :2] * (size - 1)
    middle = slice(size // 2 - 4, size // 2 + 5)  # always inside
    y, x = np.mgrid[middle, middle]
    centre = (size - 1) / 2
    places = np.stack([y.ravel() - centre, x.ravel() - centre, np.ones(y.size)], 1)
    values = out[:, middle, middle].reshape(number, -1, 2) - centre
    solved = np.linalg.lstsq(places, values.transpose(1, 0, 2).reshape(y.size, -1), rcond=None)[0]
    solved = solved.reshape(3, number, 2).transpose(1, 2, 0)
    return solved[..., :2], solved[..., 2]


def test_rotations_are_rotations_by_angles_within_bounds():
    maps, offsets = linear_maps(geometry.RandomAffine(20.0))
    np.testing.assert_allclose(
        maps @ maps.transpose(0, 2, 1), np.eye(2)[None] + 0 * maps, atol=1e-4
    )
    np.testing.assert_allclose(np.linalg.det(maps), 1, atol=1e-4)
    angles = np.degrees(np.arctan2(maps[:, 0, 1], maps[:, 0, 0]))
    assert 18 < angles.max() <= 20.01 and -20.01 <= angles.min() < -18
    assert abs(angles.mean()) < 5
    np.testing.assert_allclose(offsets, 0, atol=1e-4)


def test_scales_moves_and_shears_stay_within_bounds():
    maps, offsets = linear_maps(geometry.RandomAffine(scale=(0.8, 1.25), translate=0.1))
    magnified = 1 / maps[:, 0, 0]
    np.testing.assert_allclose(maps[:, 0, 0], maps[:, 1, 1], atol=1e-4)
    assert 0.8 <= magnified.min() < 0.85 and 1.2 < magnified.max() <= 1.2501
    moves = offsets * magnified[:, None]
    assert 2.5 < np.abs(moves).max() <= 3.31 and (np.abs(moves).max(0) > 2.5).all()
    assert abs(np.corrcoef(moves[:, 0], moves[:, 1])[0, 1]) < 0.4
    maps, _ = linear_maps(geometry.RandomAffine(shear=15.0))
    np.testing.assert_allclose(np.linalg.det(maps), 1, atol=1e-4)
    most = math.tan(math.radians(15.0))
    assert 0.8 * most < np.abs(maps[:, 0, 1]).max() <= most + 1e-4
    assert (maps[:, 0, 1] > 0).any() and (maps[:, 0, 1] < 0).any()


def test_affine_maps_are_one_resampling_as_scipys(photos):
    size = 64
    image = jnp.asarray(np.asarray(photos[0].resize((size, size))), jnp.float32)[None] / 255
    operation = geometry.RandomAffine(25.0, (0.9, 1.3), 0.1, 8.0, fill=0.25)
    both = jnp.concatenate([ramp(4, size), image.repeat(4, 0)])[jnp.array([0, 4])]
    for seed in range(3):
        # The same draw for the ramp and the photograph: a batch of one each, under one key.
        (matrix,), (offset,) = linear_maps(operation, 1, size, seed)
        out = np.asarray(apply(operation, both[1:], seed)["images"])[0]
        centre = np.full(2, (size - 1) / 2)
        for c in range(3):
            wanted = scipy.ndimage.affine_transform(
                np.asarray(image[0, :, :, c]), matrix, centre + offset - matrix @ centre,
                order=1, mode="grid-constant", cval=0.25,
            )  # fmt: skip
            np.testing.assert_allclose(out[..., c], wanted, atol=5e-3)


def test_elastic_fields_have_the_strength_and_smoothness_that_are_asked_for():
    size, alpha, sigma = 64, 12.0, 4.0
    operation = geometry.Elastic(alpha, sigma)
    out = np.asarray(apply(operation, ramp(48, size))["images"])[..., :2] * (size - 1)
    field = out - np.moveaxis(np.mgrid[:size, :size], 0, -1)
    field = field[:, 4:-4, 4:-4]  # beyond the border the ramp ends
    wanted = alpha / (sigma * math.sqrt(12 * math.pi))
    assert field.std() == pytest.approx(wanted, rel=0.05)
    noise = np.random.default_rng(0).uniform(-1, 1, (24, 128, 128))
    smooth = alpha * scipy.ndimage.gaussian_filter(noise, (0, sigma, sigma), mode="wrap")
    assert smooth.std() == pytest.approx(wanted, rel=0.05)
    for lag in (4, 8):
        found = (field[:, lag:] * field[:, :-lag]).mean() / field.var()
        assert found == pytest.approx(math.exp(-(lag**2) / (4 * sigma**2)), abs=0.06)
    assert abs(np.corrcoef(field.reshape(-1, 2).T)[0, 1]) < 0.1
    by_place = field.std((0, 3))
    assert by_place.min() > 0.7 * wanted and by_place.max() < 1.3 * wanted  # alike everywhere


@pytest.mark.parametrize("sigma", [1.0, 2.5, 7.0, 40.0])
def test_elastic_fields_have_the_covariance_of_smoothed_white_noise_up_to_the_border(sigma):
    table = geometry._smoothing(33, sigma)
    apart = np.arange(33)[:, None] - np.arange(33)
    np.testing.assert_allclose(table @ table.T, np.exp(-(apart**2) / (4 * sigma**2)), atol=2e-3)


def test_flips_and_quarter_turns_are_those_of_numpy():
    images = blobs(1, 8).repeat(256, 0)
    first = np.asarray(images[0])
    for operation, forms in (
        (augment.RandomFlip(), [first, first[:, ::-1]]),
        (augment.RandomFlip(horizontal=False, vertical=True), [first, first[::-1]]),
        (
            augment.RandomFlip(vertical=True),
            [first, first[::-1], first[:, ::-1], first[::-1, ::-1]],
        ),
        (geometry.RandomQuarterTurn(), [np.rot90(first, k) for k in range(4)]),
    ):
        out = np.asarray(apply(operation, images)["images"])
        counts = np.array([(out == form).all((1, 2, 3)).sum() for form in forms])
        assert counts.sum() == 256
        assert (np.abs(counts - 256 / len(forms)) < 40).all(), counts


@pytest.mark.parametrize("operation", GEOMETRY, ids=name_of)
def test_masks_stay_on_their_images(operation):
    images = blobs(8, 32, 1)
    classes = (images[..., 0] > 0.5).astype(jnp.int32)
    out = apply(operation, images, masks=images[..., 0])  # float masks, bilinear, fill as images
    np.testing.assert_allclose(out["masks"], out["images"][..., 0], atol=1e-6)
    is_inside = apply(operation, images, masks=jnp.ones(images.shape[:3]))["masks"] == 1
    moved = apply(operation, images, masks=classes)
    assert moved["masks"].dtype == classes.dtype
    # Nearest neighbours are half a pixel away; the images change by less than 0.2 over that.
    is_clear = is_inside & (jnp.abs(out["images"][..., 0] - 0.5) > 0.1)
    assert is_clear.mean() > 0.4
    wanted = out["images"][..., 0] > 0.5
    np.testing.assert_array_equal(moved["masks"][is_clear], wanted[is_clear])
    assert (np.asarray(out["images"]) != np.asarray(images)).mean() > 0.3


def test_masks_are_filled_as_asked():
    masks = jnp.ones((4, 16, 16), jnp.uint8)
    for operation in (
        augment.RandomShift(3, mask_fill=255),
        geometry.RandomAffine(40.0, fill="edge", mask_fill=255),
        geometry.Elastic(60.0, 3.0, mask_fill=255),
    ):
        out = apply(operation, blobs(4, 16), masks=masks)["masks"]
        assert out.dtype == jnp.uint8 and set(np.unique(out)) == {1, 255}


def test_erasing_paints_one_rectangle_of_the_area_asked_for():
    number, size = 256, 32
    images = jnp.zeros((number, size, size, 3))
    operation = geometry.RandomErasing(0.5, (0.05, 0.3), (0.5, 2.0), fill=1.0)
    out = np.asarray(apply(operation, images)["images"])[..., 0]
    erased = [x for x in out if x.any()]
    assert 100 < len(erased) < 156
    areas, ratios = [], []
    for x in erased:
        rows, columns = x.any(1), x.any(0)
        np.testing.assert_array_equal(x, np.outer(rows, columns))
        assert np.diff(np.flatnonzero(rows)).max(initial=1) == 1
        areas.append(x.mean())
        ratios.append(rows.sum() / columns.sum())
    assert 0.03 < min(areas) < 0.1 and 0.25 < max(areas) < 0.33
    assert 0.4 < min(ratios) < 0.7 and 1.5 < max(ratios) < 2.4
    starts = np.array([np.argwhere(x)[0] for x in erased])
    ends = np.array([np.argwhere(x)[-1] for x in erased])
    assert (starts.min(0) == 0).all() and (ends.max(0) == size - 1).all()


def test_erasing_fills_with_noise_or_the_mean():
    images = blobs(16, 24)
    out = np.asarray(apply(geometry.RandomErasing(1.0, (0.2, 0.4), fill="mean"), images)["images"])
    changed = np.abs(out - np.asarray(images)).max(-1) > 1e-6
    for after, before, where in zip(out, np.asarray(images), changed, strict=True):
        np.testing.assert_allclose(after[where] - before.mean((0, 1)), 0, atol=1e-5)
    out = np.asarray(apply(geometry.RandomErasing(1.0, (0.9, 0.9), (1.0, 1.0)), images)["images"])
    noise = out[np.abs(out - np.asarray(images)).max(-1) > 1e-6]
    assert scipy.stats.kstest(noise.ravel(), "uniform").statistic < 0.02
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.05


# Colour


def test_the_grey_image_is_pillows(photos):
    images = jnp.asarray(np.stack([np.asarray(p) for p in photos]), jnp.float32) / 255
    wanted = np.stack([np.asarray(p.convert("L")) for p in photos]) / 255
    assert np.abs(np.asarray(colour.luma(images))[..., 0] - wanted).max() < 0.6 / 255


def test_hue_turns_as_in_the_standard_library():
    pixels = np.random.default_rng(0).uniform(size=(200, 3)).astype(np.float32)
    pixels[:5] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 0, 1]]
    for turn in (0.1, -0.3):
        found = colour.turn_hue(jnp.asarray(pixels)[None, None], jnp.array([turn]))[0, 0]
        hsv = [colorsys.rgb_to_hsv(*map(float, p)) for p in pixels]
        wanted = [colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in hsv]
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_jitter_blends_as_torchvision_does_within_its_bounds():
    images = 0.3 + 0.3 * blobs(64, 8)  # so that nothing is clipped
    grey = np.asarray(colour.luma(images))
    simpler = {
        "brightness": np.zeros((64, 1, 1, 1)),
        "contrast": grey.mean((1, 2, 3), keepdims=True),
        "saturation": grey,
    }
    for name, other in simpler.items():
        out = np.asarray(apply(colour.ColourJitter(**{name: 0.4}), images)["images"])
        x, y = np.asarray(images) - other, out - other
        factors = (x * y).sum((1, 2, 3)) / (x * x).sum((1, 2, 3))
        np.testing.assert_allclose(y, factors[:, None, None, None] * x, atol=1e-5)
        assert 0.6 <= factors.min() < 0.7 and 1.3 < factors.max() <= 1.4, name
    out = np.asarray(apply(colour.ColourJitter(hue=0.1), images)["images"])
    turns = []
    for before, after in zip(np.asarray(images), out, strict=True):
        a, b = (colorsys.rgb_to_hsv(*map(float, p[0, 0])) for p in (before, after))
        turns.append((b[0] - a[0] + 0.5) % 1 - 0.5)
    assert -0.1001 < min(turns) < -0.08 and 0.08 < max(turns) < 0.1001


def test_jitter_goes_from_brightness_to_hue():
    both = colour.ColourJitter(0.4, 0.4)
    images = blobs(4, 8)
    bright, _, _, _ = jax.random.split(key(), 4)
    factor = jax.random.uniform(bright, (4, 1, 1, 1), minval=0.6, maxval=1.4)
    first = jnp.clip(factor * images, 0, 1)
    out = np.asarray(apply(both, images)["images"])
    mean = np.asarray(colour.luma(first).mean((1, 2, 3), keepdims=True))
    ratios = (out - mean) / np.where(np.abs(first - mean) < 0.05, np.nan, first - mean)
    unclipped = (out > 0) & (out < 1)
    for ratio, where in zip(ratios, unclipped, strict=True):
        assert np.nanstd(ratio[where]) < 1e-4


def test_grey_images_have_neither_saturation_nor_hue():
    images = blobs(4, 8, 1)
    out = apply(colour.ColourJitter(saturation=0.9, hue=0.5), images)["images"]
    np.testing.assert_array_equal(out, images)


def test_blur_is_scipys():
    images = blobs(3, 20) + 0.0
    images = images.at[:, 4, 5].set(3.0)
    sigma = np.array([0.4, 1.0, 2.5], np.float32)
    found = jax.jit(colour.blur, static_argnums=2)(images, sigma, 8)
    for image, s, out in zip(np.asarray(images), sigma, found, strict=True):
        wanted = scipy.ndimage.gaussian_filter(image, (s, s, 0), mode="nearest", radius=(8, 8, 0))
        np.testing.assert_allclose(out, wanted, atol=2e-5)


def test_blur_touches_as_many_images_as_asked_and_each_by_its_own_sigma():
    images = blobs(1, 16).repeat(200, 0).at[:, 8, 8].set(1.0)
    out = np.asarray(apply(colour.GaussianBlur((0.5, 1.5), 0.3), images)["images"])
    same = (out == np.asarray(images)).all((1, 2, 3))
    assert 110 < same.sum() < 170
    assert len(np.unique(out[~same, 8, 8, 0])) > 40


def test_noise_is_normal_with_each_images_own_strength():
    images = jnp.full((32, 40, 40, 3), 0.5)
    out = np.asarray(apply(colour.GaussianNoise((0.02, 0.1)), images)["images"]) - 0.5
    stds = out.std((1, 2, 3))
    assert 0.019 < stds.min() < 0.035 and 0.085 < stds.max() < 0.102
    scaled = (out / stds[:, None, None, None]).ravel()
    assert scipy.stats.kstest(scaled, "norm").statistic < 0.005
    assert np.abs(scaled).max() > 3.5
    assert abs(np.corrcoef(out[..., 0].ravel(), out[..., 1].ravel())[0, 1]) < 0.03
    high = apply(colour.GaussianNoise((0.3, 0.3)), images)["images"]
    assert (float(high.min()), float(high.max())) == (0, 1)


def test_solarize_and_grayscale_change_as_many_images_as_asked():
    images = blobs(1, 8).repeat(300, 0)
    first = np.asarray(images[0])
    solarized = np.where(first < 0.7, first, 1 - first)
    grey = np.asarray(colour.luma(images[:1])[0]).repeat(3, -1)
    for operation, wanted in (
        (colour.Solarize(0.3, 0.7), solarized),
        (colour.Grayscale(0.3), grey),
    ):
        out = np.asarray(apply(operation, images)["images"])
        changed = np.abs(out - wanted).max((1, 2, 3)) < 1e-6
        same = (out == first).all((1, 2, 3))
        assert (changed ^ same).all() and 60 < changed.sum() < 120


def test_gamma_is_a_power_whose_logarithm_is_uniform():
    images = 0.2 + 0.6 * blobs(400, 4, 1)
    out = np.asarray(apply(colour.Gamma(0.5, 2.0), images)["images"])
    powers = np.log(out) / np.log(np.asarray(images))
    assert np.ptp(powers, axis=(1, 2, 3)).max() < 1e-3
    powers = powers[:, 0, 0, 0]
    assert 0.499 < powers.min() < 0.53 and 1.9 < powers.max() < 2.001
    assert 0.43 < (powers < 1).mean() < 0.57


def test_three_augment_does_one_of_three_and_then_jitters():
    images = blobs(1, 16).repeat(240, 0)
    first = np.asarray(images[0])
    out = np.asarray(apply(colour.ThreeAugment(jitter=0.0, sigma=(1.0, 1.0)), images)["images"])
    grey = np.asarray(colour.luma(images[:1])[0]).repeat(3, -1)
    solarized = np.where(first < 0.5, first, 1 - first)
    blurred = scipy.ndimage.gaussian_filter(first, (1, 1, 0), mode="nearest", radius=(3, 3, 0))
    counts = [
        (np.abs(out - form).max((1, 2, 3)) < 1e-5).sum() for form in (grey, solarized, blurred)
    ]
    assert sum(counts) == 240 and min(counts) > 50
    jittered = np.asarray(apply(colour.ThreeAugment(), images)["images"])
    assert len(np.unique(jittered[:, 3, 3, 0])) > 200


# What holds for all of them


@pytest.mark.parametrize(
    "operation",
    [
        geometry.RandomAffine(),
        geometry.Elastic(0.0, 4.0),
        geometry.RandomErasing(0.0),
        colour.ColourJitter(),
        colour.GaussianBlur(probability=0.0),
        colour.GaussianNoise((0.0, 0.0)),
        colour.Solarize(0.0),
        colour.Grayscale(0.0),
        colour.Gamma(1.0, 1.0),
    ],
    ids=name_of,
)
def test_settings_of_nothing_give_back_the_input(operation):
    images = blobs(4, 15)
    masks = (images[..., 0] > 0.4).astype(jnp.int32)
    out = apply(operation, images, masks=masks)
    np.testing.assert_array_equal(out["images"], images)
    np.testing.assert_array_equal(out["masks"], masks)


@pytest.mark.parametrize("operation", ALL, ids=name_of)
def test_draws_belong_to_the_key_and_to_the_example(operation):
    images = jnp.round(blobs(1, 24).repeat(16, 0) * 255) / 255
    out, again, other = (np.asarray(apply(operation, images, s)["images"]) for s in (0, 0, 1))
    assert out.dtype == np.float32 and out.shape == images.shape
    assert out.min() >= 0 and out.max() <= 1
    np.testing.assert_array_equal(out, again)
    assert (out != other).any()
    few = isinstance(operation, augment.RandomFlip | geometry.RandomQuarterTurn)
    coins = isinstance(operation, colour.Solarize | colour.Grayscale)
    distinct = len({image.tobytes() for image in out})
    assert distinct >= (2 if coins else 3 if few else 10)


def test_a_sharded_batch_is_augmented_alike_and_in_place():
    """Many operations in a row, on eight devices: the same numbers and not one message."""
    operations = [
        randaugment.RandAugment(1),  # these two first: here a rounding could become visible
        colour.ThreeAugment(),
        GEOMETRY[0],
        geometry.RandomAffine(30.0, fill=0.0),
        geometry.RandomErasing(0.9),
    ]

    def run(key, batch):
        for operation, k in zip(operations, jax.random.split(key, len(operations)), strict=True):
            batch = operation(k, batch)
        return batch

    images = jnp.round(blobs(16, 24) * 255) / 255
    batch = {"images": images, "masks": (images[..., 0] * 4).astype(jnp.int32)}
    alone = jax.jit(run)(jax.random.key(0), batch)
    mesh = parallel.make_mesh({"replica": 2, "fsdp": 4, "tensor": 1})
    spread = {
        name: jax.device_put(value, jax.NamedSharding(mesh, jax.P(parallel.DATA_AXES)))
        for name, value in batch.items()
    }
    program = jax.jit(run).lower(jax.random.key(0), spread).compile()
    assert not re.search("all-|collective-|reduce-scatter", program.as_text() or "")
    out = program(jax.random.key(0), spread)
    assert len(out["images"].sharding.device_set) == 8
    np.testing.assert_allclose(out["images"], alone["images"], atol=1e-4)
    np.testing.assert_array_equal(out["masks"], alone["masks"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: augment.RandomFlip(horizontal=False), "horizontal=True or vertical=True"),
        (lambda: augment.RandomShift(0), "must be positive, got 0"),
        (lambda: geometry.RandomAffine(200.0), "degrees must be a number from 0 to 180, got 200"),
        (lambda: geometry.RandomAffine(scale=(1.2, 0.8)), r"low <= high.*\(1.2, 0.8\)"),
        (lambda: geometry.RandomAffine(scale=(0.0, 1.0)), "scale needs 0.01 <= low"),
        (lambda: geometry.RandomAffine(translate=-0.1), "translate must be a number"),
        (lambda: geometry.RandomAffine(shear=90.0), "shear must be a number from 0 to 80"),
        (lambda: geometry.RandomAffine(fill="mean"), "'edge' or a value from 0 to 1, got 'mean'"),
        (lambda: geometry.Elastic(-1.0, 4.0), "alpha must be"),
        (lambda: geometry.Elastic(1.0, 0.5), "sigma must be a number from 1"),
        (lambda: geometry.RandomErasing(1.5), "probability must be a number from 0 to 1, got 1.5"),
        (lambda: geometry.RandomErasing(fill="edge"), "'noise' or 'mean' or a value"),
        (lambda: geometry.RandomErasing(area=(0.1, 1.2)), "area needs 0 <= low"),
        (lambda: colour.ColourJitter(hue=0.6), "hue must be a number from 0 to 0.5"),
        (lambda: colour.ColourJitter(contrast=-0.1), "contrast must be"),
        (lambda: colour.GaussianBlur((2.0, 1.0)), "sigma needs 0 <= low"),
        (lambda: colour.GaussianNoise((0.0, 2.0)), "std needs"),
        (lambda: colour.Solarize(0.5, 2.0), "threshold must be"),
        (lambda: colour.Grayscale(-1.0), "probability must be"),
        (lambda: colour.Gamma(2.0, 0.5), "Gamma's"),
        (lambda: colour.ThreeAugment(-0.3), "jitter must be"),
        (lambda: randaugment.RandAugment(0), "num_layers must be 1 or more, got 0"),
        (lambda: randaugment.RandAugment(2, 31), "magnitude must be a number from 0 to 30"),
        (lambda: policies.Policy("chest_xry"), "did you mean 'chest_xray'"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_what_a_batch_cannot_have_is_refused():
    wide = {"images": jnp.zeros((2, 8, 9, 1))}
    with pytest.raises(InputError, match="square images, got 8 x 9"):
        geometry.RandomQuarterTurn()(jax.random.key(0), wide)
    with pytest.raises(InputError, match="Mixup cannot blend masks"):
        augment.Mixup(0.4)(
            jax.random.key(0), wide | {"labels": jnp.arange(2), "masks": jnp.zeros((2, 8, 9))}
        )


# Mixing


def test_mixup_may_give_each_example_a_weight_of_its_own():
    images = jnp.arange(16.0)[:, None, None, None] * jnp.ones((1, 4, 4, 1)) / 16
    out = apply(augment.Mixup(0.8, per_example=True), images, labels=jnp.arange(16))
    weights = np.asarray(out["mix_weight"])
    assert len(np.unique(weights)) == 16 and weights.min() >= 0.5
    neighbour = np.roll(np.arange(16), 1)
    np.testing.assert_array_equal(out["mix_labels"], neighbour)
    wanted = (weights * np.arange(16) + (1 - weights) * neighbour) / 16
    np.testing.assert_allclose(out["images"][:, 2, 2, 0], wanted, atol=1e-6)
    together = apply(augment.Mixup(0.8), images, labels=jnp.arange(16))["mix_weight"]
    assert len(np.unique(together)) == 1


def test_cutmix_pastes_masks_like_images():
    images = jnp.arange(4.0)[:, None, None, None] * jnp.ones((1, 16, 16, 1)) / 4
    masks = jnp.arange(4)[:, None, None] * jnp.ones((1, 16, 16), jnp.int32)
    out = apply(augment.Cutmix(), images, labels=jnp.arange(4), masks=masks)
    np.testing.assert_array_equal(out["masks"], np.round(out["images"][..., 0] * 4))
    assert (np.asarray(out["masks"]) != np.asarray(masks)).any()


# Policies


@pytest.mark.parametrize("name", policies.POLICIES)
def test_a_policy_is_its_blocks_in_order(name):
    images = blobs(4, 28, 1 if name == "ct" else 3)
    operation = config_lib.build({"target": "vitjax.data.policies:Policy", "name": name})
    out = apply(operation, images)["images"]
    blocks = policies.policy(name, 28)
    wanted = {"images": images}
    for block, block_key in zip(blocks, jax.random.split(key(), len(blocks)), strict=True):
        wanted = compiled(config_lib.build(block))(block_key, wanted)
    wanted = wanted["images"]
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    assert (np.asarray(out) != np.asarray(images)).any((1, 2, 3)).all()


@pytest.mark.parametrize(
    ("name", "flips"),
    [("chest_xray", False), ("ct", False), ("natural", True), ("histology", True)],
)
def test_only_what_has_no_sides_is_mirrored(name, flips):
    """A mark beside the centre of the left edge stays there, or does not."""
    images = jnp.full((64, 32, 32, 1), 0.3).at[:, 12:20, 4:9].set(0.9)
    out = np.asarray(apply(policies.Policy(name), images)["images"])[..., 0]
    edges = [
        np.abs(np.diff(half[:, 8:24, 2:-2], axis=2)).max((1, 2))
        for half in np.split(out, 2, axis=2)
    ]
    assert (edges[1] > edges[0]).any() == flips


def test_lengths_of_a_policy_shrink_with_the_image():
    small, large = (policies.policy("natural", size)[1]["sigma"] for size in (112, 224))
    assert large == (0.1, 2.0) and small == (0.05, 1.0)
