"""Decisions from laws: equal to brute force, with intervals, honest about what cannot be had."""

import json
import math

import numpy as np
import pytest

from vitjax.errors import InputError
from vitjax.scaling import decide
from vitjax.scaling.parametric import fit_parametric

K = 6.0


def true_loss(n, d):
    return 1.8 + 480 / n**0.35 + 2100 / d**0.37


@pytest.fixture(scope="module")
def law():
    """Six budgets to 2.4e20 FLOPs, seven sizes each, 1% noise."""
    c = np.repeat(1e18 * 3.0 ** np.arange(6), 7)
    n = 0.1 * np.sqrt(c) * np.tile(np.geomspace(1 / 6, 6, 7), 6)
    d = c / K / n
    noise = np.random.default_rng(0).normal(0, 0.01, len(c))
    return fit_parametric(n, d, true_loss(n, d) * np.exp(noise), resamples=200)


def exact(law):
    """The same law without uncertainty: what the intervals must shrink to."""
    n, d = (np.exp(v + m) for v, m in zip((law.problem.n, law.problem.d), law.problem.centre,
                                          strict=False))  # fmt: skip
    return fit_parametric(n, d, true_loss(n, d), resamples=50)


def is_json(value):
    return json.dumps(value.to_dict(), allow_nan=False)


def test_frontier_is_the_lowest_loss_of_each_budget(law):
    found = decide.frontier(law, [1e20, 1e21], K)
    for i, c in enumerate((1e20, 1e21)):
        n = np.geomspace(1e7, 1e11, 40001)
        loss = law.predict(n, c / K / n)
        assert found.num_params.value[i] == pytest.approx(n[loss.argmin()], rel=1e-3)
        assert found.loss.value[i] == pytest.approx(loss.min(), rel=1e-9)
    np.testing.assert_allclose(
        K * found.num_params.value * found.num_examples.value, [1e20, 1e21], rtol=1e-9
    )
    assert np.all(found.num_params.low < found.num_params.value)
    assert np.all(found.num_params.value < found.num_params.high)
    # Further out is less certain, and said to be further out.
    ratio = found.num_params.high / found.num_params.low
    assert ratio[1] > ratio[0]
    np.testing.assert_allclose(found.reach, [1, 1e21 / (1e18 * 3**5)], rtol=1e-6)
    is_json(found)


def test_frontier_intervals_contain_the_truth_and_shrink_with_the_noise(law):
    n = np.geomspace(1e7, 1e11, 40001)
    best = n[true_loss(n, 1e21 / K / n).argmin()]
    found = decide.frontier(law, 1e21, K, level=0.99)
    assert found.num_params.low[0] < best < found.num_params.high[0]
    sharp = decide.frontier(exact(law), 1e21, K, level=0.99)
    assert sharp.num_params.value[0] == pytest.approx(best, rel=1e-3)
    assert sharp.num_params.high[0] / sharp.num_params.low[0] < 1.01


def test_the_best_size_costs_nothing_and_others_cost_what_the_law_says(law):
    best = decide.frontier(law, 1e20, K)
    n = float(best.num_params.value[0])
    at_best = decide.penalty(law, 1e20, n, K)
    assert at_best.penalty.value == pytest.approx(0, abs=1e-12)
    assert at_best.wasted.value == pytest.approx(0, abs=1e-9)
    small = decide.penalty(law, 1e20, n / 8, K)
    expected = law.predict(n / 8, 1e20 / K / n * 8) - law.predict(n, 1e20 / K / n)
    assert small.penalty.value == pytest.approx(float(expected), rel=1e-9)
    assert small.penalty.low > 0
    # The best size reaches that loss with the FLOPs that are not wasted.
    enough = decide.frontier(law, 1e20 * (1 - small.wasted.value), K)
    assert enough.loss.value[0] == pytest.approx(small.loss.value, rel=1e-9)
    is_json(small)


def test_limits_bind_only_where_the_best_choice_breaks_them(law):
    best = decide.frontier(law, 1e21, K)
    n, d = float(best.num_params.value[0]), float(best.num_examples.value[0])
    free = decide.inference_limited(law, 1e21, n * 2, K)
    assert not free.is_limited and free.num_params == pytest.approx(n)
    bound = decide.inference_limited(law, 1e21, n / 4, K)
    assert bound.is_limited and bound.num_params == pytest.approx(n / 4)
    assert bound.num_examples == pytest.approx(4 * d) and bound.penalty.value > 0
    assert not decide.data_limited(law, 1e21, d * 2, K).is_limited
    bound = decide.data_limited(law, 1e21, d / 4, K)
    assert bound.is_limited and bound.num_examples == pytest.approx(d / 4)
    assert bound.num_params == pytest.approx(4 * n) and "not modelled" in bound.note


def test_examples_needed_reach_the_loss_or_say_that_nothing_does(law):
    wanted = float(law.predict(1e9, 3e10))
    found = decide.examples_needed(law, wanted, 1e9)
    assert found.examples.value == pytest.approx(3e10, rel=1e-6)
    assert found.examples.low < 3e10 < found.examples.high
    floor = law.params["E"] + law.params["A"] / 1e9 ** law.params["alpha"]
    assert found.floor.value == pytest.approx(floor)
    never = decide.examples_needed(law, floor * 0.9, 1e9)
    assert math.isinf(never.examples.value) and never.share_unreachable > 0.9
    assert never.note.startswith("unreachable")
    assert '"infinity"' in is_json(never)
    # Between: some resamples reach it and some never do, so the upper end is infinite.
    edge = decide.examples_needed(law, floor * 1.0005, 1e9)
    assert 0.05 < edge.share_unreachable < 0.95 and math.isinf(edge.examples.high)


class Line:
    """y = exp(level) x^-slope with resamples around it."""

    def __init__(self, level, slope, spread=0.02, seed=0):
        generator = np.random.default_rng(seed)
        self.levels = level + spread * generator.normal(size=200)
        self.level, self.slope = level, slope

    def predict(self, x):
        return np.exp(self.level) * np.asarray(x) ** -self.slope

    def samples_predict(self, x):
        return np.exp(self.levels)[:, None] * np.asarray(x)[None] ** -self.slope


def test_two_laws_cross_where_they_are_equal():
    hybrid, vit = Line(0.0, 0.2, seed=1), Line(2.0, 0.4, seed=2)
    found = decide.crossing(hybrid, vit, 1.0, 1e9)
    assert found.x == pytest.approx(np.exp(10), rel=1e-3)
    assert (found.better_below, found.better_above) == ("a", "b")
    # ln x = (difference of levels) / 0.2: its deviation is 0.02 sqrt(2) / 0.2 = 0.14.
    assert np.log(found.high / found.low) == pytest.approx(2 * 1.645 * 0.1414, rel=0.2)
    assert found.low < np.exp(10) < found.high and found.share_crossing == 1.0
    same = decide.crossing(vit, hybrid, 1.0, 1e9)
    assert same.x == pytest.approx(found.x) and same.better_below == "b"
    is_json(found)


def test_laws_that_do_not_cross_in_the_range_say_so():
    found = decide.crossing(Line(0.0, 0.2), Line(2.0, 0.4), 1.0, 100.0)
    assert found.x is None and found.note == "no crossing in the range: a is better all over it"
    is_json(found)
    # An end of the range inside the interval: the open side is infinite.
    edge = decide.crossing(Line(0.0, 0.2, seed=1), Line(2.0, 0.4, seed=2), 1.0, np.exp(10.05))
    assert edge.high == np.inf and edge.low > 0 and "only" in edge.note
    assert '"infinity"' in is_json(edge)
    with pytest.raises(InputError, match="range"):
        decide.crossing(Line(0, 0.2), Line(2, 0.4), 10.0, 1.0)


def test_the_next_run_is_the_one_that_lowers_the_variance_most_per_flop(law):
    n, d = (g.ravel() for g in np.meshgrid(np.geomspace(1e8, 1e10, 5), np.geomspace(1e9, 1e11, 5)))
    found = decide.next_run(law, n, d, 1e10, 2e11)
    problem, z = law.problem, law.optimum
    logs = [np.log(v) - m for v, m in zip((n, d), problem.centre, strict=False)]
    target = [np.log(v) - m for v, m in zip(([1e10], [2e11]), problem.centre, strict=False)]
    c = problem.jacobian(z, *target)[0]
    information = np.linalg.inv(problem.covariance(z))
    before = c @ np.linalg.solve(information, c)
    for i, x in enumerate(problem.jacobian(z, *logs)):
        more = information + np.outer(x, x) / problem.run_variance(z)
        after = c @ np.linalg.solve(more, c)
        assert found.reductions[i] == pytest.approx(1 - after / before, rel=1e-4, abs=1e-9)
    assert found.index == np.argmax(found.reductions / (n * d))
    assert found.deviation_after < found.deviation == pytest.approx(math.sqrt(before), rel=1e-6)
    # Whatever the price, nothing says more about the target than runs in its direction.
    assert n[found.largest] * d[found.largest] == (n * d).max()
    # With another price, another choice.
    priced = decide.next_run(law, n, d, 1e10, 2e11, flops=np.ones(25))
    assert priced.index == priced.largest
    is_json(found)
    with pytest.raises(InputError, match="differ in length"):
        decide.next_run(law, n, d[:3], 1e10, 2e11)


def test_flops_factor_is_the_median_ratio():
    n, d = np.array([1e7, 1e8, 1e9]), np.array([1e9, 1e9, 1e9])
    tokens = 196
    c = 6 * n * d * tokens * np.array([1.2, 1.1, 1.05])
    assert decide.flops_factor(n, d, c) == pytest.approx(6 * tokens * 1.1)
    found = decide.flops_factor(n, d, c, tokens_per_example=tokens)
    assert found == pytest.approx(6 * tokens * 1.1)


@pytest.mark.parametrize(
    ("factor", "unit"),
    [
        (2.0, "looks like forward FLOPs"),
        (1.0, "looks like forward MACs"),
        (3.0, "looks like training MACs"),
        (6e-9, "looks like giga training FLOPs"),
        (1e-9, "looks like giga forward MACs"),
        (2e-12, "looks like tera forward FLOPs"),
        (6e3, "look like thousands or millions"),
    ],
)
def test_a_wrong_unit_of_flops_is_named(factor, unit):
    n, d = np.array([1e7, 1e8, 1e9]), np.array([1e9, 2e9, 3e9])
    with pytest.raises(InputError, match=unit):
        decide.flops_factor(n, d, factor * n * d * 64, tokens_per_example=64)


def test_flops_that_do_not_follow_n_d_are_refused():
    n, d = np.array([1e7, 1e8, 1e9]), np.array([1e9, 1e9, 1e9])
    with pytest.raises(InputError, match="6 in row 0 and 18 in row 2"):
        decide.flops_factor(n, d, n * d * np.array([6, 6, 18]))


def test_decisions_refuse_what_they_cannot_answer(law):
    bare = fit_parametric(
        *(np.exp(v + m) for v, m in zip((law.problem.n, law.problem.d, law.problem.v),
                                        law.problem.centre, strict=True)),
        resamples=0,
    )  # fmt: skip
    with pytest.raises(InputError, match="resamples=0"):
        decide.frontier(bare, 1e20, K)
    with pytest.raises(InputError, match="flops must be finite and above 0"):
        decide.frontier(law, -1.0, K)
    with pytest.raises(InputError, match="num_params must be finite"):
        decide.penalty(law, 1e20, 0.0, K)
