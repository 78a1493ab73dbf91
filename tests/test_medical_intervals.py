"""Intervals and audits: coverage, clusters, order, two tests that agree, and a planted gap."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from vitjax.errors import InputError
from vitjax.medical.metrics import calibration, counts
from vitjax.medical.metrics.audit import GapRow, SubgroupRow, audit, is_age
from vitjax.medical.metrics.intervals import (
    Interval,
    any_positive,
    auroc_interval,
    delong,
    delong_test,
    group_bootstrap,
    holm,
    over_seeds,
    paired_difference,
)
from vitjax.medical.metrics.ranking import auroc, average_precision

DISTANCE = 1.0  # of the two normals
TRUE_AUROC = stats.norm.cdf(DISTANCE / np.sqrt(2))


def binormal(seed, n=200, ties=False):
    key = np.random.default_rng(seed)
    labels = (key.random(n) < 0.4).astype(float)
    scores = key.normal(size=n) + DISTANCE * labels
    return labels, np.round(scores, 1) if ties else scores


def clustered(seed, patients=60, views=8):
    """Views of one patient are nearly the same."""
    key = np.random.default_rng(seed)
    groups = np.repeat([f"patient{i}" for i in range(patients)], views)
    labels = np.repeat((np.arange(patients) % 3 == 0).astype(float), views)
    shared = np.repeat(key.normal(size=patients), views)
    return labels, shared + DISTANCE * labels + 0.1 * key.normal(size=len(labels)), groups


@pytest.mark.parametrize("ties", [False, True])
def test_the_fast_interval_is_the_bootstrap(ties):
    labels, scores = binormal(0, ties=ties)
    groups = np.random.default_rng(1).integers(0, 70, len(labels))
    fast = auroc_interval(labels, scores, groups, num=100, seed=5)
    slow = group_bootstrap(
        lambda w: auroc(labels, scores, w),
        groups, num=100, seed=5, strata=any_positive(labels, groups),
    )  # fmt: skip
    assert dataclasses.astuple(fast) == pytest.approx(dataclasses.astuple(slow), abs=1e-12)
    assert slow.low < slow.value == auroc(labels, scores) < slow.high


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_of_rows_changes_nothing(grouped):
    labels, scores = binormal(2, ties=True)
    groups = np.random.default_rng(3).integers(0, 50, len(labels)).astype(str)
    order = np.random.default_rng(4).permutation(len(labels))
    other = np.round(scores + np.random.default_rng(5).normal(size=len(scores)), 1)
    given = (groups, groups[order]) if grouped else (None, None)
    assert auroc_interval(labels, scores, given[0], num=50) == auroc_interval(
        labels[order], scores[order], given[1], num=50
    )
    assert paired_difference(labels, scores, other, given[0], num=50) == paired_difference(
        labels[order], scores[order], other[order], given[1], num=50
    )
    if grouped:
        first = group_bootstrap(lambda w: w @ scores, groups, num=50)
        again = group_bootstrap(lambda w: w @ scores[order], groups[order], num=50)
        assert first.low == pytest.approx(again.low, rel=1e-9)
        assert first.high == pytest.approx(again.high, rel=1e-9)


def test_the_seed_decides():
    labels, scores = binormal(6)
    first = auroc_interval(labels, scores, num=50, seed=1)
    assert first == auroc_interval(labels, scores, num=50, seed=1)
    assert first.low != auroc_interval(labels, scores, num=50, seed=2).low


def test_groups_are_drawn_whole():
    groups = np.array(["a", "b", "b", "c", "c", "c", "d"])
    strata = np.array([0, 1, 1, 1, 1, 1, 0])
    seen = []
    group_bootstrap(lambda w: seen.append(w) or 0.0, groups, num=200, strata=strata)
    weights = np.stack(seen[1:])
    assert (weights[:, 1] == weights[:, 2]).all() and (weights[:, 3] == weights[:, 5]).all()
    # Two groups out of each stratum, in every resample.
    assert (weights[:, [0, 6]].sum(1) == 2).all() and (weights[:, [1, 3]].sum(1) == 2).all()
    assert (weights[:, 0] == 0).any() and (weights[:, 0] == 2).any()
    # Unstratified, the sizes of the strata vary, and still four groups are drawn.
    seen.clear()
    group_bootstrap(lambda w: seen.append(w) or 0.0, groups, num=200)
    weights = np.stack(seen[1:])
    assert (weights[:, [0, 1, 3, 6]].sum(1) == 4).all() and weights[:, [0, 6]].sum(1).std() > 0


def test_coverage_of_the_binormal_auroc():
    """The 95% interval holds the true AUROC in about 95% of 200 data sets of 200 cases."""
    hits = 0
    for seed in range(200):
        labels, scores = binormal(1000 + seed)
        found = auroc_interval(labels, scores, num=300, seed=seed)
        hits += found.low <= TRUE_AUROC <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_coverage_of_clustered_data_needs_groups():
    grouped = naive = 0
    for seed in range(100):
        labels, scores, groups = clustered(2000 + seed)
        truth = stats.norm.cdf(DISTANCE / np.sqrt(2 * 1.01))
        one, two = (auroc_interval(labels, scores, g, num=200) for g in (groups, None))
        grouped += one.low <= truth <= one.high
        naive += two.low <= truth <= two.high
        assert one.high - one.low > 1.5 * (two.high - two.low)
    assert grouped >= 88 and naive <= 70


def test_undefined_resamples_are_counted_and_left_out():
    labels, scores = np.array([1.0] + [0] * 9), np.arange(10.0)[::-1]
    loose = auroc_interval(labels, scores, num=500, stratify=False)
    assert 100 < loose.num_undefined < 300 and loose.low == loose.high == 1
    assert auroc_interval(labels, scores, num=500).num_undefined == 0
    one_class = auroc_interval(np.ones(5), scores[:5], num=20)
    assert np.isnan([one_class.value, one_class.low, one_class.high]).all()
    assert one_class.num_undefined == 20
    unknown = auroc_interval([np.nan, np.nan], [1, 2], num=20)
    assert np.isnan(unknown.low) and unknown.num_undefined == 20


def test_unknown_labels_are_left_out():
    labels, scores = binormal(7)
    groups = np.arange(len(labels)) // 2
    more = np.append(labels, [np.nan] * 4), np.append(scores, [9.0] * 4)
    found = auroc_interval(*more, np.append(groups, [500] * 4), num=50)
    assert found == auroc_interval(labels, scores, groups, num=50)


def test_a_statistic_may_be_an_array():
    labels, scores = binormal(8)
    both = group_bootstrap(
        lambda w: np.array([auroc(labels, scores, w), np.nan]), np.arange(200), num=60
    )
    alone = group_bootstrap(lambda w: auroc(labels, scores, w), np.arange(200), num=60)
    assert both.low[0] == alone.low and both.high[0] == alone.high
    assert np.isnan(both.low[1]) and both.num_undefined.tolist() == [0, 60]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: group_bootstrap(np.sum, ["a", ""]), r"blank in rows \(from 0\) 1"),
        (lambda: group_bootstrap(np.sum, [1.0, np.nan]), r"blank in rows \(from 0\) 1"),
        (lambda: group_bootstrap(np.sum, np.array(["a", None])), r"blank in rows \(from 0\) 1"),
        (lambda: group_bootstrap(np.sum, []), r"shape \(0,\)"),
        (lambda: group_bootstrap(np.sum, ["a", "a"], strata=[0, 1]), "groups a are in several"),
        (lambda: auroc_interval([0, 1], [0, 1], level=95), "level 95"),
        (lambda: auroc_interval([0, 1], [0, 1], num=0), "got 0"),
        (lambda: auroc_interval([0, 1], [0, 1], ["a"]), r"labels \(2,\), groups \(1,\)"),
        (lambda: holm([0.5, 1.5]), "0 to 1, got 1.5"),
        (lambda: over_seeds([]), "no value"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_delong_by_its_definition():
    """The variance from the N M comparisons themselves, ties included."""
    labels, scores = binormal(9, n=60, ties=True)
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    expected = sum(wins.mean(axis).var(ddof=1) / wins.shape[1 - axis] for axis in (0, 1))
    area, variance = delong(labels, scores)
    assert area == pytest.approx(wins.mean(), abs=1e-12)
    assert variance == pytest.approx(expected, abs=1e-12)


def test_delong_agrees_with_the_bootstrap():
    labels, scores = binormal(10, n=600)
    found = group_bootstrap(lambda w: auroc(labels, scores, w), np.arange(600), num=1)
    area, variance = delong(labels, scores)
    assert area == found.value
    wide = auroc_interval(labels, scores, num=4000)
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.06)


@pytest.mark.parametrize("noise", [0.3, 0.8])
def test_delong_and_the_paired_bootstrap_agree(noise):
    labels, scores = binormal(11, n=400)
    other = scores + noise * np.random.default_rng(12).normal(size=len(scores))
    test = delong_test(labels, scores, other)
    paired = paired_difference(labels, scores, other, num=4000)
    assert test["auc_a"] == pytest.approx(paired.value_a, abs=1e-12)
    assert test["difference"] == pytest.approx(paired.value, abs=1e-12)
    assert test["p"] == pytest.approx(paired.p, abs=0.02)
    half = (paired.high - paired.low) / 2
    assert half == pytest.approx(1.96 * test["standard_error"], rel=0.08)
    # Paired, the difference is surer than of independent scores.
    assert test["standard_error"] < np.sqrt(delong(labels, scores)[1] + delong(labels, other)[1])


def test_p_is_uniform_under_no_difference():
    """Two noisy copies of one score: at 5%, about 5% of 300 tests reject."""
    ps = []
    for seed in range(300):
        key = np.random.default_rng(seed)
        labels = (np.arange(120) < 50).astype(float)
        base = key.normal(size=120) + labels
        ps.append(
            delong_test(labels, base + key.normal(size=120), base + key.normal(size=120))["p"]
        )
    assert 0.02 <= np.mean(np.array(ps) < 0.05) <= 0.09
    assert 0.4 <= np.mean(np.array(ps) < 0.5) <= 0.6


def test_the_same_scores_do_not_differ():
    labels, scores = binormal(13)
    test = delong_test(labels, scores, scores)
    assert (test["difference"], test["z"], test["p"]) == (0, 0, 1)
    paired = paired_difference(labels, scores, scores, num=50)
    assert (paired.value, paired.low, paired.high, paired.p) == (0, 0, 0, 1)
    assert np.isnan(delong(np.ones(5), scores[:5])).all()


def test_any_statistic_can_be_paired():
    labels, scores = binormal(14)
    other = np.random.default_rng(15).normal(size=len(scores))
    slow = paired_difference(labels, scores, other, num=60, statistic=lambda *a: auroc(*a))
    fast = paired_difference(labels, scores, other, num=60)
    assert dataclasses.astuple(slow) == pytest.approx(dataclasses.astuple(fast), abs=1e-12)
    found = paired_difference(labels, scores, other, num=60, statistic=average_precision)
    expected = average_precision(labels, scores) - average_precision(labels, other)
    assert found.value == pytest.approx(expected) and found.p == pytest.approx(2 / 61)


def test_holm_by_hand():
    found = holm([0.01, 0.04, np.nan, 0.03, 0.9])
    np.testing.assert_allclose(found, [0.04, 0.09, np.nan, 0.09, 0.9])
    np.testing.assert_allclose(holm([0.5, 0.6]), [1, 1])


def test_over_seeds_by_hand():
    assert over_seeds([1, 2, 3]) == {"mean": 2, "standard_deviation": 1, "n": 3}
    assert np.isnan(over_seeds([1])["standard_deviation"])


# Audit


@pytest.fixture(scope="module")
def cohort():
    """Women are ranked worse, ages are blank here and there, and one site is tiny."""
    key = np.random.default_rng(16)
    n = 1600
    patients = np.repeat(np.arange(n // 2), 2)
    sex = np.where(key.random(n // 2) < 0.5, "Male", "Female")[patients]
    labels = (key.random(n) < 0.4).astype(float)
    scores = special.expit(key.normal(size=n) + labels * np.where(sex == "Female", 0.5, 2.5) - 1)
    age = key.integers(18, 90, n).astype(float)
    age[key.random(n) < 0.1] = np.nan
    site = np.where(np.arange(n) < 30, "tiny", "large")
    columns = {"Sex": sex, "Age": age, "site": site}
    rows = audit(labels, scores, columns, patients, threshold=0.5, num_bootstraps=200)
    return labels, scores, columns, patients, rows


def pick(rows, kind, **wanted) -> Any:
    found = [
        r
        for r in rows
        if isinstance(r, kind) and all(getattr(r, k) == v for k, v in wanted.items())
    ]
    assert len(found) == 1
    return found[0]


def test_a_planted_gap_is_found(cohort):
    rows = cohort[-1]
    gap = pick(rows, GapRow, column="Sex", metric="auroc")
    assert (gap.worst, gap.best) == ("Female", "Male")
    assert 0.2 < gap.gap.value < 0.4 and gap.gap.low > 0.1
    missed = pick(rows, GapRow, column="Sex", metric="fnr")
    assert missed.worst == "Female" and missed.gap.low > 0.2
    odds = pick(rows, GapRow, column="Sex", metric="equalised_odds")
    wrong = pick(rows, GapRow, column="Sex", metric="fpr")
    assert odds.gap == missed.gap and odds.gap.value > wrong.gap.value
    assert wrong.gap.low < 0.02


def test_equalised_odds_are_of_rates_only(cohort):
    labels, scores, columns, patients, _ = cohort
    sex = {"Sex": columns["Sex"]}
    rows = audit(labels, scores, sex, patients, threshold=0.0, num_bootstraps=5)
    assert pick(rows, GapRow, metric="auroc").gap.value > 0.2
    assert pick(rows, GapRow, metric="equalised_odds").gap.value == 0


def test_no_gap_is_no_gap(cohort):
    labels, scores, _, patients, _ = cohort
    coin = np.where(np.random.default_rng(17).random(len(labels)) < 0.5, "heads", "tails")
    rows = audit(labels, scores, {"coin": coin}, patients, threshold=0.5, num_bootstraps=200)
    assert pick(rows, GapRow, metric="auroc").gap.low < 0


def test_subgroups_have_the_metrics_of_their_cases(cohort):
    labels, scores, columns, patients, rows = cohort
    for column, value in (("Sex", "Female"), ("all", "all")):
        mask = columns["Sex"] == "Female" if column == "Sex" else np.ones(len(labels), bool)
        row = pick(rows, SubgroupRow, column=column, value=value)
        truth, p = labels[mask], scores[mask]
        rates = counts.rates_at(truth, p, 0.5)
        assert row.n == mask.sum() and row.positives == truth.sum()
        assert row.num_groups == len(set(patients[mask]))
        assert row.prevalence == pytest.approx(truth.mean())
        assert row.auroc.value == pytest.approx(auroc(truth, p), abs=1e-12)
        assert row.fpr.value == pytest.approx(rates["fpr"], abs=1e-12)
        assert row.fnr.value == pytest.approx(rates["fnr"], abs=1e-12)
        expected = calibration.expected_calibration_error(p, truth)
        assert row.ece.value == pytest.approx(expected, abs=1e-12)
        for interval in (row.auroc, row.fpr, row.fnr):
            assert interval.low < interval.value < interval.high
    overall = auroc_interval(labels, scores, patients, num=200)
    assert pick(rows, SubgroupRow, column="all").auroc == overall


def test_small_subgroups_are_insufficient(cohort):
    labels, scores, columns, patients, rows = cohort
    tiny = pick(rows, SubgroupRow, column="site", value="tiny")
    assert tiny.n == 30 and tiny.auroc == tiny.fpr == tiny.fnr == tiny.ece == "insufficient"
    gap = pick(rows, GapRow, column="site", metric="auroc")
    assert gap.gap == "insufficient" and gap.subgroups == ("large",)
    # Enough cases, and too few of one class.
    few = labels.copy()
    few[np.flatnonzero((columns["Sex"] == "Male") & (labels == 1))[9:]] = 0
    again = audit(few, scores, {"Sex": columns["Sex"]}, patients, threshold=0.5, num_bootstraps=5)
    male = pick(again, SubgroupRow, value="Male")
    assert male.positives == 9 and male.n > 50 and male.auroc == "insufficient"
    more = audit(
        labels, scores, {"site": columns["site"]}, patients,
        threshold=0.5, num_bootstraps=5, min_cases=30, min_positives=5,
    )  # fmt: skip
    assert isinstance(pick(more, SubgroupRow, value="tiny").auroc, Interval)


def test_ages_are_binned_and_blanks_are_kept(cohort):
    labels, scores, columns, patients, rows = cohort
    ages = [r for r in rows if isinstance(r, SubgroupRow) and r.column == "Age"]
    assert [r.value for r in ages] == ["[18, 40)", "[40, 60)", "[60, 80)", "[80, 200)", "Unknown"]
    age = columns["Age"]
    expected = [*np.histogram(age[~np.isnan(age)], [18, 40, 60, 80, 200])[0], np.isnan(age).sum()]
    assert [r.n for r in ages] == expected and sum(expected) == len(labels)
    texts = np.array(["" if np.isnan(a) else f"{a:g}" for a in age])
    again = audit(labels, scores, {"Age": texts}, patients, threshold=0.5, num_bootstraps=200)
    assert [r for r in again if r.column == "Age"] == [r for r in rows if r.column == "Age"]
    blank = np.array(["AP", None] * (len(labels) // 2))
    found = audit(labels, scores, {"View": blank}, patients, threshold=0.5, num_bootstraps=5)
    assert pick(found, SubgroupRow, value="Unknown").n == len(labels) // 2
    with pytest.raises(InputError, match=r"ages 414\.0 lie outside"):
        audit(labels, scores, {"Age": np.where(age < 20, 414, age)}, patients, threshold=0.5)
    some = np.where(age < 20, "90+", texts)
    with pytest.raises(InputError, match=r"Age: 90\+ are no ages"):
        audit(labels, scores, {"Age": some}, patients, threshold=0.5)
    coarse = np.where(age < 50, "young", "old")
    found = audit(labels, scores, {"Age": coarse}, patients, threshold=0.5, num_bootstraps=5)
    assert pick(found, SubgroupRow, value="young").n == (age < 50).sum()
    with pytest.raises(InputError, match="rising"):
        audit(labels, scores, {"Age": age}, patients, threshold=0.5, age_bins=(0, 50, 40))
    for name in ("Age", "Patient Age", "PatientAge", "age_approx", "AGE_AT_CXR"):
        assert is_age(name)
    assert not is_age("image") and not is_age("stage")


def test_an_audit_is_plain_data_in_any_order(cohort):
    labels, scores, columns, patients, rows = cohort
    order = np.random.default_rng(18).permutation(len(labels))
    again = audit(
        labels[order], scores[order], {k: v[order] for k, v in columns.items()}, patients[order],
        threshold=0.5, num_bootstraps=200,
    )  # fmt: skip
    first, second = (json.dumps([dataclasses.asdict(r) for r in x]) for x in (rows, again))
    for one, two in zip(json.loads(first), json.loads(second), strict=True):
        for name, value in one.items():
            if isinstance(value, dict):
                assert two[name] == pytest.approx(value, abs=1e-9)
            else:
                assert two[name] == value


def test_an_audit_refuses():
    with pytest.raises(InputError, match=r"0 to 1, got 2\.0"):
        audit([0, 1], [0.5, 2.0], {}, ["a", "b"], threshold=0.5)
    with pytest.raises(InputError, match=r"Sex \(1,\)"):
        audit([0, 1], [0.5, 0.2], {"Sex": ["F"]}, ["a", "b"], threshold=0.5)
    with pytest.raises(InputError, match="threshold is NaN"):
        audit([0, 1], [0.5, 0.2], {}, ["a", "b"], threshold=float("nan"))
    with pytest.raises(InputError, match="no label is known"):
        audit([np.nan], [0.5], {}, ["a"], threshold=0.5)
