"""Whole-slide images: regions, tissue, tiles, bags, models of bags, published layouts."""

import csv
import dataclasses
import io
import sys
import threading

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from PIL import Image

from vitjax import lock
from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError, UnreadableImage
from vitjax.inference import VisionModel
from vitjax.interop.contents import full_model
from vitjax.medical.slides import bags, fit, heat, mil, tiles, tissue, trained
from vitjax.medical.slides import table as tables
from vitjax.medical.slides.annotations import in_polygon, lesions
from vitjax.medical.slides.camelyon import camelyon16, camelyon17
from vitjax.medical.slides.slide import Slide
from vitjax.models.vit import vit

LESION = (1200, 700, 130)  # x, y, radius
TILING = bags.Tiling(tile_size=16, microns_per_pixel=1.0)  # 64 pixels of level 0


def picture(width=2000, height=1400, lesion=None, seed=0):
    """White glass, a pink ellipse of tissue over its middle, and perhaps a purple spot."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    image = np.full((height, width, 3), 244, np.float32) + generator.normal(
        0, 1, (height, width, 1)
    )
    inside = ((x / width - 0.5) / 0.35) ** 2 + ((y / height - 0.5) / 0.35) ** 2 < 1
    pink = np.array([222, 150, 190], np.float32) + generator.normal(0, 6, 3)
    rough = cv2.resize(generator.normal(0, 14, (height // 8, width // 8)), (width, height))
    image[inside] = (pink[None, None] + rough[..., None])[inside]
    if lesion:
        spot = (x - lesion[0]) ** 2 + (y - lesion[1]) ** 2 < lesion[2] ** 2
        image[spot] = (np.array([88, 45, 130]) + rough[..., None] / 3)[spot]
    return np.clip(image, 0, 255).astype(np.uint8)


def pyramid(image, downsamples=(1, 2, 4)):
    return [
        cv2.resize(image, (image.shape[1] // d, image.shape[0] // d), interpolation=cv2.INTER_AREA)
        for d in downsamples
    ]


def jpeg(pixels, subsampling=2):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=subsampling)
    return buffer.getvalue()


def jpeg_tiles(image, size, subsampling):
    for top in range(0, image.shape[0], size):
        for left in range(0, image.shape[1], size):
            part = image[top : top + size, left : left + size]
            wide = ((0, size - part.shape[0]), (0, size - part.shape[1]), (0, 0))
            yield jpeg(np.pad(part, wide, "edge"), 2 * (subsampling == (2, 2)))


def write_slide(path, image, microns=0.25, *, kind="tiles", downsamples=(1, 2, 4), **options):
    options = {"photometric": "rgb", "metadata": None, "compression": "zlib"} | options
    if kind == "tiles" or kind == "sub":
        options["tile"] = (128, 128)
    if kind == "plain":
        options["compression"] = None
    levels = pyramid(image, downsamples)
    with tifffile.TiffWriter(path) as file:
        for index, level in enumerate(levels):
            extra = {"subfiletype": int(index > 0)}
            if kind == "sub" and index == 0:
                extra["subifds"] = len(levels) - 1
            if microns:
                pixels = 1e4 / (microns * downsamples[index])
                extra |= {"resolution": (pixels, pixels), "resolutionunit": "CENTIMETER"}
            data = level
            if options["compression"] == "jpeg":
                tifffile.TIFF.COMPRESSORS._codecs.setdefault(7, jpeg)  # asked for, never called
                data = jpeg_tiles(level, 128, options["subsampling"])
                extra |= {"shape": level.shape, "dtype": np.uint8}
            file.write(data, **options | extra)
    return path


def tiny_model(seed=0, size=16):
    """A small ViT of random weights: it sees colours."""
    block = {"width": 32, "depth": 1, "mlp_dim": 48, "num_heads": 2, "patch_size": 8}
    block |= {"num_classes": 0}
    model = vit(image_size=size, channels=3, **block)
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    params = jax.tree.map(
        lambda x: jax.random.normal(next(keys), x.shape) * 0.2, model.abstract_params
    )
    contract = {
        "model": full_model(block), "preprocess": dataclasses.asdict(Preprocess(size, 3)),
        "class_names": None, "loss_type": None, "precision": {}, "description": {},
    }  # fmt: skip
    return VisionModel(model, params, contract)


@pytest.fixture(scope="module")
def image():
    return picture(lesion=LESION)


@pytest.fixture(scope="module")
def path(image, tmp_path_factory):
    return write_slide(tmp_path_factory.mktemp("slide") / "positive.tif", image)


# Slides


def test_openslide_and_tifffile_read_the_pixels_that_were_written(path, image):
    levels = pyramid(image)
    with Slide(path, reader="openslide") as one, Slide(path, reader="tifffile") as other:
        assert one.levels == other.levels == ((2000, 1400), (1000, 700), (500, 350))
        assert one.size == (2000, 1400) and one.downsamples == other.downsamples == (1, 2, 4)
        assert one.microns_per_pixel == pytest.approx(0.25, rel=1e-6)
        assert other.microns_per_pixel == pytest.approx(0.25, rel=1e-6)
        for level, (x, y, width, height) in enumerate([(700, 500, 300, 257), (640, 200, 130, 90),
                                                       (40, 80, 333, 200)]):  # fmt: skip
            a, b = one.read(x, y, width, height, level), other.read(x, y, width, height, level)
            left, top = x // 2**level, y // 2**level
            np.testing.assert_array_equal(a, levels[level][top : top + height, left : left + width])
            np.testing.assert_array_equal(a, b)
            assert a.dtype == np.uint8 and a.shape == (height, width, 3)


@pytest.mark.parametrize("reader", ["openslide", "tifffile"])
def test_what_lies_outside_is_white(path, image, reader):
    with Slide(path, reader=reader) as slide:
        corner = slide.read(-50, -30, 100, 80, 0)
        np.testing.assert_array_equal(corner[30:, 50:], image[:50, :50])
        assert (corner[:30] == 255).all() and (corner[:, :50] == 255).all()
        assert (slide.read(5000, 0, 10, 10, 0) == 255).all()
        last = slide.read(1990, 1390, 20, 20, 0)
        np.testing.assert_array_equal(last[:10, :10], image[1390:, 1990:])
        assert (last[10:] == 255).all()


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 2)])
def test_jpeg_tiles_look_the_same_by_both(tmp_path, image, subsampling):
    options = {"compression": "jpeg", "photometric": "ycbcr", "subsampling": subsampling}
    path = write_slide(tmp_path / "a.tif", image, **options)
    with Slide(path, reader="openslide") as one, Slide(path, reader="tifffile") as other:
        for level in range(3):
            a, b = one.read(512, 512, 200, 150, level), other.read(512, 512, 200, 150, level)
            assert np.abs(a.astype(int) - b).max() <= 4
            assert np.abs(a.astype(int) - pyramid(image)[level][512 >> level :, 512 >> level :]
                          [:150, :200]).mean() < 6  # fmt: skip


@pytest.mark.parametrize("kind", ["strips", "plain", "sub"])
def test_tiffs_that_openslide_cannot_read_are_read(tmp_path, image, kind, monkeypatch):
    monkeypatch.setattr("vitjax.medical.slides.slide.LARGE", 1000)
    path = write_slide(tmp_path / "a.tif", image, kind=kind, predictor=kind != "plain")
    with Slide(path) as slide:
        assert slide.levels == ((2000, 1400), (1000, 700), (500, 350))
        for level, pixels in enumerate(pyramid(image)):
            found = slide.read(400, 800, 150, 120, level)
            left, top = 400 >> level, 800 >> level
            np.testing.assert_array_equal(found, pixels[top : top + 120, left : left + 150])
            last = slide.read(0, 1360, 150, 40 >> level, level)
            np.testing.assert_array_equal(last, pixels[1360 >> level :, :150])


@pytest.mark.parametrize("packed", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_one_plain_image_is_a_slide_of_one_level(tmp_path, image, packed, mode):
    made = Image.fromarray(image[:400, :600]).convert(mode)
    made.save(tmp_path / "a.tif", compression=packed)
    with Slide(tmp_path / "a.tif") as slide:
        assert slide.levels == ((600, 400),) and slide.microns_per_pixel is None
        wanted = np.asarray(made.convert("RGB"))[300:400, 50:350]
        np.testing.assert_array_equal(slide.read(50, 300, 300, 100), wanted)


def test_microns_per_pixel_are_taken_from_where_they_stand(tmp_path, image):
    small = image[:256, :256]

    def stated(reader="tifffile", **options):
        options = {"photometric": "rgb", "tile": (128, 128), "metadata": None} | options
        tifffile.imwrite(tmp_path / "a.tif", small, **options)
        with Slide(tmp_path / "a.tif", reader=reader) as slide:
            return slide.microns_per_pixel

    for reader in ("openslide", "tifffile"):
        assert stated(reader) is None
        assert stated(reader, resolution=(72, 72), resolutionunit="INCH") is None
        inch = stated(reader, resolution=(50800, 50800), resolutionunit="INCH")
        assert inch == pytest.approx(0.5)
    assert stated(description="Aperio Image Library |AppMag = 20|MPP = 0.4990") == 0.499
    ome = {"PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm", "axes": "YXS"}
    assert stated(metadata=ome, ome=True) == pytest.approx(0.325)


def test_a_thumbnail_is_the_whole_slide_averaged(path, image):
    with Slide(path) as slide:
        found = slide.thumbnail(500)
        assert found.shape == (350, 500, 3)
        assert np.abs(found.astype(int) - pyramid(image)[2]).max() <= 1
        assert slide.thumbnail(9999).shape == image.shape
        parts = slide.thumbnail(250)
    whole = cv2.resize(image, (250, 175), interpolation=cv2.INTER_AREA)
    assert np.abs(parts.astype(int) - whole).mean() < 1


def test_a_thumbnail_of_a_slide_without_levels_reads_small_blocks(tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (21, 42, 3)).astype(np.uint8)
    pixels = np.kron(small, np.ones((100, 100, 1), np.uint8))
    path = write_slide(tmp_path / "a.tif", pixels, downsamples=(1,))
    with Slide(path) as slide:
        sizes, read = [], slide.read
        slide.read = lambda x, y, w, h, level: sizes.append(w * h) or read(x, y, w, h, level)
        found = slide.thumbnail(100)
    assert max(sizes) <= 2100**2 and len(sizes) >= 4
    whole = cv2.resize(pixels, (100, 50), interpolation=cv2.INTER_AREA)
    assert np.abs(found.astype(int) - whole).mean() < 1


@pytest.mark.parametrize("reader", ["openslide", "tifffile"])
def test_many_threads_read_what_one_reads(path, image, reader, monkeypatch):
    monkeypatch.setattr("vitjax.medical.slides.tiff.CACHE_BYTES", 200_000)  # four tiles
    corners = np.random.default_rng(0).integers(0, 1300, (200, 2)).tolist()
    with Slide(path, reader=reader) as slide:
        wrong = []

        def work(part):
            for x, y in part:
                if not (slide.read(x, y, 90, 70) == image[y : y + 70, x : x + 90]).all():
                    wrong.append((x, y))

        threads = [threading.Thread(target=work, args=(corners[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        if reader == "tifffile":
            assert sum(piece.nbytes for piece in slide._reader._cache.values()) <= 200_000


def test_what_is_no_slide_is_named(tmp_path, path):
    (tmp_path / "text.svs").write_text("not a slide")
    (tmp_path / "start.tif").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"no such slide: .*nothing.svs"):
        Slide(tmp_path / "nothing.svs")
    with pytest.raises(InputError, match="no slide that OpenSlide reads"):
        Slide(tmp_path / "text.svs")
    with pytest.raises(InputError, match=r"start.tif"):
        Slide(tmp_path / "start.tif")
    with pytest.raises(InputError, match="allowed: auto, openslide, tifffile"):
        Slide(path, reader="pillow")
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((64, 64, 3), np.uint16), photometric="rgb")
    with pytest.raises(InputError, match="16 bits a sample; allowed: 8"):
        Slide(tmp_path / "deep.tif")
    with Slide(path) as slide:
        with pytest.raises(InputError, match=r"level 3 .* it has 0 to 2"):
            slide.read(0, 0, 10, 10, 3)
        with pytest.raises(InputError, match="empty"):
            slide.read(0, 0, 0, 10)
    with pytest.raises(InputError, match="is closed"):
        slide.read(0, 0, 10, 10)


@pytest.mark.parametrize("reader", ["openslide", "tifffile"])
def test_a_damaged_part_is_unreadable_and_says_where(tmp_path, path, reader):
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        index = 5 * (-(-2000 // 128)) + 5
        start, count = page.dataoffsets[index], page.databytecounts[index]
    data = bytearray(path.read_bytes())
    data[start : start + count] = b"\xff" * count
    (tmp_path / "a.tif").write_bytes(data)
    with Slide(tmp_path / "a.tif", reader=reader) as slide:
        slide.read(0, 0, 100, 100)
        with pytest.raises(UnreadableImage, match=r"a.tif at \(650, 650\), level 0"):
            slide.read(650, 650, 50, 50)


@pytest.mark.parametrize(("module", "what"), [("tifffile", "tifffile"), ("openslide", "openslide")])
def test_a_package_that_lacks_is_asked_for(path, monkeypatch, module, what):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"needs: pip install 'vitjax\[medical\]'"):
        Slide(path, reader=what)


# Tissue and tiles


@pytest.mark.parametrize("method", tissue.METHODS)
def test_tissue_is_found_and_glass_is_not(image, method):
    small = pyramid(image)[2]
    y, x = np.mgrid[:350, :500]
    truth = ((x / 500 - 0.5) / 0.35) ** 2 + ((y / 350 - 0.5) / 0.35) ** 2 < 1
    mask = tissue.tissue_mask(small, method)
    assert (mask != truth).mean() < 0.01
    small = small.copy()
    small[5:9, 5:9] = (200, 60, 60)  # dust
    small[166:176, 200:210] = 245  # a hole
    frame = np.random.default_rng(1).integers(0, 6, (45, 45, 3))  # the scanner's: black and noise
    small[300:345, 450:495] = frame
    assert (tissue.tissue_mask(small, method) != truth).mean() < 0.01
    assert not tissue.tissue_mask(small, method)[:20, :20].any()
    assert tissue.tissue_mask(small, method)[171, 205]
    small[140:210, 200:270] = 245  # no hole, but glass
    assert not tissue.tissue_mask(small, method)[175, 235]


def test_otsu_finds_nothing_on_glass_and_all_of_a_slide_of_tissue():
    glass = np.random.default_rng(0).integers(243, 247, (200, 300, 3)).astype(np.uint8)
    assert not tissue.tissue_mask(glass, "otsu").any()
    full = picture(1000, 800)[300:500, 350:650]
    assert tissue.tissue_mask(full, "otsu").mean() > 0.99
    with pytest.raises(InputError, match="allowed: otsu, saturation"):
        tissue.tissue_mask(glass, "otzu")


def test_saturation_is_that_of_hsv():
    pixels = np.random.default_rng(0).integers(20, 256, (50, 40, 3)).astype(np.uint8)
    wanted = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[..., 1]
    np.testing.assert_allclose(tissue.saturation(pixels), wanted, atol=1e-5)


def test_the_covered_part_of_a_tile_is_exact():
    mask = np.random.default_rng(0).random((30, 40)) < 0.5
    coords = np.random.default_rng(1).integers(-20, 380, (50, 2))
    fine = np.kron(mask, np.ones((10, 10)))  # a slide of 400 x 300, one value a pixel
    fine = np.pad(fine, 100)
    wanted = [fine[y + 100 : y + 137, x + 100 : x + 137].mean() if y < 300 else 0.0
              for x, y in coords.tolist()]  # fmt: skip
    np.testing.assert_allclose(tiles.covered(mask, (400, 300), coords, 37.0), wanted, atol=1e-9)


def test_tiles_lie_on_tissue_and_nowhere_else(path, image):
    with Slide(path) as slide:
        mask = tissue.tissue_mask(slide.thumbnail(500))
        found = tiles.grid(slide, mask, tile_size=32, microns_per_pixel=0.5)
        assert (found.level, found.scale, found.span) == (1, pytest.approx(1), pytest.approx(64))
        assert (found.coords % 64 == 0).all()
        centres = found.coords + 32
        inside = ((centres / np.array([2000, 1400]) - 0.5) / 0.35) ** 2
        assert (inside.sum(1) < 1.15).all()
        assert 0.9 < len(found) * 64**2 / (np.pi * 0.35**2 * 2000 * 1400) < 1.1
        everywhere = tiles.grid(slide, None, tile_size=32, microns_per_pixel=0.5)
        assert len(everywhere) == 32 * 22  # 2000 / 64 and 1400 / 64, rounded up
        rows = {tuple(c) for c in found.coords.tolist()}
        assert rows < {tuple(c) for c in everywhere.coords.tolist()}


def test_the_lesion_is_where_the_coordinates_say(path):
    with Slide(path) as slide:
        for microns, size in ((0.25, 40), (0.5, 20), (0.7, 24), (1.3, 16)):
            found = tiles.grid(slide, None, tile_size=size, microns_per_pixel=microns)
            pixels = np.concatenate([p for _, p in tiles.stream(slide, found, 50)])
            purple = pixels.reshape(len(pixels), -1, 3).mean(1)[:, 0] < 100
            assert purple.sum() > 3
            centres = found.coords[purple] + found.span / 2
            away = np.hypot(*(centres - np.array(LESION[:2])).T)
            assert away.max() < LESION[2]
            assert found.span == pytest.approx(size * microns / 0.25)
            assert found.microns_per_pixel == microns


def test_a_tile_between_levels_is_the_next_finer_one_reduced(path, image):
    with Slide(path) as slide:
        found = tiles.grid(slide, None, tile_size=20, microns_per_pixel=0.75)
        assert (found.level, found.scale) == (1, pytest.approx(1.5))
        index = next(i for i, c in enumerate(found.coords.tolist()) if c == [1200, 660])
        tile = tiles.read_tile(slide, found, index)
    wanted = cv2.resize(image[660:720, 1200:1260], (20, 20), interpolation=cv2.INTER_AREA)
    assert np.abs(tile.astype(int) - wanted).mean() < 2


def test_overlapping_tiles_share_pixels(path):
    with Slide(path) as slide:
        options = {"tile_size": 32, "microns_per_pixel": None, "level": 1}
        found = tiles.grid(slide, None, overlap=8, **options)
        assert found.coords[1].tolist() == [48, 0] and found.span == 64
        assert found.coords[:, 0].max() + 64 >= 2000
        a, b = tiles.read_tile(slide, found, 100), tiles.read_tile(slide, found, 101)
        np.testing.assert_array_equal(a[:, 24:], b[:, :8])
        assert found.microns_per_pixel == pytest.approx(0.5)


def test_a_grid_that_cannot_be_cut_says_why(path, tmp_path, image):
    silent = write_slide(tmp_path / "silent.tif", image, microns=None)
    with Slide(silent) as slide:
        with pytest.raises(InputError, match=r"silent.tif does not state its microns per pixel"):
            tiles.grid(slide, None)
        level = {"level": 0, "microns_per_pixel": None}
        assert tiles.grid(slide, None, **level).microns_per_pixel is None
        for options, words in (
            ({"level": 3, "microns_per_pixel": None}, "it has 0 to 2"),
            ({"level": 0}, "give microns_per_pixel or level"),
            (level | {"tile_size": 0}, "tile_size must be at least 1"),
            (level | {"overlap": 224}, "overlap must be less than"),
            (level | {"min_tissue": 1.5}, r"min_tissue must be in \[0, 1\]"),
        ):
            with pytest.raises(InputError, match=words):
                tiles.grid(slide, None, **options)
    with Slide(path) as slide, pytest.raises(InputError, match=r"0.1 is finer .* which has 0.25"):
        tiles.grid(slide, None, microns_per_pixel=0.1)


def test_streams_are_the_same_for_any_batch_and_any_threads(path):
    with Slide(path) as slide:
        found = tiles.grid(slide, None, tile_size=32, microns_per_pixel=1.0)
        wanted = np.stack([tiles.read_tile(slide, found, i) for i in range(len(found))])
        for batch_size, threads in ((1, 1), (7, 3), (64, 2), (1000, 4)):
            parts = list(tiles.stream(slide, found, batch_size, threads=threads))
            assert all(len(p) == batch_size for _, p in parts[:-1])
            np.testing.assert_array_equal(np.concatenate([c for c, _ in parts]), found.coords)
            np.testing.assert_array_equal(np.concatenate([p for _, p in parts]), wanted)
        with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
            tiles.stream(slide, found, 0)


def test_a_stream_reads_little_ahead_and_stops_when_it_is_left(path):
    with Slide(path) as slide:
        found = tiles.grid(slide, None, tile_size=32, microns_per_pixel=0.5)
        calls, read = [], slide.read
        slide.read = lambda *given: calls.append(given) or read(*given)
        stream = tiles.stream(slide, found, 10, threads=2)
        for number in range(1, 6):
            next(stream)
            assert len(calls) <= 10 * (number + 1) + 8
        stream.close()
        assert len(calls) < 80 < len(found)
        assert not [t for t in threading.enumerate() if t.name.startswith("tiles")]


# Bags


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def slide_table(tmp_path, path, image):
    """Three slides: one positive, one negative, one of glass."""
    write_slide(tmp_path / "negative.tif", picture(seed=3))
    write_slide(tmp_path / "glass.tif", np.full((900, 900, 3), 245, np.uint8))
    names = ("positive", "negative", "glass")
    return tables.SlideTable(
        "three", names, (str(path), str(tmp_path / "negative.tif"), str(tmp_path / "glass.tif")),
        ("no", "yes"), np.array([1, 0, 0]), np.array(["train", "train", "test"]), np.array(names),
    )  # fmt: skip


def test_features_do_not_depend_on_batches_or_threads(path, model):
    with Slide(path) as slide:
        wanted = bags.bag_of(slide, model, TILING, batch_size=64, threads=1)
        same = bags.bag_of(slide, model, TILING, batch_size=64, threads=3)
        np.testing.assert_array_equal(wanted.features, same.features)
        other = bags.bag_of(slide, model, TILING, batch_size=13, threads=2)
        np.testing.assert_allclose(wanted.features, other.features, atol=1e-5)
        np.testing.assert_array_equal(wanted.coords, other.coords)
        found = TILING.cut(slide)
        pixels = np.stack([tiles.read_tile(slide, found, i) for i in range(5)])
    np.testing.assert_allclose(np.asarray(model.embed(pixels)), wanted.features[:5], atol=1e-5)


def test_extract_goes_on_where_it_was_killed(tmp_path, slide_table, model, monkeypatch, caplog):
    out = tmp_path / "bags"
    out.mkdir()
    (out / "positive.h5.tmp").write_bytes(b"half a bag")
    made = bags.extract(slide_table, model, out, TILING)
    assert list(made) == ["positive", "negative"]  # glass shows no tissue
    assert "left out: no tissue" in caplog.text
    assert sorted(p.name for p in out.glob("*.h5*")) == ["negative.h5", "positive.h5"]
    first = bags.read_bag(made["positive"], weights=bags.model_hash(model))
    assert first.features.dtype == np.float32 and first.features.shape[1] == 32
    assert first.attributes["span"] == pytest.approx(64)
    assert first.attributes["slide_size"].tolist() == [2000, 1400]
    made["negative"].unlink()
    seen = []
    bag_of = bags.bag_of
    monkeypatch.setattr(
        bags, "bag_of", lambda s, *a, **k: seen.append(s.path.name) or bag_of(s, *a, **k)
    )
    bags.extract(slide_table, model, out, TILING)
    assert seen == ["negative.tif", "glass.tif"]


def test_a_bag_that_is_cut_off_is_made_again(tmp_path, slide_table, model):
    slide_table = slide_table.chosen([0])
    made = bags.extract(slide_table, model, tmp_path / "bags", TILING)["positive"]
    whole = bags.read_bag(made)
    made.write_bytes(made.read_bytes()[:500])
    with pytest.raises(InputError, match="damaged or no HDF5 file"):
        bags.read_bag(made)
    bags.extract(slide_table, model, tmp_path / "bags", TILING)
    np.testing.assert_array_equal(bags.read_bag(made).features, whole.features)


def test_a_bag_of_other_weights_or_tiles_is_refused_or_redone(tmp_path, slide_table, model):
    slide_table = slide_table.chosen([0])
    out = tmp_path / "bags"
    made = bags.extract(slide_table, model, out, TILING)["positive"]
    other = tiny_model(seed=1)
    assert bags.model_hash(other) != bags.model_hash(model) == bags.model_hash(tiny_model())
    with pytest.raises(InputError, match=f"weights {bags.model_hash(model)}, not .*redo=True"):
        bags.extract(slide_table, other, out, TILING)
    with pytest.raises(InputError, match="was made with tiles"):
        bags.extract(slide_table, model, out, dataclasses.replace(TILING, overlap=4))
    bags.extract(slide_table, other, out, TILING, redo=True)
    assert bags.read_bag(made).attributes["weights"] == bags.model_hash(other)
    with pytest.raises(InputError, match=f"not {bags.model_hash(model)}"):
        bags.read_bag(made, weights=bags.model_hash(model))


def test_slides_that_cannot_be_used_are_left_out(tmp_path, slide_table, model, caplog):
    (tmp_path / "negative.tif").write_bytes(b"II*\0")
    made = bags.extract(slide_table, model, tmp_path / "bags", TILING)
    assert list(made) == ["positive"]
    assert "negative.tif" in caplog.text
    with pytest.raises(InputError, match=r"none of the 2 slides of three can be used: .*negative"):
        bags.extract(slide_table.chosen([1, 2]), model, tmp_path / "bags", TILING)
    held = lock.take(tmp_path / "bags" / lock.NAME)
    with pytest.raises(InputError, match="another process"):
        bags.extract(slide_table, model, tmp_path / "bags", TILING)
    held.close()


def test_bags_of_other_tools_are_read_and_others_refused(tmp_path, monkeypatch):
    import h5py

    features = np.random.default_rng(0).random((5, 3)).astype(np.float16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = features[None], np.arange(10).reshape(1, 5, 2)
    found = bags.read_bag(tmp_path / "a.h5")
    np.testing.assert_array_equal(found.features, features.astype(np.float32))
    assert found.coords.tolist()[4] == [8, 9]
    with pytest.raises(InputError, match=r"made with weights \(not stated\), not abc"):
        bags.read_bag(tmp_path / "a.h5", weights="abc")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["features"] = features
    with pytest.raises(InputError, match="has no 'coords'; it holds features"):
        bags.read_bag(tmp_path / "b.h5")
    with pytest.raises(InputError, match="no such bag"):
        bags.read_bag(tmp_path / "c.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"needs: pip install 'vitjax\[medical\]'"):
        bags.read_bag(tmp_path / "a.h5")


# Models of bags


def random_bags(*lengths, width=6, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(n, width)).astype(np.float32) for n in lengths]


def test_gated_attention_is_the_papers_formula():
    for pool in ("gated", "attention"):
        model = mil.mil(num_features=6, num_classes=3, pool=pool, hidden_dim=8, attention_dim=5)
        params, apply = model.init(jax.random.key(0)), jax.jit(model.apply)
        (bag,) = random_bags(9)
        out = apply(params, jnp.asarray(bag[None]), jnp.ones((1, 9), bool))
        p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        h = np.maximum(bag @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
        score = np.tanh(h @ p["value"]["kernel"])
        if pool == "gated":
            score = score / (1 + np.exp(-h @ p["gate"]["kernel"]))
        a = np.exp(score @ p["weight"]["kernel"])[:, 0]
        a /= a.sum()
        logits = (a @ h) @ p["head"]["kernel"] + p["head"]["bias"]
        np.testing.assert_allclose(out["attention"][0], a, atol=1e-6)
        np.testing.assert_allclose(out["embedding"][0], a @ h, atol=1e-5)
        np.testing.assert_allclose(out["logits"][0], logits, atol=1e-5)
        assert a.std() > 1e-3


@pytest.mark.parametrize("pool", mil.POOLS)
def test_order_and_padding_change_nothing(pool):
    model = mil.mil(num_features=6, num_classes=2, pool=pool, hidden_dim=8, attention_dim=5)
    params, apply = model.init(jax.random.key(1)), jax.jit(model.apply)
    (bag,) = random_bags(11)
    plain = apply(params, jnp.asarray(bag[None]), jnp.ones((1, 11), bool))
    order = np.random.default_rng(2).permutation(11)
    moved = apply(params, jnp.asarray(bag[order][None]), jnp.ones((1, 11), bool))
    np.testing.assert_allclose(moved["logits"], plain["logits"], atol=1e-5)
    np.testing.assert_allclose(moved["attention"][0], plain["attention"][0][order], atol=1e-6)
    wide = np.full((3, 40, 6), 1e3, np.float32)
    mask = np.zeros((3, 40), bool)
    places = np.sort(np.random.default_rng(3).choice(40, 11, replace=False))
    wide[1, places], mask[1, places] = bag, True
    out = apply(params, jnp.asarray(wide), jnp.asarray(mask))
    np.testing.assert_allclose(out["logits"][1], plain["logits"][0], atol=1e-5)
    np.testing.assert_allclose(out["attention"][1, places], plain["attention"][0], atol=1e-6)
    assert float(out["attention"][1].sum()) == pytest.approx(1, abs=1e-5)
    assert np.isfinite(out["logits"]).all() and not np.asarray(out["attention"])[~mask].any()
    gradient = jax.jit(jax.grad(lambda x: apply(params, x, jnp.asarray(mask))["logits"].sum()))(
        jnp.asarray(wide)
    )
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~mask].any()


def test_pools_without_attention_are_plain_mean_and_maximum():
    (bag,) = random_bags(7)
    for pool, reduce in (("mean", np.mean), ("max", np.max)):
        model = mil.mil(num_features=6, num_classes=2, pool=pool, hidden_dim=8)
        params, apply = model.init(jax.random.key(0)), jax.jit(model.apply)
        kernel, bias = (np.asarray(params["hidden"][name]) for name in ("kernel", "bias"))
        hidden = np.maximum(bag @ kernel + bias, 0)
        out = apply(params, jnp.asarray(bag[None]), jnp.ones((1, 7), bool))
        np.testing.assert_allclose(out["embedding"][0], reduce(hidden, axis=0), atol=1e-5)
        if pool == "mean":
            np.testing.assert_allclose(out["attention"][0], 1 / 7, atol=1e-6)


def test_models_that_cannot_be_are_refused():
    for options, words in (
        ({"pool": "gate"}, "did you mean 'gated'"),
        ({"hidden_dim": 0}, "hidden_dim must be positive, got 0"),
        ({"num_classes": 1}, "at least 2, got 1"),
        ({"dropout_rate": 1.0}, r"\[0, 1\)"),
    ):
        with pytest.raises(InputError, match=words):
            mil.mil(**{"num_features": 6, "num_classes": 2} | options)


# Fitting


def planted(count=40, seed=0):
    """Bags of 20 to 90 instances; in positive ones three are shifted."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    made = []
    for label in labels:
        bag = generator.normal(size=(int(generator.integers(20, 90)), 6)).astype(np.float32) * 3 + 5
        bag[:3, 0] += 15 * label
        made.append(bag)
    splits = np.array((["train"] * 5 + ["val"] * 2 + ["test"] * 3) * (count // 10))
    return made, labels, splits


FAST = {"hidden_dim": 16, "attention_dim": 8, "epochs": 25, "peak_lr": 1e-2}


@pytest.fixture(scope="module")
def fitted():
    return fit.fit(*planted(), **FAST)


def test_gated_attention_finds_the_planted_instances(fitted):
    made, labels, splits = planted()
    test = splits == "test"
    assert fit.auroc(fitted.probabilities[test], labels[test]) > 0.9
    np.testing.assert_allclose(fitted.probabilities.sum(1), 1, atol=1e-6)
    for row in np.flatnonzero(test & (labels == 1)):
        assert fitted.attention[row].argmax() < 3
        assert fitted.attention[row][:3].mean() > 5 * fitted.attention[row][3:].mean()
        assert len(fitted.attention[row]) == len(made[row])


def test_a_fit_is_its_seed(fitted):
    again = fit.fit(*planted(), **FAST)
    np.testing.assert_array_equal(again.probabilities, fitted.probabilities)
    assert again.history == fitted.history
    other = fit.fit(*planted(), seed=1, **FAST)
    assert np.abs(other.probabilities - fitted.probabilities).max() > 1e-4


def test_the_best_epoch_is_kept_and_no_more_are_run_than_patience(fitted):
    made, labels, splits = planted()
    shuffled = labels.copy()
    shuffled[splits == "val"] = 1 - labels[splits == "val"]  # it gets worse by learning
    options = {"metric": "loss", "patience": 3, "class_weights": None}
    result = fit.fit(made, shuffled, splits, **FAST | options)
    losses = [row["val_loss"] for row in result.history]
    assert result.best_epoch == int(np.argmin(losses)) + 1
    assert len(losses) == result.best_epoch + 3 < 25
    val = splits == "val"
    seen = np.stack([result.model(bag)[0] for bag, is_val in zip(made, val, strict=True) if is_val])
    loss = -np.log(seen[np.arange(val.sum()), shuffled[val]]).mean()
    assert loss == pytest.approx(min(losses), rel=1e-4)
    np.testing.assert_array_equal(result.probabilities[val], seen)


def test_test_slides_have_no_part_in_the_fit(fitted):
    made, labels, splits = planted()
    for row in np.flatnonzero(splits == "test"):
        made[row] = made[row] * 0 + 1e4
        labels[row] = -1
    other = fit.fit(made, labels, splits, **FAST)
    assert other.history == fitted.history
    rows = splits != "test"
    np.testing.assert_array_equal(other.probabilities[rows], fitted.probabilities[rows])


def test_few_lengths_are_compiled(monkeypatch):
    lengths = set()
    padded = trained.padded

    def record(given, length, num_bags):
        lengths.add((length, num_bags))
        return padded(given, length, num_bags)

    monkeypatch.setattr(fit, "padded", record)
    monkeypatch.setattr(trained, "padded", record)
    made = random_bags(*range(3, 300, 11))
    labels = np.arange(len(made)) % 2
    splits = np.array(["train", "train", "val", "val"] * len(made))[: len(made)]
    fit.fit(made, labels, splits, **FAST | {"epochs": 2})
    assert {length for length, _ in lengths} <= {64, 128, 256, 512}
    assert {count for _, count in lengths} == {1, 4}


def test_bag_dropout_takes_a_part_of_the_instances_by_chance(monkeypatch):
    bag = np.arange(100, dtype=np.float32)[:, None]
    some = fit._subset(bag, (0, 1, 2), 0.25, None)
    assert len(some) == 75 == len(set(some[:, 0].tolist()))
    np.testing.assert_array_equal(some, fit._subset(bag, (0, 1, 2), 0.25, None))
    assert (some != fit._subset(bag, (0, 2, 2), 0.25, None)).any()
    assert len(fit._subset(bag, (0, 1, 2), 0.25, 10)) == 10
    assert fit._subset(bag, (0, 1, 2), 0.0, None) is bag
    assert len(fit._subset(bag[:1], (0, 1, 2), 0.9, None)) == 1


def test_classes_weigh_by_what_is_asked():
    labels = np.array([0, 0, 0, 1])
    weights = fit._class_weights("balanced", labels, 2)
    np.testing.assert_allclose(weights, [2 / 3, 2])
    assert (weights[labels].sum()) == pytest.approx(4)
    np.testing.assert_array_equal(fit._class_weights(None, labels, 2), [1, 1])
    np.testing.assert_array_equal(fit._class_weights((1, 5), labels, 2), [1, 5])
    made, labels, splits = planted()
    options = FAST | {"epochs": 2, "batch_size": 1}
    high = fit.fit(made, labels, splits, class_weights=(1, 50), **options)
    low = fit.fit(made, labels, splits, class_weights=(50, 1), **options)
    assert high.probabilities[:, 1].mean() > low.probabilities[:, 1].mean() + 0.2


def test_features_are_scaled_by_the_training_bags(fitted):
    made, _, splits = planted()
    rows = np.concatenate([bag for bag, s in zip(made, splits, strict=True) if s == "train"])
    np.testing.assert_allclose(fitted.model.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(fitted.model.std, rows.std(0), rtol=1e-5)


def test_a_saved_model_predicts_the_same(fitted, tmp_path):
    fitted.model.save(tmp_path / "model.npz")
    loaded = trained.TrainedMil.load(tmp_path / "model.npz")
    bag = planted()[0][7]
    for a, b in zip(loaded(bag), fitted.model(bag), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.classes == ("0", "1")
    with pytest.raises(InputError, match=r"a bag must be \[N, 6\]"):
        loaded(bag[:, :4])
    (tmp_path / "other.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=r"other.npz is no model of bags"):
        trained.TrainedMil.load(tmp_path / "other.npz")


def test_auroc_counts_pairs_and_leaves_out_classes_that_are_not_there():
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 50), generator.random(50).round(1)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    found = fit.auroc(np.stack([1 - scores, scores], 1), labels)
    assert found == pytest.approx(np.mean(pairs))
    three = np.eye(3)[np.array([0, 1, 0, 1])]
    assert fit.auroc(three, np.array([0, 1, 0, 1])) == 1.0
    assert np.isnan(fit.auroc(three, np.zeros(4, int)))
    mixed = np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    assert fit.auroc(mixed, np.array([0, 1, 1, 2])) == pytest.approx((1 + 7 / 8 + 1) / 3)


def test_fits_that_cannot_be_say_why():
    made, labels, splits = planted(10)
    same = np.where(splits == "val", 1, labels)
    bad = [np.full_like(bag, np.nan) if i == 3 else bag for i, bag in enumerate(made)]
    narrow = [bag[:, :4] if i == 2 else bag for i, bag in enumerate(made)]
    for given, options, words in (
        ((made, labels[:5], splits), {}, "10 bags, but 5 labels"),
        ((made, labels, np.where(splits == "val", "valid", splits)), {}, "did you mean 'val'"),
        ((made, np.zeros(10, int), splits), {}, "must be of two classes"),
        ((made, np.where(splits == "val", -1, labels), splits), {}, "of 'val' has label -1"),
        ((made, same, splits), {}, "metric='loss'"),
        ((bad, labels, splits), {}, "bag 3 has features that are no numbers"),
        ((narrow, labels, splits), {}, "bag 2 has 4 features, others 6"),
        ((made, labels, splits), {"bag_dropout": 1.0}, r"bag_dropout must be in \[0, 1\)"),
        ((made, labels, splits), {"epochs": 0}, "epochs must be at least 1"),
        ((made, labels, splits), {"metric": "auc"}, "did you mean 'auroc'"),
        ((made, labels, splits), {"class_weights": (1.0,)}, "must be 2 numbers"),
    ):
        with pytest.raises(InputError, match=words):
            fit.fit(*given, **FAST | {"epochs": 1} | options)


# Heat maps


def test_a_heat_map_has_each_number_in_its_place():
    coords = np.array([[0, 0], [64, 0], [128, 64]])
    found = heat.heat_map(coords, np.array([0.1, 0.2, 0.7]), (250, 190), 64.0)
    assert found.shape == (3, 4)
    wanted = np.full((3, 4), np.nan)
    wanted[0, 0], wanted[0, 1], wanted[1, 2] = 0.1, 0.2, 0.7
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    shifted = heat.heat_map(coords + 1, np.array([0.1, 0.2, 0.7]), (250, 190), 64.0)
    assert np.isfinite(shifted).sum() == 3  # slivers of a pixel give no cell a value
    both = heat.heat_map(np.array([[0, 0], [32, 0]]), np.array([1.0, 3.0]), (96, 64), 64.0, cell=32)
    np.testing.assert_allclose(both, [[1, 2, 3]] * 2, rtol=1e-6)
    uneven = heat.heat_map(np.array([[0, 0], [48, 0]]), np.array([1.0, 3.0]), (128, 64), 64.0)
    np.testing.assert_allclose(uneven, [[(1 + 3 / 4) / (1 + 1 / 4), 3]], rtol=1e-6)
    with pytest.raises(InputError, match="3 tiles, but 2 numbers"):
        heat.heat_map(coords, np.zeros(2), (250, 190), 64.0)


def test_a_picture_is_coloured_where_tiles_are(tmp_path):
    thumbnail = np.full((190, 250, 3), 240, np.uint8)
    found = np.full((3, 4), np.nan, np.float32)
    found[1, 1], found[1, 2] = 0.1, 0.9
    covered = (250 / 256, 190 / 192)
    heat.draw_heat_map(thumbnail, found, tmp_path / "a.png", covered=covered)
    drawn = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert drawn.shape == thumbnail.shape
    assert (drawn[20, 30] == 240).all() and (drawn[96, 220] == 240).all()
    low, high = drawn[96, 96], drawn[96, 160]  # the middle of each cell, in pixels of the slide
    assert low[2] > low[0] and high[0] > high[2]


# Tables


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_a_table_of_slides_is_read(tmp_path):
    (tmp_path / "slides" / "deep").mkdir(parents=True)
    for name in ("slides/s1.svs", "slides/deep/s2.tif", "slides/s3.ndpi", "slides/s4.mrxs"):
        (tmp_path / name).touch()
    rows = [
        ["case_id", "slide_id", "label", "age"],
        ["p1", "s1", "tumor", "60"],
        ["p1", "s2", "normal", ""],
        ["p2", "s3.ndpi", "normal", "7"],
        ["p3", "s4", "", "1"],
    ]
    path = write_csv(tmp_path / "t.csv", rows)
    splits = [["", "train", "val", "test"], ["0", "s1", "s3.ndpi", ""], ["1", "s2", "", ""]]
    splits = write_csv(tmp_path / "splits_0.csv", splits)
    found = tables.read_table(path, tmp_path / "slides", splits=splits)
    assert found.slide_ids == ("s1", "s2", "s3", "s4")
    assert found.paths[1].endswith("deep/s2.tif")
    assert found.classes == ("normal", "tumor") and found.labels.tolist() == [1, 0, 0, -1]
    assert found.splits.tolist() == ["train", "train", "val", ""]
    assert found.groups.tolist() == ["p1", "p1", "p2", "p3"]
    assert found.columns["age"].tolist() == ["60", "", "7", "1"]
    assert found.rows("train").tolist() == [0, 1]
    assert found.chosen([2]).slide_ids == ("s3",)
    order = tables.read_table(path, tmp_path / "slides", classes=("tumor", "normal"))
    assert order.labels.tolist() == [0, 1, 1, -1]

    def refuse(words, content=None, **options):
        given = write_csv(tmp_path / "bad.csv", content) if content else path
        with pytest.raises(InputError, match=words):
            tables.read_table(given, tmp_path / "slides", **options)

    refuse("has no column 'label'; its columns are case_id, slide_id", [["case_id", "slide_id"]])
    refuse("no file for slide 's9'", [*rows, ["p4", "s9", "normal", ""]])
    refuse("slide 's1' is there twice", [*rows, ["p1", "s1", "normal", ""]])
    refuse("unknown label 'tumor'", classes=("normal", "tumour"))
    refuse("has no row", rows[:1])
    refuse("cannot read .*none.csv", splits=tmp_path / "none.csv")
    parted = write_csv(tmp_path / "p.csv", [["train", "val", "test"], ["s1", "s2", ""]])
    refuse("patient 'p1' is in 'train' and in 'val'", splits=parted)
    twice = write_csv(tmp_path / "w.csv", [["train", "val", "test"], ["s1", "s1", ""]])
    refuse("slide 's1' is in train and val", splits=twice)
    stranger = write_csv(tmp_path / "x.csv", [["train", "val", "test"], ["s7", "", ""]])
    refuse("slide 's7' is not in", splits=stranger)


def test_a_fold_of_transmil_is_read(tmp_path):
    rows = [["", "train", "train_label", "val", "val_label", "test", "test_label"],
            ["0", "tumor_001", "1", "normal_002", "0.0", "test_001", "1.0"],
            ["1", "normal_001", "0", "", "", "test_002", "0.0"]]  # fmt: skip
    homes, labels = tables.read_fold(write_csv(tmp_path / "fold0.csv", rows))
    assert homes == {
        "tumor_001": "train", "normal_001": "train", "normal_002": "val",
        "test_001": "test", "test_002": "test",
    }  # fmt: skip
    assert labels["tumor_001"] == labels["test_001"] == "1" and labels["normal_002"] == "0"
    with pytest.raises(InputError, match="no column 'val_label'"):
        tables.read_fold(
            write_csv(tmp_path / "bad.csv", [["train", "train_label", "val"], ["a"] * 3])
        )


def test_numbers_are_sorted_as_numbers():
    classes, labels = tables.class_numbers(["10", "2", "", "1"], None, "t")
    assert classes == ("1", "2", "10") and labels.tolist() == [2, 1, -1, 0]


# CAMELYON


def test_camelyon16_has_its_official_test_set(tmp_path):
    for kind, count in (("normal", 20), ("tumor", 10)):
        (tmp_path / "training" / kind).mkdir(parents=True)
        for i in range(1, count + 1):
            (tmp_path / "training" / kind / f"{kind}_{i:03}.tif").touch()
    with pytest.raises(InputError, match=r"reference.csv is missing"):
        (tmp_path / "testing" / "images").mkdir(parents=True)
        camelyon16(tmp_path)
    for i in (1, 2, 49):
        (tmp_path / "testing" / "images" / f"test_{i:03}.tif").touch()
    reference = tmp_path / "testing" / "reference.csv"
    reference.write_text("test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\n")
    notes = tmp_path / "training" / "lesion_annotations"
    notes.mkdir()
    (notes / "tumor_003.xml").touch()
    found = camelyon16(tmp_path)
    assert len(found) == 32 and found.classes == ("normal", "tumor")
    assert [len(found.rows(s)) for s in ("train", "val", "test")] == [24, 6, 2]
    assert found.labels[found.rows("val")].sum() == 2  # a fifth of either class
    by_id = dict(zip(found.slide_ids, zip(found.labels, found.splits, strict=True), strict=True))
    assert by_id["test_001"] == (1, "test") and by_id["test_002"] == (0, "test")
    assert "test_049" not in by_id and any("test_049" in note for note in found.notes)
    assert all(by_id[f"tumor_{i:03}"][0] == 1 for i in range(1, 11))
    assert found.columns["annotation"][found.slide_ids.index("tumor_003")].endswith("tumor_003.xml")
    assert found.group_kind == "slide" and list(found.groups) == list(found.slide_ids)
    np.testing.assert_array_equal(camelyon16(tmp_path).splits, found.splits)
    reference.write_text("test_001,Tumour\n")
    with pytest.raises(InputError, match="line 1: label 'tumour'; allowed: Tumor, Normal"):
        camelyon16(tmp_path)
    with pytest.raises(InputError, match="is it CAMELYON16's folder"):
        camelyon16(tmp_path / "testing")


def test_camelyon17_is_split_by_centre(tmp_path):
    rows = [["patient", "stage"]]
    for patient in (4, 25, 44, 79, 99, 120):
        for node in (0, 1):
            (tmp_path / f"patient_{patient:03}_node_{node}.tif").touch()
        name = f"patient_{patient:03}"
        if patient < 100:
            rows += [[f"{name}.zip", "pN1"], [f"{name}_node_0.tif", "macro"]]
            rows.append([f"{name}_node_1.tif", "negative"])
    write_csv(tmp_path / "stages.csv", rows)
    found = camelyon17(tmp_path)
    assert found.classes == ("negative", "itc", "micro", "macro")
    assert found.columns["centre"].tolist() == [
        c for c in ("0", "1", "2", "3", "4", "") for _ in "ab"
    ]
    wanted = ["train", "val", "test", "train", "train", ""]
    assert found.splits.tolist() == [s for s in wanted for _ in "ab"]
    assert found.labels.tolist() == [3, 0] * 5 + [-1, -1]
    assert found.groups[0] == "patient_004" and found.columns["stage"][0] == "pN1"
    other = camelyon17(tmp_path, val_centre=3, test_centre=0, is_binary=True)
    assert other.splits[0] == "test" and other.labels.tolist() == [1, 0] * 5 + [-1, -1]
    folder = tmp_path / "training" / "center_2"
    folder.mkdir(parents=True)
    (folder / "patient_121_node_0.tif").touch()
    assert camelyon17(tmp_path).splits[-1] == "test"
    with pytest.raises(InputError, match="test_centre must be 0 to 4, got 5"):
        camelyon17(tmp_path, test_centre=5)
    write_csv(tmp_path / "stages.csv", [*rows, ["patient_120.zip", "pN3"]])
    with pytest.raises(InputError, match="unknown stage 'pN3'"):
        camelyon17(tmp_path)
    (tmp_path / "stages.csv").unlink()
    with pytest.raises(InputError, match=r"stages.csv or stage_labels.csv"):
        camelyon17(tmp_path)


ANNOTATION = """<?xml version="1.0"?><ASAP_Annotations><Annotations>
{}</Annotations><AnnotationGroups><Group Name="Tumor" PartOfGroup="None"/></AnnotationGroups>
</ASAP_Annotations>"""


def outline(points, group, kind="Polygon"):
    corners = "".join(
        f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in reversed([*enumerate(points)])
    )
    return (
        f'<Annotation Name="a" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">'
        f"<Coordinates>{corners}</Coordinates></Annotation>"
    )


def test_annotations_are_polygons_with_holes(tmp_path):
    square, hole = (
        [(0, 0), (100, 0), (100, 100), (0, 100)],
        [(40, 40), (60, 40), (60, 60), (40, 60)],
    )
    star = [(200, 0), (300, 100), (300, 0), (200, 100)]  # crosses itself
    text = outline(square, "_0") + outline(hole, "_2") + outline(star, "Tumor")
    (tmp_path / "a.xml").write_text(ANNOTATION.format(text + outline([(1, 1)], "_0", "Dot")))
    found = lesions(tmp_path / "a.xml")
    assert len(found) == 2 and len(found.holes) == 1
    assert next(iter(found)).tolist() == [list(map(float, p)) for p in square]
    points = np.array([(10, 10), (50, 50), (120, 50), (250, 70), (250, 30), (210, 50), (290, 50)])
    assert found.which(points).tolist() == [0, -1, -1, -1, -1, 1, 1]
    shares = found.share(np.array([[0, 0], [30, 30], [90, 0], [-500, 0]]), 40.0, samples=20)
    np.testing.assert_allclose(shares, [1, 1 - 400 / 1600, 0.25, 0], atol=0.01)
    for content, words in (
        ("<ASAP_Annot", "is no XML"),
        ("<Annotations/>", "not ASAP_Annotations"),
        (ANNOTATION.format(outline([(0, 0), (1, 1)], "_0")), "has 2 corners; 3 are the least"),
        (ANNOTATION.format(outline([(0, "x"), (1, 1), (2, 0)], "_0")), "lacks a number"),
    ):
        (tmp_path / "b.xml").write_text(content)
        with pytest.raises(InputError, match=words):
            lesions(tmp_path / "b.xml")
    with pytest.raises(InputError, match=r"cannot read .*none.xml"):
        lesions(tmp_path / "none.xml")


def test_points_in_a_polygon_are_those_that_a_drawing_fills():
    angle = np.sort(np.random.default_rng(0).uniform(0, 2 * np.pi, 40))
    radius = np.random.default_rng(1).uniform(20, 95, 40)
    polygon = np.stack([100 + radius * np.cos(angle), 100 + radius * np.sin(angle)], 1).round()
    drawn = cv2.fillPoly(np.zeros((200, 200), np.uint8), [polygon.astype(np.int32)], 1)
    line = cv2.polylines(np.zeros((200, 200), np.uint8), [polygon.astype(np.int32)], True, 1, 2)
    points = np.argwhere(line == 0)[:, ::-1]  # away from the outline itself
    np.testing.assert_array_equal(
        in_polygon(points, polygon), drawn[points[:, 1], points[:, 0]] == 1
    )
