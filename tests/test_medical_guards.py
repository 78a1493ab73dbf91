"""The privacy lint and the guard against leakage."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from vitjax.data.sources.arrays import Arrays
from vitjax.errors import InputError
from vitjax.medical import leakage
from vitjax.medical.cohort import Cohort, LabelSet
from vitjax.medical.leakage import Hashes, check_groups, duplicates, hash_index, overlap
from vitjax.medical.privacy import (
    check_columns,
    check_dicom,
    check_exif,
    hashed,
    lint,
    require_private,
)
from vitjax.medical.readers.medmnist import medmnist


def cohort_of(images, splits=None, groups=None, labels=None, **more) -> Cohort:
    total = len(images)
    splits = ["train"] * total if splits is None else splits
    return Cohort(
        name="made",
        images=images,
        ids=[f"i{n}" for n in range(total)],
        label_sets=(LabelSet("class", "single", ("a", "b")),),
        labels={"class": np.zeros(total, np.float32) if labels is None else labels},
        splits=np.array(splits),
        groups=np.array([f"g{n}" for n in range(total)] if groups is None else groups),
        **more,
    )


def smooth(count, side=64, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (count, side // 8, side // 8))
    return [
        np.asarray(
            Image.fromarray(x.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        )
        for x in noise
    ]


def encoded(array, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


# Leakage


def test_a_group_in_two_splits_is_named():
    splits = ["train", "train", "val", "", "test"]
    images = smooth(5)
    check_groups(cohort_of(images, splits, ["p", "p", "q", "p", "r"]))
    with pytest.raises(InputError, match=r"(?s)1 groups .*image p: 2 in train, 1 in val"):
        check_groups(cohort_of(images, splits, ["p", "p", "p", "s", "r"]))
    units = np.array(["u", "v", "v", "w", "x"])
    with pytest.raises(InputError, match="study v: 1 in train, 1 in val"):
        check_groups(cohort_of(images, splits, units=units, unit_kind="study"))
    many = cohort_of([images[0]] * 60, ["train", "test"] * 30, [f"p{i // 2}" for i in range(60)])
    with pytest.raises(InputError, match=r"(?s)30 groups .* and 10 more"):
        check_groups(many)


def test_the_known_duplicates_of_medmnist_are_found(test_data):
    """Eight groups of PneumoniaMNIST are in train and val, one of BreastMNIST in train and test."""
    lungs = duplicates(medmnist(str(test_data / "medical" / "pneumoniamnist.npz")))
    assert lungs.counts()["exact"] == {"train": 16, "train/val": 8, "test": 3}
    assert lungs.across().counts() == {"exact": {"train/val": 8}, "near": {}}
    assert all(same.agree for same in lungs.exact) and lungs.looked_at == 5856
    breasts = duplicates(medmnist(str(test_data / "medical" / "breastmnist.npz")))
    assert breasts.counts()["exact"] == {"train/test": 1}
    assert breasts.exact[0].ids == ("train_115", "test_76") and not breasts.exact[0].agree
    assert sum(breasts.across().counts()["near"].values()) > 40  # frames of one examination


def test_near_duplicates_are_those_that_look_the_same():
    pictures = smooth(40)
    changed = [
        encoded(pictures[0], quality=60),
        np.asarray(Image.fromarray(pictures[1]).resize((40, 40), Image.Resampling.BICUBIC)),
        (pictures[2] * 0.8 + 20).astype(np.uint8),
        pictures[3].copy(),
        255 - pictures[4],
        pictures[5][::-1].copy(),
    ]
    flat = [np.full((8, 8), 3, np.uint8), np.full((9, 9), 3, np.uint8)]
    splits = ["train"] * 40 + ["test"] * 6 + ["train", "test"]
    cohort = cohort_of([*pictures, *changed, *flat], splits)
    found = duplicates(cohort)
    assert [pair.ids for pair in sorted(found.near, key=lambda x: x.ids)] == [
        ("i0", "i40"), ("i1", "i41"), ("i2", "i42")
    ]  # fmt: skip
    assert [same.ids for same in found.exact] == [("i3", "i43")]
    assert found.across() == found and found.counts()["near"] == {"train/test": 3}
    assert not duplicates(cohort, rows=np.arange(40)).exact
    one_group = dataclasses.replace(cohort, groups=np.full(48, "p"))
    assert not duplicates(one_group).near


def test_what_is_the_same_as_grey_and_as_colour_is_found():
    grey = smooth(3)
    colour = [np.stack([x] * 3, -1) for x in grey]
    found = duplicates(cohort_of([grey[0], colour[0], encoded(grey[0], "PNG"), b"no image"]))
    assert found.exact[0].ids == ("i0", "i1", "i2") and found.unreadable == ("i3",)
    other = grey[0].copy()
    other[-1, -1] ^= 1
    assert not duplicates(cohort_of([grey[0], other])).exact


@pytest.mark.parametrize("within", [True, False])
def test_the_look_up_misses_no_pair_within_its_limit(within, monkeypatch):
    """Against every pair; flips of 0 to 20 bits anywhere."""
    monkeypatch.setattr(leakage, "CHUNK", 64)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (100, 256), dtype=np.uint8)
    for row in range(1, 100, 2):
        bits[row] = bits[row - 1]
        bits[row, rng.choice(256, rng.integers(0, 21), replace=False)] ^= 1
    packed = np.packbits(bits, axis=1).view(np.uint64)
    ours, theirs = (packed, None) if within else (packed[::2], packed[1::2])
    others = packed if theirs is None else theirs
    apart = np.bitwise_count(ours[:, None] ^ others[None]).sum(-1)
    wanted = np.argwhere((np.triu(apart + 1, 1) if within else apart + 1) - 1 <= leakage.LIMIT)
    wanted = wanted[wanted[:, 0] < wanted[:, 1]] if within else wanted
    found = np.stack(leakage._close(ours, theirs), 1)
    assert 15 < len(found) < 40
    np.testing.assert_array_equal(found, wanted)


def test_an_index_finds_what_pretraining_has_seen(tmp_path):
    pictures = smooth(30)
    source = Arrays(np.stack(pictures[:20]), np.zeros(20, np.int64), name="web")
    path = str(tmp_path / "index" / "web.npz")
    hash_index(source, path)
    assert len(Hashes.load(path).ids) == 20
    cohort = cohort_of(
        [pictures[3], encoded(pictures[4], quality=70), *pictures[20:30]],
        ["test", "val"] + ["train"] * 10,
    )
    found = overlap(cohort, path)
    assert found.exact == (("i0", "web[3]"),) and found.near == (("i1", "web[4]"),)
    assert found.splits == {"test": 1, "val": 1} and (found.looked_at, found.others) == (12, 20)
    seen, other = (cohort_of([np.full((side, side), 3, np.uint8)]) for side in (8, 9))
    assert not overlap(other, hash_index(seen)).near
    with np.load(path) as file:  # no pixels, so that it may be kept
        assert sum(file[key].nbytes for key in file.files if key != "ids") < 20 * 64
    (tmp_path / "other.npz").write_bytes(b"none")
    with pytest.raises(InputError, match="as an index of hashes"):
        overlap(cohort, str(tmp_path / "other.npz"))


# Privacy


def dataset(**tags):
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom")
    data = pydicom.Dataset()
    for key, value in tags.items():
        setattr(data, key, value)
    return data


@pytest.mark.parametrize(("tag", "value"), [
    ("PatientName", "Doe^Jane"), ("PatientID", "123"), ("PatientBirthDate", "19700101"),
    ("PatientAddress", "Main St"), ("InstitutionName", "St. Mary"), ("AccessionNumber", "1"),
    ("ReferringPhysicianName", "Who"), ("PerformingPhysicianName", "Who"),
    ("OtherPatientIDs", "77"), ("ImageComments", "seen with Dr. Who"),
])  # fmt: skip
def test_a_tag_that_is_filled_in_is_found(tag, value):
    assert [f.name for f in check_dicom(dataset(**{tag: value}))] == [tag]
    assert value not in check_dicom(dataset(**{tag: value}))[0].text
    assert not check_dicom(dataset(**{tag: ""})) and not check_dicom(dataset(PatientSex="F"))


def test_private_tags_and_burned_in_text():
    data = dataset()
    data.private_block(0x0011, "Maker", create=True).add_new(1, "LO", "x")
    assert [f.name for f in check_dicom(data)] == ["private tags"]
    data.PatientIdentityRemoved = "YES"
    assert not check_dicom(data)
    assert check_dicom(dataset(BurnedInAnnotation="YES"))[0].is_problem
    ultrasound = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"}
    (finding,) = check_dicom(dataset(**ultrasound))
    assert finding.name == "BurnedInAnnotation" and not finding.is_problem
    assert not check_dicom(dataset(BurnedInAnnotation="NO", **ultrasound))
    assert not check_dicom(dataset(SOPClassUID="1.2.840.10008.5.1.4.1.1.2"))


def test_columns_by_their_names_and_cells():
    bad = ("name", "Patient Name", "PatientName", "MRN", "dob", "date_of_birth", "SSN",
           "home address", "phone", "E_mail", "patient_birth_date", "last_name")  # fmt: skip
    found = check_columns(bad, [])
    assert [f.name for f in found] == [f"column {name}" for name in bad]
    good = ("image_name", "file name", "class_name", "age", "sex", "Patient ID", "Follow-up #",
            "Finding Labels", "anatom_site_general", "subject_id", "ViewPosition")  # fmt: skip
    rows = [[f"ISIC_{i}", "a.png", "x", "50", "F", "1", "0", "Mass|Nodule", "anterior torso", "1",
             "CHEST (PA AND LAT) OF A PATIENT"] for i in range(30)]  # fmt: skip
    assert not check_columns(good, rows)
    cells = [["j@doe.org", "123-45-6789", f"Patient {i} was seen on Monday with cough", "1"]
             for i in range(9)]  # fmt: skip
    texts = [f.text for f in check_columns(("a", "b", "c", "d"), cells)]
    assert ["e-mail" in texts[0], "social" in texts[1], "free text" in texts[2]] == [True] * 3
    assert len(texts) == 3


def test_places_in_pictures_are_found(tmp_path):
    image, exif = Image.new("RGB", (4, 4)), Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    exif[0x013B] = "Somebody"
    image.save(tmp_path / "gps.jpg", exif=exif)
    image.save(tmp_path / "plain.jpg")
    found = check_exif((tmp_path / "gps.jpg").read_bytes())
    assert [(f.name, f.is_problem) for f in found] == [("GPS", True), ("Artist", False)]
    assert not check_exif((tmp_path / "plain.jpg").read_bytes()) and not check_exif(b"none")
    paths = [str(tmp_path / "plain.jpg"), str(tmp_path / "gps.jpg")]
    findings = lint(paths)
    assert findings.looked_at == 2 and "gps.jpg" in findings.problems[0]
    assert not lint(paths, allow=["GPS"]).problems


def test_a_run_is_stopped_and_told_how_to_go_on(tmp_path):
    pytest.importorskip("pydicom", reason="needs pydicom")
    from pydicom.data import get_testdata_file

    data = open(get_testdata_file("CT_small.dcm"), "rb").read()  # noqa: SIM115
    cohort = cohort_of([data, data, smooth(1)[0]])
    with pytest.raises(InputError, match=r"(?s)PatientName: .*2 of 3 .*lint, not a de-identifier"):
        require_private(cohort)
    allow = ["PatientName", "PatientID", "private tags", "InstitutionName", "InstitutionAddress",
             "ReferringPhysicianName", "OtherPatientIDsSequence", "AccessionNumber",
             "OperatorsName", "OtherPatientIDs"]  # fmt: skip
    left = lint(cohort, allow).problems
    assert len(left) < len(lint(cohort).problems)
    assert not any(problem.partition(":")[0] in allow for problem in left)
    with pytest.raises(InputError, match="allow names 'PatientNam'"):
        lint(cohort, allow=["PatientNam"])
    named = cohort_of(smooth(2), columns={"patient_name": np.array(["x", "y"])})
    with pytest.raises(InputError, match="column patient_name"):
        require_private(named)
    table = tmp_path / "t.csv"
    table.write_text("path,phone\na.png,1\n")
    with pytest.raises(InputError, match="column phone"):
        require_private(cohort_of(smooth(2), files=(str(table),)))
    assert not require_private(cohort_of(smooth(2))).problems


def test_a_hash_is_short_and_salted():
    assert hashed("P1", "a") == hashed("P1", "a") != hashed("P1", "b")
    assert len(hashed("P1", "a")) == 12 and hashed("P1", "a") != hashed("P2", "a")
