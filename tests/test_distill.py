"""Distillation: its terms against scipy, its teacher's place in the state, its runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config, use_one_device
from objective_runs import check_mesh, check_resume
from scipy.special import rel_entr, softmax

import vitjax
from vitjax import experiment, warm_start
from vitjax.checkpoints.store import read_contract
from vitjax.errors import InputError
from vitjax.objectives.distill import cosine_loss, soft_cross_entropy
from vitjax.train import train


def config_of(teacher, **objective):
    config = tiny_config(total_steps=4, checkpoint_every=2)
    config.unlock()
    config.model.update(width=16)
    config.objective = {
        "target": "vitjax.objectives.distill:Distill", "teacher": str(teacher)
    } | objective  # fmt: skip
    return config.lock()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        train(tiny_config(eval_every=0), workdir)
    return workdir


ALL = {"features_weight": 0.5, "tokens_weight": 0.5, "labels_weight": 0.3, "temperature": 2.0}


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("distill") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        train(config_of(teacher, **ALL), workdir)
    return workdir


def test_the_terms_are_the_plain_ones():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    plain = 4 * rel_entr(softmax(b / 2, axis=-1), softmax(a / 2, axis=-1)).sum(-1)
    found = soft_cross_entropy(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 2.0)
    np.testing.assert_allclose(found, plain, rtol=1e-4)
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    found = cosine_loss(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(found, 1 - cosines.mean(), rtol=1e-5)


def test_the_teacher_is_that_of_the_file_and_stays(teacher, finished):
    contract = read_contract(finished / "checkpoints/4")
    assert contract["weights"] == ["params", "model"]
    exp = experiment.build(config_of(teacher, **ALL), devices=jax.devices()[:1])
    state, weights = warm_start.first_state(exp), vitjax.load(teacher).params
    same = jax.tree.map(lambda a, b: (a == b).all(), state.extra["teacher"]["model"], weights)
    assert jax.tree.all(same)
    first, last = (read_contract(finished / f"checkpoints/{n}")["arrays"] for n in (2, 4))
    assert first["extra"] == last["extra"] and first["params"] != last["params"]


def test_a_student_equal_to_its_teacher_has_no_loss(teacher, monkeypatch):
    config = config_of(teacher, features_weight=0.0)
    config.model.width = 32
    config.init.checkpoint = str(teacher)
    exp = experiment.build(config, devices=jax.devices()[:1])
    state = warm_start.first_state(exp)
    batch = {"images": jax.random.normal(jax.random.key(0), (4, 8, 8, 1))}
    loss = jax.jit(exp.objective.loss)
    loss, (_, metrics) = loss(state.params, state.extra, batch, None)
    assert abs(float(loss)) < 1e-5 and metrics["agreement"] == 1


def test_the_teacher_sees_its_own_normalisation(teacher):
    sharp = {"temperature": 0.05}  # a loss that is not the small difference of large terms
    config = config_of(teacher, **sharp)
    config.data.mean, config.data.std = (0.1,), (0.7,)
    exp = experiment.build(config, devices=jax.devices()[:1])
    same = experiment.build(config_of(teacher, **sharp), devices=jax.devices()[:1])
    unit, losses = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1)), []
    for one in (exp, same):
        state = warm_start.first_state(one)
        assert not state.params["model"]["head"]["kernel"].any()  # a student that sees nothing yet
        batch = {"images": one.preprocess.normalise(unit)}
        losses.append(jax.jit(one.objective.loss)(state.params, state.extra, batch, None)[0])
    assert losses[0] > 1e-4
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_mesh_changes_nothing(teacher, finished):
    check_mesh(config_of(teacher, **ALL), finished, rtol=1e-4)


def test_it_resumes_exactly(teacher, finished, tmp_path, monkeypatch):
    check_resume(config_of(teacher, **ALL), finished, tmp_path / "run", monkeypatch)


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ({"logits_weight": 0.0}, {}, "needs objective.logits_weight"),
        ({"temperature": 0.0}, {}, "temperature"),
        ({"features_weight": -1.0}, {}, "features_weight"),
        ({}, {"data.image_size": 16}, "image_size=8"),
        ({}, {"model.num_classes": 7}, "the teacher has 10"),
        ({"tokens_weight": 1.0}, {"model.patch_size": 4}, "as many patches"),
    ],
)
def test_what_does_not_fit_is_refused(teacher, objective, changes, message):
    config = config_of(teacher, **objective)
    for name, value in changes.items():
        block, key = name.split(".")
        config[block][key] = value
    with pytest.raises(InputError, match=message):
        experiment.build(config, devices=jax.devices()[:1])


def test_without_a_teacher_it_says_so():
    with pytest.raises(InputError, match=r"objective\.teacher is not set"):
        experiment.build(config_of(""), devices=jax.devices()[:1])
