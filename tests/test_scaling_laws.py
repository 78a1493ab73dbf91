"""Laws of several variables: recovered where planted, equal to published fits, open where open."""

import csv
import importlib.util
import json

import numpy as np
import pytest
from scipy import optimize

from vitjax.errors import InputError
from vitjax.scaling.isoflop import find_budgets, fit_isoflop
from vitjax.scaling.parametric import fit_parametric
from vitjax.scaling.parametric_problem import NAMES, objective
from vitjax.scaling.projection import nonnegative_least_squares
from vitjax.scaling.shape_law import fit_shape, scale_shape

PLANTED = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}


def planted_loss(n, d):
    p = PLANTED
    return p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]


def planted_runs(seed, noise, budgets=6, sizes=7):
    """IsoFLOP budgets 3 times apart, sizes around the optimum, lognormal noise."""
    c = np.repeat(1e18 * 3.0 ** np.arange(budgets), sizes)
    n = 0.1 * np.sqrt(c) * np.tile(np.geomspace(1 / 6, 6, sizes), budgets)
    d = c / 6 / n
    return n, d, planted_loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(c)))


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def chinchilla(test_data):
    """N, D, L, C of 245 runs, digitised."""
    rows = read(test_data / "scaling" / "chinchilla_points.csv")
    n, c, loss = (
        np.array([float(row[key]) for row in rows])
        for key in ("Model Size", "Training FLOP", "loss")
    )
    return n, c / 6 / n, loss, c


@pytest.fixture(scope="session")
def comma(test_data):
    """C, N, L, tokens of the isoFLOP runs; seven rows are checks of the optimum, not a curve's."""
    rows = read(test_data / "scaling" / "isoflop_comma.csv")
    rows = [row for row in rows if row["Name"].startswith("isoflop")]
    columns = [
        np.array([float(row[key]) for row in rows])
        for key in ("throughput/total_gflops", "parameter_count", "eval/paloma/macro_loss",
                    "throughput/total_tokens")
    ]  # fmt: skip
    return columns[0] * 1e9, *columns[1:]


def test_linear_part_is_the_nonnegative_optimum():
    generator = np.random.default_rng(0)
    for _ in range(50):
        columns, target = generator.normal(size=(6, 3)), generator.normal(size=6)
        expected, _ = optimize.nnls(columns, target)
        found, value = nonnegative_least_squares(columns.T @ columns, columns.T @ target)
        np.testing.assert_allclose(found, expected, atol=1e-8)
        residual = columns @ expected - target
        np.testing.assert_allclose(value, residual @ residual - target @ target, atol=1e-8)


def test_chinchilla_by_the_replication(chinchilla):
    """Besiroglu et al. 2024 and their notebook: 5 highest losses out, Huber 1e-3, the sum."""
    n, d, loss, _ = chinchilla
    law = fit_parametric(n, d, loss, drop_highest=5)
    notebook = {"A": 477.84, "B": 2143.86, "E": 1.8172, "alpha": 0.34731, "beta": 0.36718}
    printed = {"A": 124.5, "B": 1293.0, "E": 0.026, "alpha": 0.015, "beta": 0.021}
    for name in NAMES:
        assert law.params[name] == pytest.approx(notebook[name], rel=0.01)
        assert law.standard_errors[name] == pytest.approx(printed[name], rel=0.25)
        low, high = law.intervals(0.95)[name]
        assert low < law.params[name] < high
    assert law.objective <= 0.0010183
    assert law.exponent == pytest.approx(0.5139, abs=2e-4)
    low, high = law.exponent_interval(0.95)
    assert low == pytest.approx(0.481, abs=0.01) and high == pytest.approx(0.557, abs=0.01)
    assert law.num_agreeing > 0.9 * law.num_starts
    assert law.outliers.dropped_rows == (0, 1, 2, 3, 4)
    assert law.not_identified == law.bounds_hit == ()
    json.dumps(law.to_dict(), allow_nan=False)


def test_five_runs_move_the_chinchilla_exponent(chinchilla):
    n, d, loss, _ = chinchilla
    law = fit_parametric(n, d, loss, resamples=0)
    assert law.exponent == pytest.approx(0.565, abs=0.001)
    assert law.params["beta"] == pytest.approx(0.453, abs=0.001)
    assert law.outliers.policy == "none" and law.outliers.dropped_rows == ()
    # What was kept although it is far out is named.
    assert {0, 1, 2, 3} <= set(law.outliers.far_rows)


def test_the_near_absolute_objective_is_minimised():
    """No start of scipy's BFGS on the same function ends lower."""
    n, d, loss = planted_runs(3, 0.02)
    law = fit_parametric(n, d, loss, resamples=0)
    logs = [np.log(column) for column in (n, d, loss)]

    def value(x):
        e, a, b, alpha, beta = x
        predicted = np.logaddexp(np.logaddexp(a - alpha * logs[0], b - beta * logs[1]), e)
        size = np.abs(predicted - logs[2])
        return np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum()

    at = [np.log(law.params[k]) for k in "EAB"] + [law.params[k] for k in ("alpha", "beta")]
    assert value(at) == pytest.approx(law.objective, rel=1e-9)
    generator = np.random.default_rng(0)
    for _ in range(8):
        start = np.array(at) * generator.uniform(0.8, 1.2, 5)
        found = optimize.minimize(value, start, method="Nelder-Mead", options={"maxiter": 4000})
        found = optimize.minimize(value, found.x, method="BFGS")
        assert law.objective <= found.fun * (1 + 1e-6)


def test_planted_parameters_come_back_exactly_without_noise():
    n, d, loss = planted_runs(0, 0.0)
    law = fit_parametric(n, d, loss, resamples=0)
    for name in NAMES:
        assert law.params[name] == pytest.approx(PLANTED[name], rel=1e-4)
    np.testing.assert_allclose(law.predict(n, d), loss, rtol=1e-7)


def test_units_change_nothing_but_the_units():
    n, d, loss = planted_runs(1, 0.01)
    law = fit_parametric(n, d, loss, resamples=0)
    other = fit_parametric(n / 1e6, d / 1e9, loss * 10, resamples=0)
    assert other.params["alpha"] == pytest.approx(law.params["alpha"], rel=1e-5)
    assert other.params["E"] == pytest.approx(law.params["E"] * 10, rel=1e-5)
    np.testing.assert_allclose(other.predict(1e2, 3.0), 10 * law.predict(1e8, 3e9), rtol=1e-6)


def test_planted_laws_lie_inside_their_intervals_at_the_stated_rate():
    """A short form of benchmarks/scaling_coverage.py: intervals half as wide would cover 59%."""
    n, d, _ = planted_runs(0, 0.0)
    new_n, new_d = n.max(), 3 * d.max()
    inside = {name: [] for name in (*NAMES, "law", "run")}
    for seed in range(24):
        *_, loss = planted_runs(100 + seed, 0.01)
        law = fit_parametric(n, d, loss, resamples=100, seed=seed)
        for name, (low, high) in law.intervals(0.9).items():
            inside[name].append(low <= PLANTED[name] <= high)
        truth = planted_loss(new_n, new_d)
        low, high = law.interval(new_n, new_d, 0.9, with_noise=False)
        inside["law"].append(low <= truth <= high)
        run = truth * np.exp(np.random.default_rng(500 + seed).normal(0, 0.01))
        low, high = law.interval(new_n, new_d, 0.9)
        inside["run"].append(low <= run <= high)
    rates = {name: np.mean(hits) for name, hits in inside.items()}
    assert min(rates.values()) >= 0.7, rates
    assert 0.8 <= np.mean(list(rates.values())) <= 0.985, rates


@pytest.fixture(scope="module")
def many():
    """96 runs, and their law."""
    runs = planted_runs(5, 0.01, budgets=8, sizes=12)
    return runs, fit_parametric(*runs, resamples=200)


def test_bands_hold_single_runs_only_with_their_noise(many):
    (n, d, loss), law = many
    shares = []
    for with_noise in (True, False):
        low, high = law.interval(n, d, 0.9, with_noise)
        shares.append(np.mean((low <= loss) & (loss <= high)))
    assert 0.83 <= shares[0] <= 0.98 and shares[1] < 0.6
    assert law.noise == pytest.approx(0.01, rel=0.3)


def test_profile_agrees_with_the_bootstrap_on_gaussian_noise(many):
    _, law = many
    for name in ("E", "alpha", "B"):
        low, high = law.profile(name, 0.9)
        other_low, other_high = law.intervals(0.9)[name]
        assert low < law.params[name] < high
        assert 0.5 < np.log(high / low) / np.log(other_high / other_low) < 2.0
    wide = law.profile("alpha", 0.99)
    assert wide[0] < law.profile("alpha", 0.9)[0] and wide[1] > law.profile("alpha", 0.9)[1]
    with pytest.raises(InputError, match="unknown parameter 'gamma'; allowed: E, A"):
        law.profile("gamma")


def test_first_order_errors_agree_with_the_bootstrap(many):
    runs, law = many
    theory = fit_parametric(*runs, resamples=0).standard_errors
    sampled = law.standard_errors
    for name in ("E", "alpha", "beta"):
        assert theory[name] == pytest.approx(sampled[name], rel=0.6)


def test_checkpoints_of_one_run_are_not_independent_runs():
    """Each run five times over: grouped, the intervals stay; ungrouped, they would shrink."""
    n, d, loss = planted_runs(2, 0.01)
    once = fit_parametric(n, d, loss, resamples=200)
    many = [np.repeat(column, 5) for column in (n, d, loss)]
    grouped = fit_parametric(*many, groups=np.repeat(np.arange(len(n)), 5), resamples=200)
    ungrouped = fit_parametric(*many, resamples=200)
    ratio = grouped.standard_errors["alpha"] / once.standard_errors["alpha"]
    assert ratio == pytest.approx(1, abs=0.15)
    assert ungrouped.standard_errors["alpha"] < 0.7 * once.standard_errors["alpha"]


def test_tied_exponents_are_tied_everywhere():
    n, d, loss = planted_runs(4, 0.01)
    law = fit_parametric(n, d, loss, tie_exponents=True, resamples=60)
    assert law.params["alpha"] == law.params["beta"]
    np.testing.assert_array_equal(law.samples[:, 3], law.samples[:, 4])
    assert law.exponent == 0.5
    assert law.objective >= fit_parametric(n, d, loss, resamples=0).objective
    assert 0.25 < law.params["alpha"] < 0.45


def test_a_weight_of_two_is_the_run_twice():
    n, d, loss = planted_runs(6, 0.01)
    weights = 1.0 + (np.arange(len(n)) % 3 == 0)
    rows = np.repeat(np.arange(len(n)), weights.astype(int))
    weighted = fit_parametric(n, d, loss, weights=weights, resamples=0)
    repeated = fit_parametric(n[rows], d[rows], loss[rows], resamples=0)
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-9)
    assert weighted.params["alpha"] == pytest.approx(repeated.params["alpha"], rel=1e-6)


def test_what_the_runs_do_not_say_is_named():
    n, d, _ = planted_runs(0, 0.0)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.01, len(n)))
    law = fit_parametric(n, d, (1.8 + 2100 / d**0.37) * noise, resamples=100)
    assert {"A", "alpha"} <= set(law.not_identified)
    assert "beta" not in law.not_identified
    # Far from the floor, the floor is open.
    law = fit_parametric(n, d, (480 / n**0.35 + 2100 / d**0.37) * noise, resamples=100)
    assert "E" in law.not_identified
    json.dumps(law.to_dict(), allow_nan=False)


def test_the_jacobian_is_that_of_the_prediction():
    n, d, loss = planted_runs(1, 0.01)
    for is_tied in (False, True):
        law = fit_parametric(n, d, loss, tie_exponents=is_tied, resamples=0)
        problem, z = law.problem, law.optimum
        found = problem.jacobian(z, problem.n, problem.d)
        for column in range(problem.num_free):
            step = np.zeros(5)
            step[column] = 1e-5
            if is_tied and column == 3:
                step[4] = 1e-5
            up = problem.log_predict(z + step, problem.n, problem.d)
            down = problem.log_predict(z - step, problem.n, problem.d)
            np.testing.assert_allclose(found[:, column], (up - down) / 2e-5, atol=1e-8)


def test_condition_number_is_that_of_the_uncentred_parameters(chinchilla):
    n, d, loss, _ = chinchilla
    law = fit_parametric(n, d, loss, drop_highest=5, resamples=0)
    kept = np.argsort(loss)[:-5]
    by_size = law.params["A"] * n[kept] ** -law.params["alpha"]
    by_data = law.params["B"] * d[kept] ** -law.params["beta"]
    total = law.predict(n[kept], d[kept])
    rows = [law.params["E"] + 0 * total, by_size, by_data, -by_size * np.log(n[kept]),
            -by_data * np.log(d[kept])]  # fmt: skip
    jacobian = np.stack(rows, 1) / total[:, None]
    expected = np.linalg.cond(jacobian.T @ jacobian)
    assert law.condition_number == pytest.approx(expected, rel=1e-3)


def test_objective_of_jax_and_numpy_agree():
    n, d, loss = planted_runs(1, 0.01)
    law = fit_parametric(n, d, loss, resamples=0)
    data = {key: value[0] for key, value in law.problem.data(1).items()}
    size = np.abs(law.problem.residuals(law.optimum))
    expected = np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum()
    assert float(objective(law.optimum, data)) == pytest.approx(expected, rel=1e-4)  # float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_params": np.full(42, 1e8)}, "at least 3 different sizes.* a single size"),
        ({"num_examples": np.full(42, 1e9)}, "a single data size"),
        ({"loss": np.r_[np.nan, np.full(41, 2.0)]}, r"counted from 0\): 0 \(nan\)"),
        ({"loss": np.r_[np.full(41, 2.0), -1.0]}, r"41 \(-1\)"),
        ({"loss": np.full(41, 2.0)}, "num_params has 42.*loss has 41"),
        ({"groups": [1, 2]}, "one label for each of 42"),
        ({"weights": np.ones(3)}, "weights has 3 rows"),
        ({"drop_highest": 42}, "drop_highest=42"),
        ({"delta": 0.0}, "delta=0"),
        ({"resamples": 10}, "resamples=10 are too few"),
    ],
)
def test_wrong_input_is_named(change, message):
    n, d, loss = planted_runs(0, 0.01)
    arguments = {"num_params": n, "num_examples": d, "loss": loss} | change
    with pytest.raises(InputError, match=message):
        fit_parametric(**arguments)


def test_too_few_runs_are_refused():
    n, d, loss = planted_runs(0, 0.01)
    with pytest.raises(InputError, match="5 runs are too few for 5 parameters: at least 6"):
        fit_parametric(n[:40:8], d[:40:8], loss[:40:8])
    law = fit_parametric(n, d, loss, resamples=0)
    with pytest.raises(InputError, match="resamples=0"):
        law.intervals()


# IsoFLOP


def planted_isoflop(budgets=(1e18, 3e18, 1e19, 3e19), exponent=0.5, noise=0.0):
    generator = np.random.default_rng(0)
    c = np.repeat(budgets, 7)
    best = 2.0 * c**exponent
    n = best * np.tile(np.geomspace(0.25, 4, 7), len(budgets))
    loss = 2 + 100 * c**-0.1 + 0.05 * np.log(n / best) ** 2
    return c, n, loss * np.exp(generator.normal(0, noise, len(c)))


def test_planted_optima_come_back_exactly():
    c, n, loss = planted_isoflop()
    law = fit_isoflop(c, n, loss, resamples=50)
    assert law.exponent == pytest.approx(0.5, abs=1e-9)
    np.testing.assert_allclose(law.predict([1e20]), [2e10], rtol=1e-6)
    np.testing.assert_allclose(law.predict_examples(1e20), 1e20 / 6 / 2e10, rtol=1e-6)
    assert [b.num_sizes for b in law.budgets] == [7] * 4
    for budget in law.budgets:
        assert budget.optimum == pytest.approx(2 * budget.flops**0.5, rel=1e-6)
        at = np.log(budget.optimum)
        assert np.polyval(budget.coefficients, at) == pytest.approx(budget.loss, rel=1e-6)
        assert budget.flags == ()
    assert law.unused_rows == law.flags == ()
    json.dumps(law.to_dict(), allow_nan=False)


def test_isoflop_interval_covers_the_planted_exponent():
    c, n, loss = planted_isoflop(noise=0.01)
    law = fit_isoflop(c, n, loss)
    low, high = law.exponent_interval(0.95)
    assert low < 0.5 < high and high - low < 0.3
    low, high = law.interval([1e20, 1e21])
    assert np.all(low < law.predict([1e20, 1e21])) and np.all(law.predict([1e20, 1e21]) < high)


def test_marin_comma_exponent(comma):
    c, n, loss, tokens = comma
    law = fit_isoflop(c, n, loss, num_examples=tokens)
    assert law.exponent == pytest.approx(0.405, abs=0.001)
    assert len(law.budgets) == 7 and law.flags == ()
    # FLOPs are not exactly 6 N D there, so that the two exponents do not sum to one.
    assert law.data_exponent == pytest.approx(0.564, abs=0.002)


def test_chinchilla_by_parabolas_and_by_the_law(chinchilla):
    """The digitised FLOPs scatter around nine budgets; the rest of the runs belong to none."""
    n, d, loss, c = chinchilla
    kept = np.argsort(loss)[:-5]
    law = fit_isoflop(c[kept], n[kept], loss[kept])
    assert law.exponent == pytest.approx(0.510, abs=0.002)
    aims = [6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21]
    assert len(law.budgets) == len(aims)
    np.testing.assert_allclose([b.flops for b in law.budgets], aims, rtol=0.1)
    aimed = fit_isoflop(c[kept], n[kept], loss[kept], budgets=aims, tolerance=0.1)
    assert aimed.exponent == pytest.approx(0.510, abs=0.002)
    parametric = fit_parametric(n, d, loss, drop_highest=5, resamples=0)
    gap = parametric.exponent - law.exponent
    assert 0.002 < gap < 0.04


def test_parabolas_that_have_no_say_are_flagged():
    c, n, loss = planted_isoflop()
    best = 2 * c**0.5
    rows = (c > 1e18) | (n < best)  # the smallest budget: one side of the optimum only
    law = fit_isoflop(c[rows], n[rows], loss[rows], resamples=50)
    assert any("beyond the largest" in flag for flag in law.budgets[0].flags)
    assert any("1 of 4 optima" in flag for flag in law.flags)
    bent = np.where(c == 1e18, 5 - 0.05 * np.log(n / best / 3) ** 2, loss)
    law = fit_isoflop(c, n, bent, resamples=50)
    assert not law.budgets[0].is_used and "curvature" in law.budgets[0].flags[0]
    assert law.exponent == pytest.approx(0.5, abs=1e-9)
    json.dumps(law.to_dict(), allow_nan=False)


def test_budgets_are_found_in_scattered_flops():
    generator = np.random.default_rng(0)
    c = np.log(np.repeat([1e18, 3e18, 1e19], 8)) + generator.uniform(-0.1, 0.1, 24)
    n = np.tile(np.arange(8.0), 3)
    order = generator.permutation(24)
    found = find_budgets(c[order], n[order], 0.15)
    assert [sorted(order[rows] // 8) for rows in found] == [[0] * 8, [1] * 8, [2] * 8]


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (slice(0, 7), {}, "a single budget, C=1e\\+18"),
        (slice(0, 28, 7), {}, "no budget among 4 runs has 3 sizes"),
        (slice(None), {"num_params": np.full(28, 1e8)}, "a single size, N=1e\\+08"),
        (slice(None), {"loss": np.zeros(28)}, "loss must be positive"),
        (slice(None), {"tolerance": 0.0}, "tolerance=0"),
    ],
)
def test_isoflop_says_what_is_missing(rows, change, message):
    c, n, loss = planted_isoflop()
    arguments = {"flops": c[rows], "num_params": n[rows], "loss": loss[rows]} | change
    with pytest.raises(InputError, match=message):
        fit_isoflop(**arguments)


# Shapes


def planted_shapes(noise):
    """f with a = .6, b = .5, c = .4: s = .3636."""
    x, t = (g.ravel() for g in np.meshgrid(np.geomspace(128, 4096, 8), np.geomspace(1, 300, 6)))
    f = 3 * x**-0.6 + (0.004 * x**0.5 + 0.1) * t**-0.4 + 0.1
    return x, t, f * np.exp(np.random.default_rng(1).normal(0, noise, len(x)))


def test_planted_shape_law_comes_back():
    x, t, f = planted_shapes(0.0)
    law = fit_shape(x, t, f, resamples=0)
    assert law.exponent == pytest.approx(0.4 / 1.1, rel=0.02)
    np.testing.assert_allclose(law.predict(x, t), f, rtol=1e-4)
    best = (3 * 0.6 * 30**0.4 / (0.004 * 0.5)) ** (1 / 1.1)
    np.testing.assert_allclose(law.optimum(30.0), best, rtol=0.02)
    # The formula's optimum is the prediction's.
    grid = np.geomspace(64, 8192, 4001)
    lowest = grid[law.predict(grid, 30.0).argmin()]
    np.testing.assert_allclose(law.optimum(30.0), lowest, rtol=0.01)


def test_shape_intervals_cover_the_planted_optimum():
    x, t, f = planted_shapes(0.003)
    law = fit_shape(x, t, f, resamples=60)
    low, high = law.exponent_interval(0.95)
    assert low < 0.4 / 1.1 < high
    low, high = law.interval([3.0, 30.0], 0.95)
    best = (3 * 0.6 * np.array([3.0, 30.0]) ** 0.4 / (0.004 * 0.5)) ** (1 / 1.1)
    assert np.all((low < best) & (best < high))
    assert law.num_agreeing >= 2
    json.dumps(law.to_dict(), allow_nan=False)


def test_a_loss_that_only_falls_with_the_shape_has_no_optimum():
    x, t, _ = planted_shapes(0.0)
    f = (3 * x**-0.6 + t**-0.4 + 0.1) * np.exp(np.random.default_rng(2).normal(0, 0.01, len(x)))
    law = fit_shape(x, t, f, resamples=60)
    assert law.flags and law.not_identified


def test_published_shape_follows_from_the_starting_shape():
    """SoViT: (608, 10, 928) at tau = 1.1e3 gives about 1015, 28.5, 3750; printed 1152, 27, 4304."""
    shape = scale_shape(608, 10, 928, 1.1e3)
    assert shape.width == pytest.approx(1015, abs=32) and shape.width % shape.num_heads == 0
    assert shape.depth in (28, 29)
    assert shape.mlp_dim == pytest.approx(3750, abs=40)
    same = scale_shape(768, 12, 3072, 1.0)
    assert (same.width, same.depth, same.mlp_dim, same.num_heads) == (768, 12, 3072, 12)
    with pytest.raises(InputError, match="needed"):
        scale_shape(768, 12, 3072, 10.0, exponents={"width": 0.2})
    with pytest.raises(InputError, match="factor must be above 0"):
        scale_shape(768, 12, 3072, -1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape_values": np.full(48, 256.0)}, "3 different values, got 1: 256"),
        ({"scale": np.full(48, 256.0)}, "3 different scales.*got 1"),
        ({"loss": np.r_[np.full(47, 1.0), np.inf]}, r"47 \(inf\)"),
    ],
)
def test_shape_law_says_what_is_missing(change, message):
    x, t, f = planted_shapes(0.0)
    with pytest.raises(InputError, match=message):
        fit_shape(**({"shape_values": x, "scale": t, "loss": f} | change))


# Published fits


@pytest.fixture
def reproductions(root):
    path = root / "benchmarks" / "scaling_reproductions.py"
    spec = importlib.util.spec_from_file_location("scaling_reproductions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tied_exponents_predict_over_trained_runs_and_free_ones_less_well(test_data):
    """Gadre et al. 2024: fitted on 32 runs up to 411M, asked for 1.4B, 1.4B at 32x, 6.9B."""
    rows = read(test_data / "scaling" / "overtraining_rpj.csv")
    n, d, loss = (
        np.array([float(row[key]) for row in rows]) for key in ("params", "tokens", "val:c4_val")
    )
    small = n < 4.2e8
    errors = {}
    for is_tied in (True, False):
        law = fit_parametric(n[small], d[small], loss[small], tie_exponents=is_tied, resamples=0)
        errors[is_tied] = 100 * (law.predict(n[~small], d[~small]) / loss[~small] - 1)
    np.testing.assert_allclose(errors[True], [0.10, 0.12, 0.31], atol=0.015)
    assert np.abs(errors[False]).max() > 2.5


def test_openclip_frontier(reproductions, test_data):
    rows = read(test_data / "scaling" / "openclip_imagenet1k.csv")
    for data, exponent, level in (("LAION", -0.111, 5.86), ("WIT", -0.164, 23.2)):
        chosen = [row for row in rows if data in row["upstream_dataset"]]
        c, accuracy = reproductions.columns(chosen, "gmacs_total", "acc1")
        front = reproductions.best_of_bins(c, 1 - accuracy, 5)
        found = reproductions.line(c[front], 1 - accuracy[front])
        assert found[0] == pytest.approx(exponent, abs=5e-4)
        assert found[1] == pytest.approx(level, rel=0.01)
    laion = [row for row in rows if "LAION" in row["upstream_dataset"]]
    c, accuracy = reproductions.columns(laion, "gmacs_total", "acc1")
    assert reproductions.line(c, 1 - accuracy)[0] == pytest.approx(-0.101, abs=5e-4)


def test_lower_hull_lies_below_all_points(reproductions):
    generator = np.random.default_rng(0)
    x = np.exp(generator.uniform(0, 5, 200))
    y = x**-0.3 * np.exp(generator.exponential(0.3, 200))
    hull = reproductions.lower_hull(x, y)
    assert np.all(np.diff(np.log(y[hull])) < 0)
    inside = x <= x[hull[-1]]
    below = np.interp(np.log(x[inside]), np.log(x[hull]), np.log(y[hull]))
    assert np.all(below <= np.log(y[inside]) + 1e-12)
