"""Neighbours, linear probes and few shots on features, against plain implementations."""

import types

import jax
import numpy as np
import pytest
import scipy.special
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

from vitjax.data.loader import Loader
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources.arrays import Arrays, Digits
from vitjax.errors import InputError
from vitjax.evals import evaluation, features, few_shot, linear_probe, ridge
from vitjax.evals.knn import KNN, unit
from vitjax.parallel import make_mesh

STATE = types.SimpleNamespace(eval_params={}, extra={})
SIDE = 4
PREPROCESS = Preprocess(SIDE, 1)


class Pixels:
    """An objective whose features are the pixels as the model gets them."""

    def embed(self, params, extra, batch):
        return batch["images"].reshape(len(batch["images"]), -1)


def make_loader(count, seed, classes=3, labels=None, **options):
    """Random images, a little of each one's class in them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count) if labels is None else labels
    images = generator.integers(0, 200, (count, SIDE, SIDE))
    images[:, 0, 0] += 18 * labels
    names = tuple(f"c{i}" for i in range(classes))
    source = Arrays(images.astype(np.uint8), labels, name="made", class_names=names)
    return Loader(source, PREPROCESS, num_threads=0, **options)


def plain_features(loader):
    """What `Pixels` gives of a loader's images, by NumPy."""
    source = loader.source
    x = (source.images.reshape(len(source), -1).astype(np.float64) / 255 - 0.5) / 0.5
    return x, source.labels


@pytest.fixture(scope="module", params=[1, 8], ids=["one", "eight"])
def mesh(request):
    return make_mesh({"fsdp": request.param}, jax.devices()[: request.param])


def test_neighbours_are_exact_and_vote_by_weight(mesh):
    train, test = make_loader(203, 0), make_loader(71, 1)
    sizes = (1, 5, 20)
    evaluator = KNN(Pixels(), test, train, mesh, batch_size=32, neighbours=sizes, block_size=24)
    found = evaluator(STATE)
    (x, labels), (queries, truth) = plain_features(train), plain_features(test)
    x, queries = unit(x).astype(np.float64), unit(queries).astype(np.float64)
    nearest = NearestNeighbors(n_neighbors=20, algorithm="brute").fit(x).kneighbors(queries)[1]
    for k in sizes:
        votes = np.zeros((len(queries), 3))
        for i, of_one in enumerate(nearest[:, :k]):
            np.add.at(votes[i], labels[of_one], np.exp(x[of_one] @ queries[i] / 0.07))
        assert found[f"accuracy_k{k}"] == pytest.approx((votes.argmax(1) == truth).mean(), abs=1e-9)
    shares = [found[f"accuracy_k{k}"] for k in sizes]
    assert found["accuracy"] == max(shares)
    assert found["best_k"] == sizes[int(np.argmax(shares))]
    assert found["examples"] == 71


def test_weights_matter_to_the_vote():
    """Two far neighbours of one class lose against a near one of another."""
    near, far = np.array([[250, 10]]), np.array([[250, 240], [250, 241]])
    images = np.concatenate([near, far]).reshape(3, 1, 2)
    pixels = np.repeat(np.repeat(images, 2, axis=2), 4, axis=1).astype(np.uint8)
    train = Loader(Arrays(pixels, np.array([0, 1, 1]), name="x"), PREPROCESS, num_threads=0)
    test = Loader(Arrays(pixels[:1], np.array([0]), name="x", class_names=("0", "1")), PREPROCESS,
                  num_threads=0)  # fmt: skip
    mesh = make_mesh({"fsdp": 8})
    sharp = KNN(Pixels(), test, train, mesh, neighbours=(3,))(STATE)
    flat = KNN(Pixels(), test, train, mesh, neighbours=(3,), temperature=1e4)(STATE)
    assert (sharp["accuracy"], flat["accuracy"]) == (1.0, 0.0)


def test_what_pads_the_training_set_never_votes():
    """Zeros would be nearer than images that point the other way."""
    dark, light = (np.full((3, SIDE, SIDE), v, np.uint8) for v in (0, 255))
    train = Arrays(dark, np.zeros(3, int), name="x", class_names=("a", "b"))
    test = Arrays(light, np.zeros(3, int), name="x", class_names=("a", "b"))
    loaders = [Loader(s, PREPROCESS, num_threads=0) for s in (test, train)]
    found = KNN(Pixels(), *loaders, make_mesh({"fsdp": 8}), neighbours=(3,))(STATE)
    assert found["accuracy"] == 1.0


def test_ridge_is_scikit_learns(mesh):
    train = make_loader(157, 2)
    x, labels = plain_features(train)
    held = ridge.hold_out(len(x))
    assert held.sum() == 15
    y = np.eye(3)[labels]
    parts = [ridge.take_both(*(jax.numpy.asarray(v[rows]) for v in (
        x.astype(np.float32), y.astype(np.float32), np.ones(len(x), np.float32), held)))
        for rows in (slice(0, 50), slice(50, None))]  # fmt: skip
    penalties = (1e-3, 0.1, 10.0)
    chosen = ridge.choose(parts, penalties)
    errors = []
    for penalty in penalties:
        fitted = plain_ridge(x[~held], y[~held], penalty)
        errors.append(((fitted(x[held]) - y[held]) ** 2).sum(1).mean())
    assert chosen.penalty == penalties[int(np.argmin(errors))]
    expected = plain_ridge(x, y, chosen.penalty)(x)
    np.testing.assert_allclose(chosen.linear(x), expected, atol=1e-5)
    kept = plain_ridge(x[~held], y[~held], chosen.penalty)(x)
    np.testing.assert_allclose(chosen.on_kept(x), kept, atol=1e-5)
    assert np.abs(kept - expected).max() > 1e-3
    error = ridge.squared_error(chosen.on_kept, ridge.join([p[1] for p in parts]))
    assert error == pytest.approx(min(errors), rel=1e-5)

    probe = linear_probe.LinearProbe(
        Pixels(), make_loader(60, 3), train, mesh, penalties=penalties, epochs=1
    )
    found = probe(STATE)
    queries, truth = plain_features(make_loader(60, 3))
    right = plain_ridge(x, y, chosen.penalty)(queries).argmax(1) == truth
    assert found["ridge_penalty"] == chosen.penalty
    assert found["ridge_accuracy"] == pytest.approx(right.mean(), abs=1e-9)


def plain_ridge(x, y, penalty):
    """Scikit-learn's on standardised features; its penalty is of the sum over rows."""
    mean, scale = x.mean(0), x.std(0)
    fitted = Ridge(alpha=penalty * len(x)).fit((x - mean) / scale, y)
    return lambda z: fitted.predict((z - mean) / scale)


def test_a_feature_that_is_always_the_same_counts_for_nothing():
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.normal(size=(40, 2)), np.full((40, 1), 7.0)], 1)
    parts = [ridge.take_both(*map(jax.numpy.asarray, (
        x.astype(np.float32), x[:, :1].astype(np.float32), np.ones(40, np.float32),
        np.arange(40) % 4 == 0)))]  # fmt: skip
    linear = ridge.choose(parts).linear
    np.testing.assert_allclose(linear.kernel[:, 0], [1, 0, 0], atol=1e-4)


def plain_sgd(x, labels, rate, epochs, size):
    """One softmax regression, step by step."""
    kernel, bias = np.zeros((x.shape[1], 3)), np.zeros(3)
    speed = [np.zeros_like(kernel), np.zeros_like(bias)]
    generator, step, steps = np.random.default_rng(0), 0, -(-len(x) // size)
    for _ in range(epochs):
        order = generator.permutation(len(x))
        for start in range(0, len(x), size):
            rows = order[start : start + size]
            slope = scipy.special.softmax(x[rows] @ kernel + bias, axis=1) - np.eye(3)[labels[rows]]
            slope /= len(rows)
            speed = [0.9 * v + g for v, g in zip(speed, (x[rows].T @ slope, slope.sum(0)),
                                                 strict=True)]  # fmt: skip
            now = rate * 0.5 * (1 + np.cos(np.pi * step / (epochs * steps)))
            kernel, bias = kernel - now * speed[0], bias - now * speed[1]
            step += 1
    return kernel, bias


def test_a_sweep_is_a_plain_loop_for_each_rate(mesh):
    x, labels = plain_features(make_loader(83, 4))
    sweep = linear_probe.Sweep(mesh, 3, rates=(0.05, 0.5), epochs=3, batch_size=16)
    calls = []
    found = sweep(x.astype(np.float32), labels, lambda: calls.append(1))
    assert len(calls) == 3
    for linear, rate in zip(found, (0.05, 0.5), strict=True):
        kernel, bias = plain_sgd(x, labels, rate, 3, 16)
        np.testing.assert_allclose(linear.kernel, kernel, atol=2e-5)
        np.testing.assert_allclose(linear.bias, bias, atol=2e-5)


def test_the_probe_reads_digits_and_chooses_on_training_images():
    train, test = (Loader(Digits(split), Preprocess(8, 1), num_threads=0)
                   for split in ("train", "test"))  # fmt: skip
    mesh = make_mesh({"fsdp": 8})
    rates = (1e-5, 0.1)
    found = linear_probe.LinearProbe(Pixels(), test, train, mesh, rates=rates, epochs=5)(STATE)
    assert found["sgd_accuracy"] > 0.9 and found["ridge_accuracy"] > 0.9
    assert found["sgd_rate"] == 0.1
    assert found["accuracy"] in (found["sgd_accuracy"], found["ridge_accuracy"])
    assert len(load_digits().target) - 1437 == found["examples"]

    x, labels = plain_features_of_digits(train)
    is_held = ridge.hold_out(len(x))
    sweep = linear_probe.Sweep(mesh, 10, rates=rates, epochs=5)
    mean, scale = x[~is_held].mean(0), x[~is_held].std(0) + 1e-6
    tried = sweep((x[~is_held] - mean) / scale, labels[~is_held])
    held = features.FeatureSet((x[is_held] - mean) / scale, labels[is_held])
    shares = [linear_probe.accuracy(linear, held) for linear in tried]
    assert int(np.argmax(shares)) == 1
    scored, truth = plain_features_of_digits(test)
    scored = features.FeatureSet((scored - mean) / scale, truth)
    assert found["sgd_accuracy"] == pytest.approx(
        linear_probe.accuracy(tried[1], scored), abs=0.003
    )


def plain_features_of_digits(loader):
    x = (loader.source.images.reshape(len(loader.source), -1).astype(np.float32) / 255 - 0.5) / 0.5
    return x, loader.source.labels


@pytest.mark.parametrize("shots", [3, 12], ids=["fewer rows than columns", "more"])
def test_few_shot_is_big_visions(shots, mesh):
    """Its formula, with the inverse that it decomposes written out."""
    labels = np.arange(90) % 3
    train, test = make_loader(90, 5, labels=labels), make_loader(50, 6)
    found = few_shot.FewShot(Pixels(), test, train, mesh, shots=(shots,), num_seeds=2)(STATE)
    (x, labels), (queries, truth) = plain_features(train), plain_features(test)
    shares = []
    for seed in range(2):
        generator = np.random.default_rng(seed)
        rows = [generator.permutation(np.where(labels == c)[0])[:shots] for c in range(3)]
        rows = np.concatenate(rows)
        mean, scale = x[rows].mean(0), x[rows].std(0) + 1e-5
        a = np.pad((x[rows] - mean) / scale, ((0, 0), (0, 1)), constant_values=100.0)
        y = 2.0 * np.eye(3)[labels[rows]] - 1
        weights = np.linalg.inv(a.T @ a + 1024 * np.eye(a.shape[1])) @ a.T @ y
        b = np.pad((queries - mean) / scale, ((0, 0), (0, 1)), constant_values=100.0)
        shares.append(((b @ weights).argmax(1) == truth).mean())
        mine = few_shot.least_squares(a, labels[rows], 3, 1024.0)
        np.testing.assert_allclose(mine, weights, atol=1e-8)
    assert shares[0] != shares[1]
    assert found[f"accuracy_{shots}shot"] == pytest.approx(np.mean(shares), abs=1e-9)


def test_few_shot_standardises_and_its_bias_is_hardly_held_back():
    """Seen where classes are not drawn alike."""
    generator = np.random.default_rng(3)
    labels = np.repeat([0, 1], [30, 14])
    x = generator.normal(size=(44, 5)) * 10 + 3 + labels[:, None] * 4
    queries = generator.normal(size=(400, 5)) * 10 + 5
    truth = generator.integers(0, 2, 400)
    few, scored = features.FeatureSet(x, labels), features.FeatureSet(queries, truth)
    shares = []
    for bias in (100.0, 1.0):
        mean, scale = x.mean(0), x.std(0) + 1e-5
        a, b = (np.pad((v - mean) / scale, ((0, 0), (0, 1)), constant_values=bias)
                for v in (x, queries))  # fmt: skip
        y = 2.0 * np.eye(2)[labels] - 1
        weights = np.linalg.inv(a.T @ a + 500 * np.eye(6)) @ a.T @ y
        shares.append(((b @ weights).argmax(1) == truth).mean())
    assert shares[0] != shares[1]
    assert few_shot.score(few, scored, 2, 500.0) == pytest.approx(shares[0], abs=1e-9)


def test_evaluators_of_one_evaluation_share_the_features_and_no_longer():
    train, test = make_loader(60, 7), make_loader(20, 8)
    mesh, counted = make_mesh({"fsdp": 8}), []
    read = train.eval_batches
    train.eval_batches = lambda *a, **k: counted.append(1) or read(*a, **k)
    objective = Pixels()
    evaluators = {
        "knn": KNN(objective, test, train, mesh, neighbours=(3,)),
        "few": few_shot.FewShot(objective, test, train, mesh, shots=(2,)),
    }
    results, pictures = evaluation.run(evaluators, STATE)
    assert len(counted) == 1 and not pictures
    assert {"eval/knn/accuracy_k3", "eval/few/accuracy_2shot"} <= set(results)
    evaluation.run(evaluators, STATE)
    assert len(counted) == 2
    alone = {f"eval/{k}/{m}": v for k, e in evaluators.items() for m, v in e(STATE).items()}
    assert alone == results and len(counted) == 4


def test_an_evaluation_can_be_left_between_epochs_and_blocks():
    class Left(Exception):
        pass

    count = 0

    def between():
        nonlocal count
        count += 1
        if count > allowed:
            raise Left

    train, test = make_loader(60, 7), make_loader(20, 8, between=between)
    mesh = make_mesh({"fsdp": 8})
    for evaluator in (
        KNN(Pixels(), test, train, mesh, neighbours=(3,), block_size=8),
        linear_probe.LinearProbe(Pixels(), test, train, mesh),
        few_shot.FewShot(Pixels(), test, train, mesh, shots=(2,)),
    ):
        count, allowed = 0, 2  # the first is the only batch
        with pytest.raises(Left):
            evaluator(STATE)


def test_what_cannot_work_is_said_at_once():
    train, test = make_loader(60, 7), make_loader(20, 8)
    mesh = make_mesh({"fsdp": 8})
    given = (Pixels(), test, train, mesh)
    with pytest.raises(InputError, match=r"neighbours must be in 1 to 60.*\(10, 61\)"):
        KNN(*given, neighbours=(10, 61))
    with pytest.raises(InputError, match="temperature must be positive, got 0"):
        KNN(*given, temperature=0)
    with pytest.raises(InputError, match="block_size must be at least 1, got 0"):
        KNN(*given, block_size=0)
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        KNN(*given, batch_size=0)
    with pytest.raises(InputError, match="penalties must be positive"):
        linear_probe.LinearProbe(*given, penalties=(0.0,))
    with pytest.raises(InputError, match="rates must be positive"):
        linear_probe.LinearProbe(*given, rates=())
    with pytest.raises(InputError, match="epochs must be at least 1, got 0"):
        linear_probe.LinearProbe(*given, epochs=0)
    one = make_loader(1, 0)
    with pytest.raises(InputError, match="has 1 image; a probe needs at least 2"):
        linear_probe.LinearProbe(Pixels(), test, one, mesh)
    labels = np.array([0] * 10 + [1] * 4 + [2] * 10)
    few = make_loader(24, 0, labels=labels)
    with pytest.raises(InputError, match=r"shots=5, but class 1 \('c1'\) has 4 training images"):
        few_shot.FewShot(Pixels(), test, few, mesh, shots=(5,))
    with pytest.raises(InputError, match="shots must be numbers of at least 1"):
        few_shot.FewShot(*given, shots=(0, 5))
    several = make_loader(20, 8, max_labels=3)
    with pytest.raises(InputError, match="needs one label an image"):
        KNN(Pixels(), several, train, mesh)
    with pytest.raises(InputError, match="source has the classes c0, c1, but train_source has c0"):
        KNN(Pixels(), make_loader(20, 8, classes=2), train, mesh)
