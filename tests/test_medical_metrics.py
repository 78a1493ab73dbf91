"""Metrics of medical benchmarks: against scikit-learn, official semantics, and by hand."""

import csv

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as reference

from vitjax.errors import InputError
from vitjax.medical.metrics import (
    calibration,
    camelyon,
    chexpert,
    counts,
    isic,
    medmnist,
    ranking,
)

EXACT = {"rtol": 0, "atol": 1e-12}


def close(found, expected):
    np.testing.assert_allclose(found, expected, **EXACT)


def make_cases(seed=0, n=400, ties=True):
    """Labels, scores that rank them somewhat (with ties), and weights of which some are 0."""
    key = np.random.default_rng(seed)
    labels = (key.random(n) < 0.3).astype(float)
    scores = key.normal(size=n) + labels
    weights = key.integers(0, 4, n) * key.random(n)
    return labels, np.round(scores, 1) if ties else scores, weights


@pytest.mark.parametrize("seed", range(3))
def test_ranking_equals_scikit_learn(seed):
    labels, scores, weights = make_cases(seed)
    for w in (None, weights):
        close(
            ranking.auroc(labels, scores, w),
            reference.roc_auc_score(labels, scores, sample_weight=w),
        )
        expected = reference.average_precision_score(labels, scores, sample_weight=w)
        close(ranking.average_precision(labels, scores, w), expected)
    expected = reference.roc_curve(labels, scores, drop_intermediate=False)
    for found, wanted in zip(ranking.roc_curve(labels, scores), expected, strict=True):
        close(found, wanted)
    expected = reference.precision_recall_curve(labels, scores)
    for found, wanted in zip(ranking.precision_recall_curve(labels, scores), expected, strict=True):
        close(found, wanted)


def test_ties_count_half():
    assert ranking.auroc([0, 1, 0, 1], [1, 1, 1, 1]) == 0.5
    assert ranking.auroc([0, 1, 1], [0, 0, 1]) == 0.75


def test_unknown_labels_are_left_out_for_their_label_only():
    key = np.random.default_rng(1)
    labels = (key.random((200, 3)) < 0.4).astype(float)
    scores = key.normal(size=(200, 3)) + labels
    labels[key.random((200, 3)) < 0.3] = np.nan
    expected = [
        reference.roc_auc_score(y[~np.isnan(y)], s[~np.isnan(y)])
        for y, s in zip(labels.T, scores.T, strict=True)
    ]
    close(ranking.auroc_per_label(labels, scores), expected)
    close(ranking.macro_auroc(labels, scores), np.mean(expected))
    labels[:, 1] = np.nan
    close(ranking.macro_auroc(labels, scores), np.mean([expected[0], expected[2]]))
    # The score of an unknown case is not looked at.
    scores[np.isnan(labels)] = np.nan
    close(ranking.macro_auroc(labels, scores), np.mean([expected[0], expected[2]]))


def test_one_class_is_undefined_and_no_error():
    ones, scores = np.ones(4), np.arange(4.0)
    assert np.isnan(ranking.auroc(ones, scores)) and np.isnan(ranking.auroc(1 - ones, scores))
    assert np.isnan(ranking.average_precision(1 - ones, scores))
    assert np.isnan(ranking.auroc([], []))
    assert np.isnan(ranking.macro_auroc(np.ones((4, 2)), np.zeros((4, 2))))
    fpr, tpr, _ = ranking.roc_curve(ones, scores)
    assert np.isnan(fpr).all() and tpr[-1] == 1
    assert np.isnan(counts.choose_threshold(ones, scores, "youden").value)
    rates = counts.rates_at(ones, scores, 2)
    assert np.isnan(rates["specificity"]) and rates["sensitivity"] == 0.5
    assert np.isnan(counts.rates_at([0, 1], [0, 1], float("nan"))["fpr"])


def test_one_versus_rest_equals_scikit_learn():
    key = np.random.default_rng(2)
    classes, p = key.integers(0, 4, 300), special.softmax(key.normal(size=(300, 4)), 1)
    found = ranking.one_vs_rest_auroc(classes, p)
    close(found.mean(), reference.roc_auc_score(classes, p, multi_class="ovr"))
    close(found[2], reference.roc_auc_score(classes == 2, p[:, 2]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ranking.auroc([0, 1], [0, 1, 2]), r"labels \(2,\).*scores \(3,\)"),
        (lambda: ranking.auroc([0, 2], [0, 1]), r"0, 1 or NaN.*2\.0"),
        (lambda: ranking.auroc([0, 1], [0, np.nan]), r"NaN in rows \(from 0\) 1"),
        (lambda: ranking.auroc([0, 1], [0, 1], [1, -1]), r"weights.*rows \(from 0\) 1"),
        (lambda: ranking.auroc([[0, 1]], [0, 1]), r"labels must have 1 dimension.*\(1, 2\)"),
        (lambda: ranking.auroc([0, 1], ["a", "b"]), "scores must be numbers"),
        (lambda: ranking.one_vs_rest_auroc([0, 3], np.eye(2)), "from 0 to 1, got 3"),
        (lambda: counts.accuracy([0, 1], [0, 1, 2]), r"classes \(2,\).*predicted \(3,\)"),
        (lambda: counts.choose_threshold([0, 1], [0, 1], "best"), "'best'.*youden"),
        (lambda: counts.choose_threshold([0, 1], [0, 1], ("specificity", 90)), "90"),
        (lambda: counts.cohen_kappa([0], [0], 2, "cubic"), "cubic"),
        (lambda: calibration.brier([1.5], [1]), "0 to 1, got 1.5"),
        (lambda: calibration.fit_temperature([[1.0]], [0], "softmacks"), "'softmax'"),
        (lambda: calibration.apply_temperature([1.0], 0.0), "positive, got 0.0"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_counts_equal_scikit_learn():
    key = np.random.default_rng(3)
    a, b = key.integers(0, 5, 200), key.integers(0, 5, 200)
    b = np.where(key.random(200) < 0.5, a, b)
    weights = key.random(200)
    close(counts.accuracy(a, b, weights), reference.accuracy_score(a, b, sample_weight=weights))
    close(counts.balanced_accuracy(a, b), reference.balanced_accuracy_score(a, b))
    expected = reference.balanced_accuracy_score(a, b, sample_weight=weights)
    close(counts.balanced_accuracy(a, b, weights), expected)
    close(counts.confusion(a, b, 5), reference.confusion_matrix(a, b))
    close(counts.f1(a, b, 5), [reference.f1_score(a == c, b == c) for c in range(5)])
    close(counts.f1(a, b, 6, "macro"), reference.f1_score(a, b, average="macro"))
    assert np.isnan(counts.f1(a, b, 6)[5])
    for kind in (None, "linear", "quadratic"):
        close(counts.cohen_kappa(a, b, 5, kind), reference.cohen_kappa_score(a, b, weights=kind))
    assert np.isnan(counts.cohen_kappa([1, 1], [1, 1], 3))


def test_balanced_accuracy_is_over_classes_that_occur():
    assert counts.balanced_accuracy([0, 0, 2], [0, 1, 2]) == 0.75


def test_thresholds_reach_their_target_and_no_more():
    labels, scores, _ = make_cases(4, ties=False)
    for rule in (("specificity", 0.9), ("sensitivity", 0.9)):
        chosen = counts.choose_threshold(labels, scores, rule)
        rates = counts.rates_at(labels, scores, chosen.value)
        assert rates[rule[0]] >= 0.9
        assert rates["sensitivity"] == chosen.sensitivity
        assert rates["specificity"] == pytest.approx(chosen.specificity)
        # The next threshold, in the direction that helps the other rate, fails.
        next_score = (
            scores[scores < chosen.value].max()
            if rule[0] == "specificity"
            else scores[scores > chosen.value].min()
        )
        beyond = counts.rates_at(labels, scores, next_score)
        assert beyond[rule[0]] < 0.9 or beyond == rates
    fpr, tpr, _ = reference.roc_curve(labels, scores)
    youden = counts.choose_threshold(labels, scores, "youden")
    assert youden.sensitivity + youden.specificity - 1 == pytest.approx((tpr - fpr).max())
    never = counts.choose_threshold([1, 0], [0, 1], ("specificity", 1.0))
    assert 1 < never.value < 1.001 and never.sensitivity == 0


def test_rates_by_hand():
    rates = counts.rates_at([1, 1, 1, 1, 0, 0, 0, np.nan], [3, 2, 1, 1, 2, 1, 1, 9], 2)
    expected = {"sensitivity": 2 / 4, "specificity": 2 / 3, "ppv": 2 / 3, "npv": 2 / 4}
    expected |= {"fpr": 1 / 3, "fnr": 2 / 4, "n": 7, "positives": 4}
    assert rates == pytest.approx(expected)


# MedMNIST


def official(task, labels, scores):
    """medmnist 3.0.2, evaluator.py, in scikit-learn's terms."""
    labels, scores = labels.squeeze(), scores.squeeze()
    if task == "multi-label, binary-class":
        auc = np.mean([reference.roc_auc_score(*p) for p in zip(labels.T, scores.T, strict=True)])
        found = [
            reference.accuracy_score(y, s > 0.5) for y, s in zip(labels.T, scores.T, strict=True)
        ]
        return auc, np.mean(found)
    if task == "binary-class":
        last = scores[:, -1] if scores.ndim == 2 else scores
        return reference.roc_auc_score(labels, last), reference.accuracy_score(labels, last > 0.5)
    each = [reference.roc_auc_score(labels == c, scores[:, c]) for c in range(scores.shape[1])]
    return np.mean(each), reference.accuracy_score(labels, scores.argmax(-1))


@pytest.mark.parametrize(
    "task, label_shape, num_values, score_shape",
    [
        ("multi-class", (500, 1), 7, (500, 7)),
        ("ordinal-regression", (500, 1), 5, (500, 5)),
        ("binary-class", (500, 1), 2, (500, 2)),
        ("binary-class", (500, 1), 2, (500, 1)),
        ("binary-class", (500,), 2, (500,)),
        ("multi-label, binary-class", (500, 14), 2, (500, 14)),
    ],
)
def test_medmnist_parity(task, label_shape, num_values, score_shape):
    key = np.random.default_rng(5)
    labels = key.integers(0, num_values, label_shape).astype(np.uint8)
    scores = np.round(key.random(score_shape), 2).astype(np.float32)  # ties, and 0.5 itself
    assert (scores == 0.5).any()
    found = medmnist.evaluate(task, labels, scores)
    close([found["auc"], found["acc"]], official(task, labels, scores))


def test_medmnist_counts_half_as_negative():
    labels = np.array([[0], [1], [1]])
    assert medmnist.evaluate("binary-class", labels, np.array([0.5, 0.5, 0.6]))["acc"] == 2 / 3
    both, p = np.array([[0, 1], [1, 0]]), np.array([[0.5, 0.5], [0.6, 0.1]])
    assert medmnist.evaluate("multi-label, binary-class", both, p)["acc"] == 0.75


def test_medmnist_result_files(tmp_path):
    key = np.random.default_rng(6)
    labels, p = key.integers(0, 3, (20, 1)), special.softmax(key.normal(size=(20, 3)), 1)
    path = medmnist.write_results(tmp_path, "octmnist", 64, "test", "multi-class", labels, p, 3)
    found = medmnist.evaluate("multi-class", labels, p)
    assert path.name == f"octmnist_64_test_[AUC]{found['auc']:.3f}_[ACC]{found['acc']:.3f}@3.csv"
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert [row[0] for row in rows] == [str(i) for i in range(20)]
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], float), p)
    name = medmnist.result_file_name("octmnist", 28, "val", 0.6724, 0.8916, "a")
    assert name == "octmnist_val_[AUC]0.672_[ACC]0.892@a.csv"


def test_medmnist_refuses():
    with pytest.raises(InputError, match="did you mean 'multi-class'"):
        medmnist.evaluate("multiclass", [0], [[1.0]])
    with pytest.raises(InputError, match=r"labels \(3, 2\), scores \(3, 3\)"):
        medmnist.evaluate("multi-label, binary-class", np.zeros((3, 2)), np.zeros((3, 3)))
    with pytest.raises(InputError, match="did you mean 'val'"):
        medmnist.result_file_name("octmnist", 28, "valid", 0.5, 0.5, 1)


# ISIC 2019

CATEGORIES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def isic_files(tmp_path, predictions, classes, names=None, columns=CATEGORIES, suffix=""):
    names = names or [f"ISIC_{i:07d}" for i in range(len(classes))]
    truth = [[name, *np.eye(9)[c].tolist()] for name, c in zip(names, classes, strict=True)]
    given = [[name + suffix, *row] for name, row in zip(names, predictions, strict=True)]
    return (
        write_csv(tmp_path / "truth.csv", ["image", *CATEGORIES], truth),
        write_csv(tmp_path / "given.csv", ["image", *columns], given),
    )


def test_isic_equals_balanced_accuracy_whatever_the_order(tmp_path):
    key = np.random.default_rng(7)
    classes, p = key.permutation(np.arange(180) % 9), key.random((180, 9))
    found = isic.score(*isic_files(tmp_path, p.tolist(), classes, suffix=".jpg"))
    close(found["balanced_accuracy"], reference.balanced_accuracy_score(classes, p.argmax(1)))
    assert found["validation"] == found["balanced_accuracy"]
    expected = [reference.roc_auc_score(classes == c, p[:, c]) for c in range(9)]
    close([found["per_category"][name]["auc"] for name in CATEGORIES], expected)
    close(found["macro_auc"], np.mean(expected))
    # Columns and rows in another order say the same.
    truth, given = tmp_path / "truth.csv", tmp_path / "given.csv"
    header, *rows = read_csv(given)
    order = [0, *(key.permutation(9) + 1)]
    shuffled = [[row[i] for i in order] for row in key.permutation(np.array(rows)).tolist()]
    write_csv(given, [header[i] for i in order], shuffled)
    assert isic.score(truth, given) == found


def test_isic_ties_are_wrong():
    truth = np.eye(3)
    tied = np.array([[0.5, 0.5, 0.1], [0.2, 0.9, 0.1], [0.1, 0.2, 0.3]])
    found = isic.score_arrays(truth, tied, ("a", "b", "c"))
    assert found["balanced_accuracy"] == pytest.approx(2 / 3) and found["num_undecided"] == 1
    tied[0, 1] = 0.4
    assert isic.score_arrays(truth, tied, ("a", "b", "c"))["balanced_accuracy"] == 1


def test_isic_never_predicting_unk_is_capped():
    truth = np.eye(9)[np.arange(18) % 9]
    given = truth * 0.9
    given[:, 8] = 0
    given[truth[:, 8] == 1, 0] = 1.0
    found = isic.score_arrays(truth, given, CATEGORIES)
    assert found["balanced_accuracy"] == pytest.approx(8 / 9)
    # Without UNK in the truth there is no such cap.
    kept = truth[:, 8] == 0
    assert isic.score_arrays(truth[kept], given[kept], CATEGORIES)["balanced_accuracy"] == 1


def test_isic_weights(tmp_path):
    truth, given = np.eye(2)[[0, 0, 1, 1]], np.eye(2)[[0, 1, 1, 1]]
    names = ["ISIC_1", "ISIC_0035068", "ISIC_3", "ISIC_4"]
    assert isic.score_arrays(truth, given, ("a", "b"))["balanced_accuracy"] == 0.75
    assert isic.score_arrays(truth, given, ("a", "b"), images=names)["balanced_accuracy"] == 1
    rows = [[n, *t.tolist(), w, 1 - w] for n, t, w in zip("wxyz", truth, (1, 0, 1, 0), strict=True)]
    header = ["image", "a", "b", "score_weight", "validation_weight"]
    found = isic.score(
        write_csv(tmp_path / "t.csv", header, rows),
        write_csv(tmp_path / "g.csv", ["image", "b", "a"],
                  [[n, b, a] for n, (a, b) in zip("zyxw", given.tolist()[::-1], strict=True)]),
    )  # fmt: skip
    assert found["balanced_accuracy"] == 1 and found["validation"] == 0.5
    assert found["per_category"]["a"]["weight"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.pop(), "images are missing: ISIC_0000001"),
        (lambda rows: rows.append(["extra", *rows[1][1:]]), "not in the truth: extra"),
        (lambda rows: rows.append(rows[1]), "images occur twice: ISIC_0000000"),
        (lambda rows: rows[0].__setitem__(1, "MELANOMA"), "columns are missing: MEL"),
        (lambda rows: [row.append("0.5") for row in rows[1:]] and rows[0].append("AGE"), "AGE"),
        (lambda rows: rows[1].__setitem__(2, "much"), "ISIC_0000000, column NV: 'much'"),
        (lambda rows: rows[1].__setitem__(2, ""), "ISIC_0000000, column NV"),
        (lambda rows: rows[1].__setitem__(2, "nan"), "column NV: the value is missing"),
        (lambda rows: rows[2].__setitem__(9, "1.01"), "ISIC_0000001, column UNK: 1.01 is outside"),
        (lambda rows: rows[2].pop(), "row 3 has 9 cells, not 10"),
        (lambda rows: rows[0].__setitem__(0, "id"), "'image' is missing"),
        (lambda rows: [row.__setitem__(4, "0") for row in rows[1:]], "AK holds integers only"),
    ],
)
def test_isic_errors_name_what_is_wrong(tmp_path, change, message):
    truth, given = isic_files(tmp_path, np.full((2, 9), 0.25).tolist(), [0, 1])
    rows = read_csv(given)
    change(rows)
    write_csv(given, rows[0], rows[1:])
    with pytest.raises(InputError, match=message):
        isic.score(truth, given)


# CheXpert


def test_chexpert_studies():
    expected = "patient64741/study1"
    for path in (
        "CheXpert-v1.0-small/train/patient64741/study1/view1_frontal.jpg",
        "CheXpert/test/patient64741/study1/view2_lateral.jpg",
        "CheXpert-v1.0 batch 2 (train 1)/patient64741/study1/view1_frontal.jpg",
        "CheXpert-v1.0/test/patient64741/study1",
        "patient64741/study1",
    ):
        assert chexpert.study_of(path) == expected
    assert chexpert.study_of("valid/patient1/study12/view1.jpg") == "patient1/study12"
    with pytest.raises(InputError, match="patientNNNNN/studyN"):
        chexpert.study_of("test/patient64741/view1_frontal.jpg")
    assert set(chexpert.FIVE) <= set(chexpert.LABELS) and len(chexpert.LABELS) == 14


def test_chexpert_aggregates_views():
    keys = np.array(["b", "a", "b", "c", "a", "b"])
    scores = np.array([1.0, 5, 3, 7, 2, 2])
    unique, found = chexpert.aggregate(keys, scores)
    assert unique.tolist() == ["a", "b", "c"] and found.tolist() == [5, 3, 7]
    assert chexpert.aggregate(keys, scores, "mean")[1].tolist() == [3.5, 2, 7]
    both = chexpert.aggregate(keys, np.stack([scores, -scores], 1))[1]
    assert both.tolist() == [[5, -2], [3, -1], [7, -7]]
    means = chexpert.aggregate(keys, np.stack([scores, -scores], 1), "mean")[1]
    assert means.tolist() == [[3.5, -3.5], [2, -2], [7, -7]]
    with pytest.raises(InputError, match="did you mean 'mean'"):
        chexpert.aggregate(keys, scores, "men")
    with pytest.raises(InputError, match=r"keys \(6,\), scores \(5,\)"):
        chexpert.aggregate(keys, scores[:5])


def chexpert_tables(n=60):
    key = np.random.default_rng(8)
    labels = {name: (key.random(n) < 0.4).astype(float) for name in chexpert.LABELS}
    scores = {name: key.normal(size=n) + labels[name] for name in chexpert.FIVE}
    return labels, scores


def test_chexpert_columns_are_found_by_name():
    labels, scores = chexpert_tables()
    found = chexpert.five_label_auroc(labels, scores)
    expected = {n: reference.roc_auc_score(labels[n], scores[n]) for n in chexpert.FIVE}
    assert found == pytest.approx(expected | {"mean": np.mean(list(expected.values()))}, abs=1e-12)
    order = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
    assert chexpert.five_label_auroc(labels, {name: scores[name] for name in order}) == found
    assert chexpert.five_label_auroc(dict(reversed(labels.items())), scores) == found
    with pytest.raises(InputError, match="'Edema'"):
        chexpert.five_label_auroc(labels, {n: s for n, s in scores.items() if n != "Edema"})
    labels["Edema"][:] = 0
    assert np.isnan(chexpert.five_label_auroc(labels, scores)["mean"])


def test_chexpert_rows_are_matched_by_study():
    labels, scores = chexpert_tables()
    found = chexpert.five_label_auroc(labels, scores)
    studies = np.array([f"test/patient{i:05d}/study1" for i in range(60)])
    order = np.random.default_rng(9).permutation(60)
    shuffled = {n: s[order] for n, s in scores.items()}
    assert chexpert.five_label_auroc(labels, shuffled) != found
    labels["Study"], shuffled["Study"] = studies, studies[order]
    assert chexpert.five_label_auroc(labels, shuffled) == found
    shuffled["Study"] = np.where(studies[order] == studies[3], "patient9/study9", studies[order])
    with pytest.raises(InputError, match="patient00003/study1, patient9/study9"):
        chexpert.five_label_auroc(labels, shuffled)


# CAMELYON


@pytest.mark.parametrize(
    "nodes, stage",
    [
        ("negative negative negative negative negative", "pN0"),
        ("itc negative negative negative negative", "pN0(i+)"),
        ("itc itc itc itc itc", "pN0(i+)"),
        ("micro negative negative negative negative", "pN1mi"),
        ("micro micro micro micro micro", "pN1mi"),
        ("micro itc itc itc itc", "pN1mi"),
        ("macro negative negative negative negative", "pN1"),
        ("macro itc itc itc itc", "pN1"),
        ("macro micro micro negative negative", "pN1"),
        ("macro macro macro itc itc", "pN1"),
        ("macro micro micro micro negative", "pN2"),
        ("macro micro micro micro itc", "pN2"),
        ("negative macro macro macro macro", "pN2"),
        ("macro macro macro macro macro", "pN2"),
    ],
)
def test_stages(nodes, stage):
    nodes = nodes.split()
    assert camelyon.patient_stage(nodes) == camelyon.patient_stage(nodes[::-1]) == stage


def test_stages_need_five_known_nodes():
    with pytest.raises(InputError, match="5 nodes, got 4"):
        camelyon.patient_stage(["itc"] * 4)
    with pytest.raises(InputError, match="did you mean 'macro'"):
        camelyon.patient_stage(["marco"] * 5)


def test_stage_kappa_equals_scikit_learn():
    key = np.random.default_rng(10)
    a = key.integers(0, 5, 100)
    b = np.clip(a + key.integers(-1, 2, 100), 0, 4)
    names = np.array(camelyon.STAGES)
    expected = reference.cohen_kappa_score(a, b, weights="quadratic")
    true, predicted = names[a].tolist(), names[b].tolist()
    close(camelyon.stage_kappa(true, predicted), expected)
    patients = [f"patient_{i:03d}" for i in range(100)]
    by_name = dict(zip(patients, true, strict=True))
    shuffled = dict(list(zip(patients, predicted, strict=True))[::-1])
    close(camelyon.stage_kappa(by_name, shuffled), expected)
    with pytest.raises(InputError, match="patient_099"):
        camelyon.stage_kappa(by_name, {n: s for n, s in shuffled.items() if n != "patient_099"})


def test_stage_files(tmp_path):
    classes = ["macro", "negative", "itc", "micro", "negative"]
    rows = [["patient_000.zip", "pN1"]]
    rows += [[f"patient_000_node_{i}.tif", name] for i, name in enumerate(classes)]
    patients, nodes = camelyon.read_stages(
        write_csv(tmp_path / "s.csv", ["patient", "stage"], rows)
    )
    assert patients == {"patient_000": "pN1"} == camelyon.stage_patients(nodes)
    assert nodes["patient_000_node_3"] == "micro" and len(nodes) == 5
    with pytest.raises(InputError, match="row 8: patient_000 is there twice"):
        path = write_csv(tmp_path / "s.csv", ["patient", "stage"], [*rows, rows[0]])
        camelyon.read_stages(path)
    rows.append(["patient_001.zip", "macro"])
    with pytest.raises(InputError, match="row 8: 'macro'"):
        camelyon.read_stages(write_csv(tmp_path / "s.csv", ["patient", "stage"], rows))
    with pytest.raises(InputError, match="patient_000: a patient has 5 nodes, got 4"):
        camelyon.stage_patients({n: c for n, c in nodes.items() if not n.endswith("0")})


def test_froc_by_hand():
    """Two slides, three lesions, one isolated tumour cell's region."""
    mask = np.zeros((8, 8), np.int64)
    mask[0:2, 0:2], mask[4:6, 3:5], mask[7, 7], mask[0, 6] = 1, 2, 3, 4  # 4 is the ITC
    tumour = camelyon.SlideDetections(
        probabilities=[0.9, 0.3, 0.6, 0.8, 0.99],
        x=[2, 3, 7, 6, 13],  # 0.9 and 0.3 in lesion 1, 0.6 in 2, 0.8 outside, 0.99 in the ITC
        y=[2, 0, 11, 2, 0],
        lesions=mask,
        itc=[4],
        downsample=2,
    )
    normal = camelyon.SlideDetections(probabilities=[0.7, 0.5], x=[100, 5], y=[100, 5])
    found = camelyon.froc([tumour, normal])
    assert (found.num_slides, found.num_lesions) == (2, 3)
    # Thresholds inf .9 .8 .7 .6 .5: false positives 0 0 1 2 2 3 of two slides, found 0 1 1 1 2 2.
    np.testing.assert_allclose(found.false_positives, [0, 0, 0.5, 1, 1, 1.5])
    np.testing.assert_allclose(found.sensitivity, np.array([0, 1, 1, 1, 2, 2]) / 3)
    expected = np.array([1, 1, 2, 2, 2, 2]) / 3
    np.testing.assert_allclose(found.sensitivities, expected)
    assert found.score == pytest.approx(expected.mean())
    # The same lesions as a function of the place.
    by_function = camelyon.SlideDetections(
        tumour.probabilities, tumour.x, tumour.y,
        lesions=lambda x, y: mask[y.astype(int) // 2, x.astype(int) // 2],
        lesion_ids=(1, 2, 3, 4), itc=[4],
    )  # fmt: skip
    assert camelyon.froc([by_function, normal]).sensitivities == found.sensitivities
    assert np.isnan(camelyon.froc([normal]).score)
    outside = camelyon.SlideDetections([0.5], [16], [0], lesions=mask, downsample=2)
    with pytest.raises(InputError, match=r"x=16, y=0 lies outside.*\(8, 8\)"):
        camelyon.froc([outside])


def test_froc_interpolates():
    """One lesion found after one false positive: the curve rises from 0 to 1 between 0 and 1."""
    mask = np.ones((1, 1), np.int64)
    slides = [
        camelyon.SlideDetections([0.2], [0], [0], lesions=mask),
        camelyon.SlideDetections([0.5] * 8, range(8), range(8)),
    ]
    # 0 until 4 a slide (8 false positives of two slides), then 1.
    assert camelyon.froc(slides).sensitivities == (0, 0, 0, 0, 1, 1)
    ramp = [camelyon.SlideDetections([0.5, 0.5], [0, 5], [0, 0], lesions=np.array([[1] + [0] * 9]))]
    assert camelyon.froc(ramp).sensitivities == (0.25, 0.5, 1, 1, 1, 1)


# Calibration


def make_logits(sharpness, n=4000, c=4, seed=11):
    """Logits that are calibrated at a temperature of `sharpness`, and classes."""
    key = np.random.default_rng(seed)
    logits = key.normal(size=(n, c)) * 2
    uniform = key.random((n, 1))
    classes = (special.softmax(logits, 1).cumsum(1) < uniform).sum(1).clip(0, c - 1)
    return logits * sharpness, classes


def test_proper_scores_equal_scikit_learn():
    labels, scores, _ = make_cases(12)
    p = special.expit(scores)
    close(calibration.brier(p, labels), reference.brier_score_loss(labels, p))
    close(calibration.negative_log_likelihood(p, labels), reference.log_loss(labels, p))
    logits, classes = make_logits(1.0, n=300)
    q = special.softmax(logits, 1)
    expected = ((q - np.eye(4)[classes]) ** 2).sum(1).mean()
    close(calibration.brier(q, classes), expected)
    close(calibration.negative_log_likelihood(q, classes), reference.log_loss(classes, q))
    # Unknown cases are left out; a certain mistake is finite.
    close(calibration.brier([*p, 0.3], [*labels, np.nan]), calibration.brier(p, labels))
    assert calibration.negative_log_likelihood([0.0], [1]) == pytest.approx(52 * np.log(2))


def test_temperature_is_recovered_and_keeps_the_argmax():
    logits, classes = make_logits(3.0)
    temperature = calibration.fit_temperature(logits, classes)
    assert temperature == pytest.approx(3.0, rel=0.06)
    cooled = calibration.apply_temperature(logits, temperature)
    np.testing.assert_array_equal(cooled.argmax(1), logits.argmax(1))

    def loss(t):
        return calibration.negative_log_likelihood(special.softmax(logits / t, 1), classes)

    assert loss(temperature) < loss(1.0) - 0.1
    assert loss(temperature) <= min(loss(temperature * f) for f in (0.99, 1.01))


def test_temperature_per_label_leaves_out_the_unknown():
    key = np.random.default_rng(13)
    base = key.normal(size=(4000, 3)) * 2
    targets = (key.random(base.shape) < special.expit(base)).astype(float)
    logits = base * [2.0, 0.5, 1.0]
    targets[:, 2] = 0
    wrong = targets.copy()
    wrong[:2000, 0] = 1 - wrong[:2000, 0]
    wrong[:2000, 0] = np.nan
    found = calibration.fit_temperature(logits, wrong, "sigmoid")
    assert found[0] == pytest.approx(2.0, rel=0.1) and found[1] == pytest.approx(0.5, rel=0.1)
    assert found[2] == 1
    alone = calibration.fit_temperature(logits[2000:, 0], targets[2000:, 0], "sigmoid")
    assert alone == pytest.approx(found[0], rel=1e-9)
    p = special.expit(calibration.apply_temperature(logits, found))
    for label in range(2):
        before = special.expit(logits[:, label])
        assert calibration.negative_log_likelihood(
            p[:, label], targets[:, label]
        ) < calibration.negative_log_likelihood(before, targets[:, label])


def test_temperature_of_hopeless_logits_stays_in_bounds():
    logits, classes = make_logits(1.0, n=200)
    assert calibration.fit_temperature(-logits, classes) == pytest.approx(100, rel=1e-6)
    assert calibration.fit_temperature(np.eye(4) * 9, np.arange(4)) == pytest.approx(0.01, rel=1e-6)
    assert calibration.fit_temperature(np.zeros((5, 3)), [0, 1, 2, 0, 1]) == 1


def test_calibration_error_is_small_where_calibrated_and_large_where_not():
    key = np.random.default_rng(14)
    p = key.random(20000)
    labels = (key.random(20000) < p).astype(float)
    assert calibration.expected_calibration_error(p, labels) < 0.015
    sharp = special.expit(4 * special.logit(p))
    assert calibration.expected_calibration_error(sharp, labels) > 0.1
    logits, classes = make_logits(1.0, n=20000)
    assert calibration.expected_calibration_error(special.softmax(logits, 1), classes) < 0.015
    found = calibration.expected_calibration_error(special.softmax(4 * logits, 1), classes)
    assert found > 0.15
    each = calibration.classwise_ece(special.softmax(4 * logits, 1), classes)
    assert each.shape == (4,) and (each > 0.05).all()
    columns = (classes[:, None] == np.arange(4)).astype(float)
    close(calibration.classwise_ece(special.softmax(4 * logits, 1), columns), each)


def test_calibration_error_by_hand():
    """Bins of width 1/2: 0.2 and 0.5 promise 0.35 and bring 0.5; 0.8 promises 0.8 and brings 1."""
    p, labels = [0.2, 0.5, 0.8, 0.9], [0, 1, 1, np.nan]
    expected = 2 / 3 * 0.15 + 1 / 3 * 0.2
    assert calibration.expected_calibration_error(p, labels, 2) == pytest.approx(expected)
    weighted = calibration.expected_calibration_error(p, labels, 2, [3, 3, 0, 1])
    assert weighted == pytest.approx(0.15)
    low, high = calibration.reliability_table(p, labels, 2)
    assert (low.low, low.high, low.count, low.observed) == (0, 0.5, 2, 0.5)
    assert low.mean_probability == pytest.approx(0.35)
    assert (high.count, high.mean_probability, high.observed) == (1, 0.8, 1)
    empty = calibration.reliability_table(p, labels, 4)[2]
    assert empty.count == 0 and np.isnan(empty.observed)
    # Of several classes the likeliest is asked: 0.6 and right, 0.7 and wrong.
    both = [[0.6, 0.4], [0.3, 0.7]]
    assert calibration.expected_calibration_error(both, [0, 0], 1) == pytest.approx(0.15)
    assert np.isnan(calibration.expected_calibration_error([], []))
