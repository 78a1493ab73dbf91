"""Readers of medical data sets: exact headers, odd rows, splits that part no group."""

import concurrent.futures
import gzip
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from vitjax.data.transforms import RandomResizedCrop
from vitjax.errors import InputError, UnreadableImage
from vitjax.medical.cohort import CohortSource
from vitjax.medical.leakage import check_groups
from vitjax.medical.readers.bccd import bccd
from vitjax.medical.readers.chexpert import chexpert
from vitjax.medical.readers.ham10000 import ham10000
from vitjax.medical.readers.isic2019 import isic2019
from vitjax.medical.readers.medmnist import FLAGS, medmnist
from vitjax.medical.readers.mimic import mimic
from vitjax.medical.readers.nifti import nifti
from vitjax.medical.readers.nih import nih
from vitjax.medical.readers.own import own
from vitjax.medical.readers.pcam import least_crop_area, pcam
from vitjax.medical.readers.splits import carve, folds, held_out
from vitjax.medical.readers.tables import read_table
from vitjax.medical.readers.uncertainty import FINDINGS
from vitjax.medical.readers.wilds import camelyon17

CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,"
    "Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,"
    "Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def picture(value: int = 0, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value % 256, 0, 0)).save(file, "png")
    return file.getvalue()


def place(path, data: bytes | None = None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture() if data is None else data)
    return path


def table(path, header: str, rows, opener=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt") as file:
        file.write("\n".join([header, *rows]) + "\n")
    return str(path)


def same(found, expected):
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.float32(expected))


# CheXpert


def chexpert_row(path, cells=(), view="Frontal", ap="AP", sex="Male", age="60"):
    """Cells by finding: "Edema=-1.0"."""
    given = dict(cell.split("=") for cell in cells)
    return ",".join([path, sex, age, view, ap, *(given.get(name, "") for name in FINDINGS)])


@pytest.fixture
def stanford(tmp_path):
    archive = "CheXpert-v1.0-small"
    rows = [
        chexpert_row(f"{archive}/train/patient{p:05d}/study{s}/view1_frontal.jpg",
                     ["Cardiomegaly=1.0"])
        for p in range(1, 21) for s in (1, 2)
    ]  # fmt: skip
    odd = [
        ("train/patient00021/study1/view1_frontal.jpg", ["Edema=-1.0", "Pneumonia=-1.0"],
         {"sex": "Unknown", "age": "0"}),
        ("train/patient00021/study1/view2_lateral.jpg", ["Edema=-1.0", "Fracture=0.0"],
         {"view": "Lateral", "ap": ""}),
        ("train/patient00022/study1/view1_frontal.jpg", ["Atelectasis=-1.0"], {"ap": "LL"}),
        ("train/patient00022/study1/view2_frontal.jpg", [], {"ap": "RL"}),
    ]  # fmt: skip
    valid = []
    rows += [chexpert_row(f"{archive}/{path}", cells, **more) for path, cells, more in odd]
    for i in range(3):
        cells = [f"{name}={i % 2}.0" for name in FINDINGS]
        valid.append(
            chexpert_row(f"{archive}/valid/patient6454{i}/study1/view1_frontal.jpg", cells)
        )
    for row in rows + valid:
        place(tmp_path / row.partition(",")[0].removeprefix(f"{archive}/"))
    table(tmp_path / "train.csv", CHEXPERT, rows)
    table(tmp_path / "valid.csv", CHEXPERT, valid)
    return tmp_path


def cell(cohort, path, name):
    (findings,) = cohort.labels.values()
    return findings[list(cohort.ids).index(path), FINDINGS.index(name)]


ODD = "train/patient00021/study1/view1_frontal.jpg"


def test_chexpert_reads_its_odd_rows(stanford):
    cohort = chexpert(str(stanford), val_fraction=0.2)
    check_groups(cohort)
    assert len(cohort) == 47 and cohort.label_sets[0].classes == FINDINGS
    row = list(cohort.ids).index(ODD)
    assert cohort.columns["sex"][row] == "" and cohort.columns["age"][row] == 0
    lateral = list(cohort.ids).index(ODD.replace("view1_frontal", "view2_lateral"))
    assert cohort.columns["view"][lateral] == "Lateral" and cohort.columns["ap_pa"][lateral] == ""
    assert cohort.columns["ap_pa"][-5] == "LL" and cohort.columns["ap_pa"][-4] == "RL"
    assert cohort.units[row] == cohort.units[lateral] == "patient00021/study1"
    assert (cohort.aggregate, cohort.group_kind) == ("max", "patient")
    assert any("Age 0" in note for note in cohort.notes)
    assert (cohort.splits[-3:] == "test").all()
    assert len(set(cohort.groups[cohort.splits == "val"])) == round(0.2 * 22)
    assert CohortSource(cohort)[0]["image"][:4] == b"\x89PNG"
    frontal = chexpert(str(stanford), views="frontal")
    assert len(frontal) == 46 and "Lateral" not in frontal.columns["view"]


@pytest.mark.parametrize(
    ("policy", "edema", "pneumonia"),
    [("zeros", 0, 0), ("ones", 1, 1), ("ignore", np.nan, np.nan), ("mixed", 1, 0)],
)
def test_a_policy_says_what_uncertain_cells_become(stanford, policy, edema, pneumonia):
    cohort = chexpert(str(stanford), uncertain=policy, blanks="unknown")
    same([cell(cohort, ODD, "Edema"), cell(cohort, ODD, "Pneumonia")], [edema, pneumonia])
    same(cell(cohort, cohort.ids[0], "Cardiomegaly"), 1)
    same(cell(cohort, cohort.ids[0], "Fracture"), np.nan)
    same(cell(chexpert(str(stanford), policy), cohort.ids[0], "Fracture"), 0)


def test_mixed_policy_takes_ones_of_edema_and_atelectasis_only(stanford):
    cohort = chexpert(str(stanford), uncertain="mixed")
    same(cell(cohort, "train/patient00022/study1/view1_frontal.jpg", "Atelectasis"), 1)


def test_smoothing_depends_on_the_path_alone(stanford):
    first = chexpert(str(stanford), "smooth")
    value = cell(first, ODD, "Edema")
    assert 0.55 <= value < 0.85 and value != cell(first, ODD, "Pneumonia")
    lines = (stanford / "train.csv").read_text().splitlines()
    table(stanford / "train.csv", lines[0], lines[:0:-1])
    again = chexpert(str(stanford), "smooth")
    assert cell(again, ODD, "Edema") == value
    assert cell(chexpert(str(stanford), "smooth", smooth_range=(0.0, 0.3)), ODD, "Edema") < 0.3
    splits = dict(zip(first.ids, first.splits, strict=True))
    assert splits == dict(zip(again.ids, again.splits, strict=True))


def test_multiclass_makes_a_class_of_uncertain(stanford):
    cohort = chexpert(str(stanford), "multiclass")
    assert len(cohort.label_sets) == 14 and cohort.targets.shape == (47, 14)
    row = list(cohort.ids).index(ODD)
    same([cohort.labels["Edema"][row], cohort.labels["Cardiomegaly"][0]], [2, 1])


def test_selftrain_takes_scores_by_name(stanford):
    names = [*FINDINGS[::-1]]
    ids = [ODD, ODD.replace("view1_frontal", "view2_lateral"),
           "train/patient00022/study1/view1_frontal.jpg"]  # fmt: skip
    rows = [",".join([i, *(f"{FINDINGS.index(n) / 20}" for n in names)]) for i in ids]
    scores = table(stanford / "scores.csv", ",".join(["id", *names]), rows)
    cohort = chexpert(str(stanford), "selftrain", scores=scores)
    same(cell(cohort, ODD, "Edema"), FINDINGS.index("Edema") / 20)
    same(cell(cohort, ids[1], "Fracture"), 0)  # which is certain, so its score does not count
    same(cell(cohort, cohort.ids[0], "Cardiomegaly"), 1)
    table(stanford / "scores.csv", ",".join(["id", *names]), rows[1:])
    with pytest.raises(InputError, match="no row for the id 'train/patient00021"):
        chexpert(str(stanford), "selftrain", scores=scores)
    with pytest.raises(InputError, match="needs scores"):
        chexpert(str(stanford), "selftrain")


def test_chexperts_test_set_is_found_by_study(stanford):
    place(stanford / "test/patient64741/study1/view1_frontal.jpg")
    place(stanford / "test/patient64741/study1/view2_lateral.jpg")
    names = ("Study", "Lung Opacity", "Edema", "Cardiomegaly")  # another order, and not all
    truth = table(stanford / "groundtruth.csv", ",".join(names),
                  ["CheXpert-v1.0/test/patient64741/study1,0,1,0"])  # fmt: skip
    cohort = chexpert(str(stanford), test_labels=truth)
    rows = cohort.rows("test")
    assert [cohort.ids[r].rpartition("/")[2] for r in rows] == [
        "view1_frontal.jpg", "view2_lateral.jpg"
    ]  # fmt: skip
    assert all(cell(cohort, cohort.ids[r], "Edema") == 1 for r in rows)
    assert set(cohort.splits[cohort.splits != "test"]) == {"train", "val"}
    assert len(cohort.rows("val")) == 3
    with pytest.raises(InputError, match="another test set"):
        chexpert(str(stanford), test_labels=truth, official_valid="test")


def test_chexperts_mistakes_are_named(stanford):
    lines = (stanford / "train.csv").read_text().splitlines()
    for change, message in (
        (lambda x: [x[0].replace("Pleural Other", "Pleural"), *x[1:]], "'Pleural Other'"),
        (lambda x: [*x[:-1], x[-1].replace("RL", "XX")], "row 44.*'XX'"),
        (lambda x: [*x[:-1], x[-1].replace("RL,", "RL,0.5")],
         r"train.csv.*\n.*row 44: No Finding is '0.5'"),
        (lambda x: [*x, x[1]], "stands in row 1 too"),
        (lambda x: [*x, "CheXpert-v1.0/train/p/s/gone.jpg" + x[1][x[1].index(","):]],
         "no such file"),
        (lambda x: [*x, "too,short"], "2 columns"),
    ):  # fmt: skip
        table(stanford / "train.csv", (new := change(lines))[0], new[1:])
        with pytest.raises(InputError, match=message):
            chexpert(str(stanford))
    with pytest.raises(InputError, match="did you mean 'zeros'"):
        chexpert(str(stanford), "zeroes")


# NIH, MIMIC


@pytest.fixture
def bethesda(tmp_path):
    rows, names = [], []
    for patient in range(1, 13):
        for n in range(2):
            name = f"{patient:08d}_{n:03d}.png"
            text = ("No Finding", "Infiltration|Pleural_Thickening", "Pneumonia")[patient % 3]
            rows.append(f"{name},{text},{n},{patient},058,F,PA,2682,2749,0.143,0.143")
            names.append(name)
            place(tmp_path / f"images_{patient % 2 + 1:03d}" / "images" / name)
    table(tmp_path / "Data_Entry_2017_v2020.csv", NIH, rows)
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[:16]))
    (tmp_path / "test_list.txt").write_text("\n".join(names[16:]))
    return tmp_path


def test_nih_has_eleven_columns_and_exact_findings(bethesda):
    assert "OriginalImage[Width" in read_table(str(bethesda / "Data_Entry_2017_v2020.csv"))
    cohort = nih(str(bethesda), val_fraction=0.25)
    check_groups(cohort)
    names = cohort.label_sets[0].classes
    by_id = dict(zip(cohort.ids, cohort.labels["findings"], strict=True))
    assert [names[i] for i in np.flatnonzero(by_id["00000001_000.png"])] == [
        "Infiltration", "Pleural_Thickening"
    ]  # fmt: skip
    same(by_id["00000003_000.png"].sum(), 0)
    assert [len(cohort.rows(s)) for s in ("train", "val", "test")] == [12, 4, 8]
    assert cohort.images[3] == picture() and cohort.columns["age"][0] == 58


def test_nih_refuses_the_other_spelling(bethesda):
    path = bethesda / "Data_Entry_2017_v2020.csv"
    path.write_text(path.read_text().replace("Infiltration", "Infiltrate"))
    with pytest.raises(InputError, match=r"'Infiltrate' in .* is no finding"):
        nih(str(bethesda))


def test_mimic_joins_labels_of_studies_to_images(tmp_path):
    keys = [("d1", "10000032", "50414267", "train"), ("d2", "10000032", "50414267", "train"),
            ("d3", "10000764", "57375967", "validate"), ("d4", "11000011", "51029426", "test"),
            ("d5", "11000011", "50000000", "test")]  # fmt: skip
    for name, subject, study, _ in keys:
        place(tmp_path / f"files/p{subject[:2]}/p{subject}/s{study}/{name}.jpg")
    stem, packed = tmp_path / "mimic-cxr-2.0.0-", gzip.open
    table(stem.with_name(f"{stem.name}split.csv.gz"), "dicom_id,study_id,subject_id,split",
          [f"{d},{study},{subject},{split}" for d, subject, study, split in keys],
          packed)  # fmt: skip
    table(stem.with_name(f"{stem.name}metadata.csv.gz"),
          "dicom_id,subject_id,study_id,ViewPosition",
          [f"{d},{subject},{study},{'LATERAL' if d == 'd2' else 'PA'}"
           for d, subject, study, _ in keys], gzip.open)  # fmt: skip
    names = sorted(FINDINGS)
    cells = {"Edema": "-1.0", "Pneumonia": "1.0"}
    studies = {k[1:3]: ",".join([*k[1:3], *(cells.get(n, "") for n in names)]) for k in keys[:4]}
    table(stem.with_name(f"{stem.name}chexpert.csv.gz"),
          ",".join(["subject_id", "study_id", *names]), studies.values(), gzip.open)  # fmt: skip
    cohort = mimic(str(tmp_path), blanks="zeros")
    check_groups(cohort)
    assert cohort.splits.tolist() == ["train", "train", "val", "test", "test"]
    assert cohort.units[0] == cohort.units[1] and cohort.columns["view"][1] == "LATERAL"
    same([cell(cohort, "d1", n) for n in ("Edema", "Pneumonia", "Fracture")], [1, 1, 0])
    assert np.isnan(cohort.labels["findings"][4]).all()  # a study without labels
    assert cohort.images[4] == picture()
    assert mimic(str(tmp_path), views="frontal").ids == ["d1", "d3", "d4", "d5"]


# Skin


def isic(root, count=40):
    names = [f"ISIC_{i:07d}{'_downsampled' if i % 4 == 0 else ''}" for i in range(count)]
    hot = ("1.0" if i % 8 == k else "0.0" for i in range(count) for k in range(9))
    truth = [",".join([n, *(next(hot) for _ in range(9))]) for n in names]
    table(
        root / "ISIC_2019_Training_GroundTruth.csv",
        "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK",
        truth,
    )
    lesions = ["" if i < 8 else f"HAM_{i // 16}_{i % 8}" for i in range(count)]
    table(root / "ISIC_2019_Training_Metadata.csv",
          "image,age_approx,anatom_site_general,lesion_id,sex",
          [f"{n},{'' if i else 55.0},anterior torso,{x},{'female' if i else ''}"
           for i, (n, x) in enumerate(zip(names, lesions, strict=True))][::-1])  # fmt: skip
    for name in names:
        place(root / "ISIC_2019_Training_Input" / f"{name}.jpg")


def test_isic_parts_no_lesion_and_joins_by_name(tmp_path):
    isic(tmp_path)
    cohort = isic2019(str(tmp_path), test_fraction=0.25)
    check_groups(cohort)
    same(cohort.labels["diagnosis"], np.arange(40) % 8)
    assert cohort.label_sets[0].classes[8] == "UNK"
    assert cohort.columns["age"][0] == 55 and np.isnan(cohort.columns["age"][1])
    assert cohort.groups[0] == "image:ISIC_0000000" and cohort.groups[24] == "lesion:HAM_1_0"
    assert {len(set(cohort.labels["diagnosis"][cohort.rows(s)])) for s in ("train", "test")} == {8}
    assert "8 of 40" in cohort.notes[0]


def test_isics_test_table_replaces_the_carved_one(tmp_path):
    isic(tmp_path)
    truth = table(tmp_path / "test.csv", "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK",
                  ["ISIC_0035068,0,0,0,0,0,0,0,0,1"])  # fmt: skip
    table(tmp_path / "ISIC_2019_Test_Metadata.csv", "image,age_approx,anatom_site_general,sex",
          ["ISIC_0035068,,,male"])  # fmt: skip
    place(tmp_path / "ISIC_2019_Test_Input" / "ISIC_0035068.jpg")
    cohort = isic2019(str(tmp_path), truth)
    assert cohort.rows("test").tolist() == [40] and cohort.labels["diagnosis"][40] == 8
    assert any("ISIC_0035068" in note for note in cohort.notes)
    table(tmp_path / "test.csv", "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK",
          ["ISIC_0035068,1,0,0,0,0,0,0,0,1"])  # fmt: skip
    with pytest.raises(InputError, match="has 2 classes"):
        isic2019(str(tmp_path), truth)


@pytest.mark.parametrize("extra", ["", ",dataset"])
def test_ham10000_reads_both_folders(tmp_path, extra):
    rows = [f"HAM_{i // 2:07d},ISIC_{i:07d},{('nv', 'mel', 'akiec')[i // 2 % 3]},histo,"
            f"{'' if i else 40.0},{'unknown' if i else 'male'},back{extra and ',vidir_modern'}"
            for i in range(24)]  # fmt: skip
    table(tmp_path / "HAM10000_metadata.csv",
          f"lesion_id,image_id,dx,dx_type,age,sex,localization{extra}", rows)  # fmt: skip
    for i in range(24):
        place(tmp_path / f"HAM10000_images_part_{i % 2 + 1}" / f"ISIC_{i:07d}.jpg", picture(i))
    cohort = ham10000(str(tmp_path))
    check_groups(cohort)
    assert cohort.images[5] == picture(5) and ("centre" in cohort.columns) == bool(extra)
    assert cohort.columns["sex"][:2].tolist() == ["male", ""]
    same(cohort.labels["diagnosis"][[0, 2, 4]], [5, 4, 0])
    assert "ISIC 2019" in cohort.notes[0]


# Histology, cells


def write_pcam(root, slides=True):
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    for split, count in (("train", 6), ("valid", 4), ("test", 5)):
        stem = root / f"camelyonpatch_level_2_split_{split}"
        x = np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros(
            (1, 96, 96, 3), np.uint8
        )
        for key, array in (("x", x), ("y", x[:, :1, :1, :1] % 2)):
            with h5py.File(f"{stem}_{key}.h5", "w") as file:
                file[key] = array
        if slides:
            table(stem.with_name(f"{stem.name}_meta.csv"),
                  ",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi",
                  [f"{i},1,2,True,False,{split}_{i // 2}" for i in range(count)])  # fmt: skip


def test_pcam_is_read_by_many_threads(tmp_path):
    write_pcam(tmp_path)
    cohort = pcam(str(tmp_path))
    check_groups(cohort)
    wanted = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    order = np.random.default_rng(0).integers(15, size=200).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, image in zip(order, pool.map(cohort.images.__getitem__, order), strict=True):
            assert image.shape == (96, 96, 3) and (image == wanted[i]).all()
    same(cohort.labels["tumour"], np.array(wanted) % 2)
    assert [len(cohort.rows(s)) for s in ("train", "val", "test")] == [6, 4, 5]
    assert cohort.group_kind == "slide" and cohort.groups[1] == "train_0"
    assert pcam(str(tmp_path), slides=False).group_kind == "image"


def test_pcams_packed_and_wrong_files_are_named(tmp_path):
    write_pcam(tmp_path, slides=False)
    assert "Slides are not known" in " ".join(pcam(str(tmp_path)).notes)
    path = tmp_path / "camelyonpatch_level_2_split_test_x.h5"
    path.rename(f"{path}.gz")
    with pytest.raises(InputError, match=r"unpack .*test_x.h5.gz first"):
        pcam(str(tmp_path))
    path.write_bytes(b"no such thing")
    with pytest.raises(InputError, match="as HDF5"):
        pcam(str(tmp_path))


def test_only_crops_of_six_tenths_keep_the_centre():
    crop = RandomResizedCrop(32, min_area=least_crop_area())
    rng = np.random.default_rng(0)
    for _ in range(500):  # each holds the central 32 x 32 of 96, up to the rounding of a pixel
        left, top, width, height = crop.region(96, 96, rng)
        assert max(left, top) <= 33 and min(left + width, top + height) >= 63
    assert least_crop_area(1.0) == pytest.approx(4 / 9)
    for area, ratio in ((0.45, 1.0), (0.6, 4 / 3)):  # by hand: the outermost crop of 96 pixels
        shorter = 96 * (area / ratio) ** 0.5
        assert 96 - shorter <= 32 and 96 - 96 * ((area - 0.02) / ratio) ** 0.5 > 32


def test_wilds_centres_override_the_column(tmp_path):
    rows = []
    for i in range(10):
        name = f"patient_{i:03d}_node_1"
        place(tmp_path / "patches" / name / f"patch_{name}_x_3_y_4.png")
        rows.append(f"{i},{i:03d},1,3,4,{i % 2},{i},{i % 5},{int(i == 5)}")
    header = ",patient,node,x_coord,y_coord,tumor,slide,center,split"
    table(tmp_path / "metadata.csv", header, rows)
    cohort = camelyon17(str(tmp_path))
    check_groups(cohort)
    expected = ["train", "val", "test", "train", "train", "", "val", "test", "train", "train"]
    assert cohort.splits.tolist() == expected
    assert (
        cohort.columns["centre"][6] == "centre_1" and cohort.columns["patient"][6] == "patient_006"
    )
    inner = camelyon17(str(tmp_path), in_domain_val=True)
    assert inner.splits[5] == "val" and inner.splits[1] == "" and inner.splits[2] == "test"


def test_blood_cells_of_the_real_archive(test_data, tmp_path):
    path = test_data / "medical" / "bccd_cells.zip"
    cohort = bccd(str(path))
    assert [len(cohort.rows(s)) for s in ("train", "val", "test")] == [205, 87, 72]
    same(cohort.labels["cells"][0], [1, 1, 0])
    assert cohort.images[3][:2] == b"\xff\xd8"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "bccd")
    unpacked = bccd(str(tmp_path / "bccd"))
    np.testing.assert_array_equal(unpacked.labels["cells"], cohort.labels["cells"])
    assert unpacked.images[9] == cohort.images[9]
    (tmp_path / "bccd" / "Annotations" / f"{cohort.ids[0]}.xml").unlink()
    with pytest.raises(InputError, match=f"no Annotations/{cohort.ids[0]}.xml"):
        bccd(str(tmp_path / "bccd"))


# MedMNIST


def test_the_real_sets_of_medmnist(test_data):
    lungs = medmnist(str(test_data / "medical" / "pneumoniamnist.npz"))
    assert [len(lungs.rows(s)) for s in ("train", "val", "test")] == [4708, 524, 624]
    assert lungs.policy == "chest_xray" and lungs.task == "binary-class"
    with np.load(test_data / "medical" / "pneumoniamnist.npz") as file:
        np.testing.assert_array_equal(lungs.images[4708 + 7], file["val_images"][7])
        np.testing.assert_array_equal(lungs.images[4708], file["val_images"][0])
        np.testing.assert_array_equal(lungs.images[4707], file["train_images"][-1])
        same(lungs.labels["class"][-624:], file["test_labels"][:, 0])
    breasts = medmnist(str(test_data / "medical" / "breastmnist.npz"))
    assert breasts.label_sets[0].classes[0] == "malignant"
    assert any("positive class, 1, is the healthy one" in note for note in breasts.notes)


@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_every_set_of_medmnist_is_read(flag, tmp_path):
    kind = FLAGS[flag]
    shape = (28, 28, 28) if kind.is_3d else (28, 28, 3) if kind.channels == 3 else (28, 28)
    columns = 14 if flag == "chestmnist" else 1
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (count, columns)).astype(np.uint8)
    path = tmp_path / f"{flag}_64.npz"
    np.savez(path, **arrays)
    cohort = medmnist(str(path))
    check_groups(cohort)
    assert len(cohort) == 7 * (28 if kind.is_3d else 1) and len(set(cohort.ids)) == len(cohort)
    wanted = {"chestmnist": "multi", "retinamnist": "ordinal"}.get(flag, "single")
    assert cohort.label_sets[0].kind == wanted
    image = cohort.images[len(cohort) - 1]
    assert image.shape == shape[-2:] if kind.channels == 1 else image.shape == shape
    if kind.is_3d:
        middle = medmnist(str(path), slices="middle")
        np.testing.assert_array_equal(middle.images[4], arrays["val_images"][1, 14])
        assert middle.units[4] == "val_1" and (cohort.units == "val_1").sum() == 28
        assert len(medmnist(str(path), slices=4)) == 28 and cohort.aggregate == "mean"
    arrays["val_labels"][:] = 200
    np.savez(path, **arrays)
    with pytest.raises(InputError, match="val_labels hold 200"):
        medmnist(str(path))


def test_medmnist_refuses_what_is_none(tmp_path):
    np.savez(tmp_path / "lungmnist.npz", train_images=np.zeros(3))
    with pytest.raises(InputError, match="no set of MedMNIST is called 'lungmnist'"):
        medmnist(str(tmp_path / "lungmnist.npz"))
    with pytest.raises(InputError, match="no array 'train_labels'"):
        medmnist(str(tmp_path / "lungmnist.npz"), flag="breastmnist")


# A user's own


def own_table(root, header="image,diagnosis,Patient ID,age,site", count=60, suffix=""):
    rows = []
    for i in range(count):
        place(root / f"{i}.png", picture(i))
        rows.append(
            f"{i}.png,{'melanoma' if i // 3 % 3 else 'naevus'},p{i // 3},{i or ''},A{suffix}"
        )
    return table(root / "all.csv", header, rows)


def test_own_finds_columns_by_their_usual_names(tmp_path):
    cohort = own(own_table(tmp_path))
    check_groups(cohort)
    assert cohort.group_kind == "patient" and cohort.label_sets[0].classes == ("melanoma", "naevus")
    assert set(cohort.columns) == {"age", "site"} and np.isnan(cohort.columns["age"][0])
    assert cohort.images[7] == picture(7)
    for split in ("train", "val", "test"):
        assert len(set(cohort.labels["class"][cohort.rows(split)])) == 2


def test_own_carves_only_what_is_missing(tmp_path):
    path = own_table(tmp_path, "path,label,subject,age,split")
    lines = (tmp_path / "all.csv").read_text().replace(",A\n", ",train\n").splitlines()
    lines[1:7] = [line.replace(",train", ",test") for line in lines[1:7]]
    table(tmp_path / "all.csv", lines[0], lines[1:])
    cohort = own(path)
    assert cohort.rows("test").tolist() == list(range(6)) and len(cohort.rows("val"))
    table(tmp_path / "all.csv", lines[0], [line.replace(",test", ",tset") for line in lines[1:]])
    with pytest.raises(InputError, match=r"(?s)6 problems.*'tset'; did you mean 'test'"):
        own(path)


def test_own_reads_several_labels_both_ways(tmp_path):
    own_table(tmp_path, count=12)
    joined = table(tmp_path / "joined.csv", "file,finding",
                   [f"{i}.png,{('', 'a|b', 'b', 'c')[i % 4]}" for i in range(12)])  # fmt: skip
    cohort = own(joined)
    same(cohort.labels["findings"][:4], [[0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]])
    bits = table(tmp_path / "bits.csv", "file,a,b", [f"{i}.png,{i % 2},{'' if i else 1}"
                                                     for i in range(12)])  # fmt: skip
    with pytest.raises(InputError, match=r"no column of labels .*may be \['a', 'b'\]"):
        own(bits)
    same(own(bits, label_columns=("a", "b")).labels["findings"][:2], [[0, 1], [1, np.nan]])


def test_own_reads_folders_with_and_without_splits(tmp_path):
    for i in range(12):
        place(tmp_path / "plain" / "ab"[i % 2] / f"{i}.png", picture(i))
        place(tmp_path / "parted" / ("train", "valid")[i % 2] / "ab"[i // 2 % 2] / f"{i}.png")
    assert own(str(tmp_path / "plain")).label_sets[0].classes == ("a", "b")
    parted = own(str(tmp_path / "parted"), test_fraction=0)
    assert parted.splits.tolist() == ["train"] * 6 + ["val"] * 6
    assert "train/a/0.png" in parted.ids


def test_own_sees_whether_images_are_grey(tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (9, 9, 1), np.uint8)
    for i in range(20):
        folder = tmp_path / "data" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey.repeat(3, 2)).save(folder / f"{i:02}.png")  # RGB, and yet grey
    assert own(str(tmp_path / "data")).channels == 1
    Image.new("RGB", (9, 9), (9, 0, 0)).save(tmp_path / "data" / "a" / "00.png")
    assert own(str(tmp_path / "data")).channels == 3
    assert own(str(tmp_path / "data"), channels=1).channels == 1
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"nothing")
    assert own(str(tmp_path / "data")).channels == 3


def test_owns_mistakes_are_named(tmp_path):
    path = own_table(tmp_path)
    with pytest.raises(InputError, match=r"no column 'grade'; found: image, diagnosis, Patient ID"):
        own(path, label_column="grade")
    with pytest.raises(InputError, match="allowed: naevus, nevus"):
        own(path, class_names=("naevus", "nevus"))
    ordered = own(path, class_names=("naevus", "melanoma"), kind="ordinal")
    same(ordered.labels["class"][:4], [0, 0, 0, 1])
    (tmp_path / "5.png").unlink()
    with pytest.raises(InputError, match=r"no such file: .*5\.png"):
        own(path)


# Splits


@pytest.mark.parametrize("multi", [False, True])
def test_carving_does_not_depend_on_the_order_of_rows(multi):
    rng = np.random.default_rng(0)
    groups = np.array([f"g{i}" for i in rng.integers(0, 300, 2000)])
    kinds = {name: int(rng.choice(4, p=[0.6, 0.3, 0.07, 0.03])) for name in np.unique(groups)}
    labels = np.array([kinds[g] for g in groups.tolist()], np.float32)
    labels = np.eye(4, dtype=np.float32)[labels.astype(int)] if multi else labels
    shares = {"train": 0.6, "val": 0.15, "test": 0.25}
    splits = carve(groups, labels, shares, 3)
    order = rng.permutation(2000)
    np.testing.assert_array_equal(carve(groups[order], labels[order], shares, 3), splits[order])
    assert (carve(groups, labels, shares, 4) != splits).any()
    for split, share in shares.items():
        rows = splits == split
        assert abs(rows.mean() - share) < 0.05
        assert len(np.unique(labels[rows], axis=0)) == 4
    assert all(len(set(splits[groups == g])) == 1 for g in np.unique(groups))
    parts = folds(groups, labels, 5, 0)
    assert np.ptp(np.bincount(parts)) < 100 and len(set(parts[groups == groups[0]])) == 1
    assert all(len(np.unique(labels[parts == k], axis=0)) == 4 for k in range(5))


def test_carving_names_what_cannot_be(tmp_path):
    groups, labels = np.array(["a", "a", "b"]), np.zeros(3, np.float32)
    with pytest.raises(InputError, match="3 splits cannot be made of 2 groups"):
        carve(groups, labels, {"train": 0.6, "val": 0.2, "test": 0.2}, 0)
    with pytest.raises(InputError, match="sum to 1"):
        carve(groups, labels, {"train": 0.6, "test": 0.2}, 0)
    with pytest.raises(InputError, match="k must be 2 to 2"):
        folds(groups, labels, 3, 0)
    assert held_out(groups, 0.01, 0).sum() in (1, 2)


def test_slices_of_a_volume_lie_as_radiologists_see_them(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="needs nibabel")
    values = np.zeros((4, 6, 5), np.int16)
    values[3, 5, 2] = 100  # right, front, in the middle of the height
    for i in range(4):
        axes = np.diag([1.0, 1, 1, 1]) if i else np.diag([-1.0, 1, 1, 1])
        array = values if i else values[::-1]
        nibabel.save(nibabel.Nifti1Image(array, axes), tmp_path / f"{i}.nii.gz")
    labels = table(tmp_path / "labels.csv", "path,label", [f"{i}.nii.gz,{i % 2}" for i in range(4)])
    cohort = nifti(str(tmp_path), labels, window=(50.5, 101))
    check_groups(cohort)
    assert len(cohort) == 20 and cohort.units[6] == "1.nii.gz" and cohort.unit_kind == "volume"
    for row in (2, 7):  # the first file is stored the other way round
        image = cohort.images[row]
        assert image.shape == (6, 4) and image[0, 0] == 255 and image.sum() == 255
    assert nifti(str(tmp_path), labels, "coronal", "middle").images[0].shape == (5, 4)
    (tmp_path / "3.nii.gz").write_bytes(b"no volume")
    with pytest.raises(InputError, match=r"cannot read .*3.nii.gz as NIfTI"):
        nifti(str(tmp_path), labels)
    (tmp_path / "2.nii.gz").unlink()
    with pytest.raises(UnreadableImage, match=r"2\.nii\.gz"):
        cohort.images[12]
