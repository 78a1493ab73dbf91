import json
import runpy

import jax
import pytest

from vitjax import config as config_lib
from vitjax import experiment
from vitjax.errors import InputError
from vitjax.medical.settings import FLOORS, IMBALANCE, PRESETS
from vitjax.medical.slides.transfer import POOLS

TRANSFER = sorted(p.stem for p in (config_lib.config_folder() / "transfer").glob("*.py"))
CONFIGS = sorted(p.stem for p in config_lib.config_folder().glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_takes_one_abstract_step(name, native, tmp_path):
    config = config_lib.override(config_lib.load_config(name), ["batch_size=64"])
    if "teacher" in config.objective:  # of the student's images, classes and patches
        data, patch = config.data, config.model.patch_size
        patch = patch or int(config.model.shape.partition("/")[2])
        teacher = native(data.image_size, data.channels, config.model.num_classes, patch_size=patch)
        teacher.save(tmp_path / "teacher")
        config.objective.teacher = str(tmp_path / "teacher")
    exp = experiment.build(config)
    state, metrics = jax.eval_shape(exp.train_step, exp.abstract_state, exp.abstract_batch)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert describe(state) == describe(exp.abstract_state)
    assert metrics["loss"].shape == ()
    config_lib.build_all(config.data.transforms, image_size=config.data.image_size)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_says_where_it_runs_and_what_to_expect(name, root):
    text = runpy.run_path(str(root / "configs" / f"{name}.py"))["__doc__"]
    for word in (f"vitjax train --config={name}", "Runs on:", "Expected:", "un by us"):
        assert word in text, word


@pytest.mark.parametrize("name", TRANSFER)
def test_every_transfer_config_names_a_reader_and_known_settings(name, root):
    config = config_lib.load_config(f"transfer/{name}")
    key = "slides" if config.slides.target else "cohort"
    block = config_lib.plain(config[key])
    config_lib.resolve(block.pop("target"))
    flag = "pneumoniamnist.npz"  # a name that the reader knows
    block = {k: flag if k in ("root", "path") else v for k, v in block.items()}
    with pytest.raises(InputError, match=flag):
        config_lib.build({"target": config[key]["target"]} | block)
    assert set(config.presets) <= {*(POOLS if key == "slides" else PRESETS)} and set(
        config.floors
    ) <= set(FLOORS)
    assert config.imbalance in IMBALANCE
    text = runpy.run_path(str(root / "configs" / "transfer" / f"{name}.py"))["__doc__"]
    for word in (f"vitjax transfer --config=transfer/{name}", "The data:", "Runs on:", "by us"):
        assert word in text, word


def test_configs_that_ship():
    wanted = {"quickstart", "cifar10", "vit_s16_i1k", "vit_b16_i21k", "vit_l16_jft", "vit_22b"}
    assert wanted <= set(CONFIGS)


def test_a_config_is_found_by_name_and_by_path(root):
    for name in ("quickstart", "configs/quickstart.py", str(root / "configs" / "quickstart.py")):
        assert config_lib.load_config(name).data.image_size == 8


def test_overrides_keep_types():
    config = config_lib.load_config("quickstart")
    config_lib.override(
        config,
        ["optimizer.peak_lr=1", "seed=3", "optimizer.freeze=('head/.*',)", "augment.0.pixels=2",
         "model.shape=Ti/2", "evals.test.batch_size=10", "optimizer.ema_decay=none"],
    )  # fmt: skip
    assert isinstance(config.optimizer.peak_lr, float)
    assert (config.seed, config.optimizer.freeze) == (3, ("head/.*",))
    assert (config.augment[0]["pixels"], config.model.shape) == (2, "Ti/2")
    assert (config.evals.test.batch_size, config.optimizer.ema_decay) == (10, None)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("optimiser.peak_lr=1", "unknown config key 'optimiser'; did you mean 'optimizer'"),
        ("optimizer.peek_lr=1", "did you mean 'peak_lr'"),
        ("batch_size=1.5", "type float; it must be int"),
        ("batch_size=many", "type str; it must be int"),
        ("model.qk_norm=1", "it must be bool"),
        ("optimizer=3", "is a block"),
        ("augment.2.pixels=1", "allowed: 0, 1"),
        ("seed", "needs a value"),
    ],
)
def test_wrong_overrides_are_explained(assignment, words):
    with pytest.raises(InputError, match=words):
        config_lib.override(config_lib.load_config("quickstart"), [assignment])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"target": "vitjax.data.augment:RandomFlop"}, "did you mean 'RandomFlip'"),
        ({"target": "vitjax.data.augmentt:RandomFlip"}, "cannot import"),
        ({"target": "RandomFlip"}, "package.module:name"),
        ({"target": "vitjax.data.augment:RandomShift", "pixel": 1}, "did you mean 'pixels'"),
        ({"target": "vitjax.data.augment:RandomShift"}, "needs the argument 'pixels'"),
        ({"target": "vitjax.data.augment:RandomShift", "pixels": 0}, "must be positive"),
    ],
)
def test_wrong_blocks_are_explained(spec, words):
    with pytest.raises(InputError, match=words):
        config_lib.build(spec)


def test_one_root_serves_training_and_evaluation():
    config = config_lib.override(config_lib.load_config("cifar10"), ["data.root=x.zip"])
    assert config.data.source.path == config.evals.test.source.path == "x.zip"
    again = config_lib.from_json(json.dumps(config_lib.plain(config)))
    assert config_lib.differences(config_lib.plain(config), config_lib.plain(again)) == []
