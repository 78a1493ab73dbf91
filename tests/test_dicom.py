"""DICOM: every file of pydicom's collections, windows against hand values, folders of files."""

import os
from pathlib import Path

import numpy as np
import pytest

from vitjax.data import dicom
from vitjax.data.images import decode, size_of
from vitjax.errors import InputError, UnreadableImage
from vitjax.medical.leakage import check_groups
from vitjax.medical.privacy import hashed
from vitjax.medical.readers.dicom_folder import dicom_folder, years

pydicom = pytest.importorskip("pydicom", reason="needs pydicom")

REASONS = (
    "it has no pixels: it is ",
    "it is no DICOM file: DICM does not stand at byte 128",
    "cannot read its pixels: ",
    "its number of frames is none: ",
)


def collections() -> dict[str, list[str]]:
    """The files of pydicom itself, and of the wheel pydicom-data; nothing is downloaded."""
    data_store = pytest.importorskip("data_store", reason="needs pydicom-data")
    roots = {
        "pydicom": Path(pydicom.__file__).parent / "data" / "test_files",
        "pydicom-data": Path(data_store.__file__).parent / "data",
    }
    return {
        name: sorted(
            str(p)
            for p in root.rglob("*")
            if p.is_file() and p.suffix not in (".py", ".pyc", ".json")
        )
        for name, root in roots.items()
    }


@pytest.fixture(scope="module")
def by_name() -> dict[str, str]:
    return {os.path.basename(path): path for paths in collections().values() for path in paths}


def test_every_file_of_pydicom_is_shown_or_refused_with_a_reason():
    counts = {}
    for name, paths in collections().items():
        shown, refused = 0, []
        for path in paths:
            data = Path(path).read_bytes()
            try:
                image = dicom.shown(data)
            except UnreadableImage as error:
                refused.append(str(error))
                continue
            shown += 1
            assert image.dtype == np.uint8 and image.ndim == 3, path
            assert image.shape[2] in (1, 3) and image.shape[:2] == dicom.size(data), path
            np.testing.assert_array_equal(dicom.shown(path), image, path)
        assert all(reason.startswith(REASONS) for reason in refused), refused
        counts[name] = (shown, len(refused))
    if pydicom.__version__.startswith("3.0."):
        assert counts == {"pydicom": (87, 87), "pydicom-data": (67, 1)}
    assert sum(shown for shown, _ in counts.values()) > 140


@pytest.mark.parametrize(("name", "other", "error"), [
    ("OBXXXX1A_expb.dcm", "OBXXXX1A.dcm", 0), ("OBXXXX1A_rle.dcm", "OBXXXX1A.dcm", 0),
    ("gdcm-US-ALOKA-16_big.dcm", "gdcm-US-ALOKA-16.dcm", 0),
    ("SC_rgb_expb_16bit.dcm", "SC_rgb_16bit.dcm", 0), ("SC_rgb_32bit.dcm", "SC_rgb.dcm", 0),
    ("SC_ybr_full_uncompressed.dcm", "SC_rgb.dcm", 6), ("693_J2KR.dcm", "693_UNCR.dcm", 0),
    ("US1_J2KR.dcm", "US1_UNCR.dcm", 0), ("MR_small_bigendian.dcm", "MR_small.dcm", 0),
    ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm", 0), ("MR_small_RLE.dcm", "MR_small.dcm", 0),
    ("emri_small_jpeg_ls_lossless.dcm", "emri_small.dcm", 0),
])  # fmt: skip
def test_codecs_byte_orders_and_colours_show_the_same(by_name, name, other, error):
    one, two = (dicom.shown(by_name[x]).astype(int) for x in (name, other))
    assert two.std() > 5 and np.abs(one - two).max() <= error


def test_frames_are_read_by_number(by_name):
    path = by_name["emri_small.dcm"]
    stack = pydicom.dcmread(path).pixel_array
    for frame in (0, 3, 9):
        expected = stack[frame].astype(float)
        expected = (expected - expected.min()) / np.ptp(expected) * 255
        assert np.abs(dicom.shown(path, frame)[..., 0] - expected).max() <= 0.51
    with pytest.raises(UnreadableImage, match="no frame 10: it has 10"):
        dicom.shown(path, 10)
    with pytest.raises(UnreadableImage, match="10 frames; one is expected"):
        decode(Path(path).read_bytes(), 1)


def file_of(tmp_path, pixels, name="made.dcm", **tags):
    """A CT slice with other pixels; a tag of None is taken away."""
    from pydicom.data import get_testdata_file

    data = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    data.RescaleSlope, data.RescaleIntercept = 1, 0
    data.PixelPaddingValue = None
    tags = {"PixelRepresentation": int(pixels.dtype.kind == "i"), "BitsStored": 16} | tags
    tags |= {"HighBit": tags["BitsStored"] - 1, "Rows": pixels.shape[-2]}
    for key, value in (tags | {"Columns": pixels.shape[-1]}).items():
        if value is None:
            data.pop(key, None)
        else:
            setattr(data, key, value)
    data.PixelData = pixels.tobytes()
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    data.save_as(tmp_path / name)
    return str(tmp_path / name)


def test_a_window_is_that_of_the_standard(tmp_path):
    """Stored values 0..6, which are -100..500 Hounsfield units."""
    values = np.array([[0, 1, 2, 3, 4, 5, 6]], np.int16)
    path = file_of(tmp_path, values, RescaleSlope=100, RescaleIntercept=-100)
    # Centre 100, width 401: from -100.5 + 0.5 to 100 + 200, in 400 steps.
    hounsfield = np.arange(-100, 501, 100)
    expected = np.clip(((hounsfield - 99.5) / 400 + 0.5) * 255, 0, 255).round()
    np.testing.assert_array_equal(dicom.shown(path, window=(100, 401))[0, :, 0], expected)
    np.testing.assert_allclose(dicom.linear(np.float32([-100, 99.5, 300]), 100, 400), [0, 0.5, 1])
    low, high = 40 - 200, 40 + 200 - 1  # the mediastinum's preset: clip to c - w/2, c + w/2 - 1
    scaled = np.clip((hounsfield - low) / (high - low), 0, 1) * 255
    found = dicom.shown(path, window="mediastinum")[0, :, 0]
    assert np.abs(found - scaled).max() <= 0.51
    own = {"WindowCenter": [100, 0], "WindowWidth": [401, 101], "RescaleSlope": 100}
    several = file_of(tmp_path, values, RescaleIntercept=-100, **own)
    np.testing.assert_array_equal(dicom.shown(several)[0, :, 0], expected)
    assert dicom.shown(several, window=1)[0, :, 0].tolist() == [0, 129, 255, 255, 255, 255, 255]
    with pytest.raises(UnreadableImage, match="no window 2: it has 2"):
        dicom.shown(several, window=2)
    for function, wanted in (
        ("LINEAR_EXACT", 100 / 401 + 0.5),
        ("SIGMOID", 1 / (1 + np.exp(-400 / 401))),
    ):
        path = file_of(tmp_path, values, RescaleIntercept=-100, VOILUTFunction=function, **own)
        assert abs(dicom.shown(path)[0, 3, 0] - wanted * 255) <= 0.51
    for wrong in ("lungs", (40, 0.5), -1, (1, 2, 3)):
        with pytest.raises(InputError, match="window"):
            dicom.shown(path, window=wrong)


def test_inverted_signed_padded_and_overlaid_pixels(tmp_path):
    values = np.array([[-3, 0, 3, 9]], np.int16)
    window = {"WindowCenter": 3.5, "WindowWidth": 13}
    plain = dicom.shown(file_of(tmp_path, values, **window))
    inverted = file_of(tmp_path, values, PhotometricInterpretation="MONOCHROME1", **window)
    np.testing.assert_array_equal(dicom.shown(inverted), 255 - plain)
    assert plain[0, 0, 0] == 0 and plain[0, 3, 0] == 255
    # Twelve bits with a sign, and an overlay in the four above.
    masked = (values & 0x0FFF) | np.int16(0x3000)
    np.testing.assert_array_equal(
        dicom.shown(file_of(tmp_path, masked, BitsStored=12, **window)), plain
    )
    padded = np.array([[-2000, 0, 50, 100]], np.int16)
    found = dicom.shown(file_of(tmp_path, padded, PixelPaddingValue=-2000))
    assert found[0, :, 0].tolist() == [0, 0, 128, 255]


def test_a_codec_that_is_missing_is_named(by_name, monkeypatch):
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, "is_available", property(lambda self: False))
    for name, package in (
        ("MR_small_jp2klossless.dcm", "JPEG 2000.* pip install pylibjpeg pylibjpeg-openjpeg"),
        ("JPGExtended.dcm", "JPEG Extended.* pip install pylibjpeg pylibjpeg-libjpeg"),
        ("MR_small_RLE.dcm", "RLE Lossless, is read by nothing installed"),
    ):
        with pytest.raises(UnreadableImage, match=package):
            dicom.shown(by_name[name])


def test_the_size_comes_from_the_header(by_name):
    data = Path(by_name["MR_truncated.dcm"]).read_bytes()
    assert size_of(data) == (64, 64)
    with pytest.raises(UnreadableImage, match="cannot read its pixels"):
        decode(data, 1)


def fill(root):
    """Four patients of two slices each, in no order of names."""
    for number in range(8):
        pixels = np.full((4, 4), number * 10, np.int16)
        pixels[0, 0] = 100
        file_of(root, pixels, f"{'ab'[number // 2 % 2]}/slice{number}",
                PatientID=f"P{number // 2}", PatientAge=("045Y", "006M", "", "003W")[number % 4],
                PatientSex="FM"[number % 2], ViewPosition="PA", Manufacturer="Maker")  # fmt: skip
    (root / "a" / "notes.txt").write_text("no image")


def test_a_folder_of_dicom_files(tmp_path):
    fill(tmp_path)
    cohort = dicom_folder(
        str(tmp_path), window=(50, 101), salt="s", test_fraction=0.4, val_fraction=0
    )
    check_groups(cohort)
    assert len(cohort) == 8 and cohort.label_sets[0].classes == ("a", "b")
    assert set(cohort.groups) == {hashed(f"P{i}", "s") for i in range(4)}
    assert not any("P0" in str(g) for g in cohort.groups)
    assert cohort.ids[1] == "a/slice1" and cohort.images[1][1, 1, 0] == round(10.5 / 100 * 255)
    assert cohort.columns["age"][:2].tolist() == [45, 0.5] and np.isnan(cohort.columns["age"][4])
    assert cohort.columns["sex"][0] == "Female" and cohort.columns["site"][0] == "Maker"
    assert {len(set(cohort.labels["class"][cohort.rows(s)])) for s in ("train", "test")} == {2}
    assert np.isnan(years("45")) and years("014D") == 14 / 365.25


def test_a_folder_with_a_table_and_frames(tmp_path, by_name):
    data = Path(by_name["emri_small.dcm"]).read_bytes()
    for name in ("one", "two", "three"):
        (tmp_path / name).write_bytes(data)
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label,patient\none,x,1\ntwo,y,2\nthree,y,3\n")
    cohort = dicom_folder(str(tmp_path), str(labels))
    check_groups(cohort)
    assert len(cohort) == 30 and cohort.units[12] == "two" and cohort.ids[12] == "two#2"
    np.testing.assert_array_equal(cohort.images[12], dicom.shown(data, 2))
    middle = dicom_folder(str(tmp_path), str(labels), frame="middle", val_fraction=0)
    np.testing.assert_array_equal(middle.images[0], dicom.shown(data, 5))
    labels.write_text("file,label\none,x\nfour,y\n")
    with pytest.raises(InputError, match="no DICOM file 'four'"):
        dicom_folder(str(tmp_path), str(labels))
    labels.write_text("file,label\none,x\ntwo,y\n")
    with pytest.raises(InputError, match="no frame 10"):
        dicom_folder(str(tmp_path), str(labels), frame=10)
