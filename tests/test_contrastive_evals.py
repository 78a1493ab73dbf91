"""Zero-shot classification and retrieval against plain NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vitjax import config as config_lib
from vitjax import parallel
from vitjax.data.loader import Loader
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources.pairs import Captioned, Pairs
from vitjax.data.text import ByteTokenizer
from vitjax.errors import InputError
from vitjax.evals.retrieval import Ranks, Retrieval
from vitjax.evals.zeroshot import ZeroShot, ranks_of, scores
from vitjax.objectives.contrastive import normalised

DIGITS = {"target": "vitjax.data.sources.arrays:Digits", "split": "test"}
TOKENIZER = ByteTokenizer(16)


class Toy:
    """Towers of one matrix each, which NumPy can follow."""

    def embed_images(self, params, images):
        flat = images.reshape(images.shape[0], -1)
        return normalised(jnp.tanh(flat @ params["image"]))

    def embed_texts(self, params, texts):
        return normalised(jnp.tanh(texts.astype(jnp.float32) / 100 @ params["text"]))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    sizes = {"image": (64, 12), "text": (16, 12)}
    return {k: rng.normal(size=s).astype(np.float32) for k, s in sizes.items()}


def embed(params, source, texts, preprocess):
    images = np.stack([preprocess.fit(np.asarray(source[i]["image"]).reshape(8, 8, 1))
                       for i in range(len(source))])  # fmt: skip
    scaled = (images.reshape(len(images), -1) / 255.0 - 0.5) / 0.5
    tokens = np.stack([TOKENIZER(text) for text in texts]) / 100
    return unit(np.tanh(scaled @ params["image"])), unit(np.tanh(tokens @ params["text"]))


def state_of(params):
    return types.SimpleNamespace(eval_params=params, extra={})


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 4, 1)], ids=["1", "2-4"])
def test_zero_shot_is_that_of_numpy(params, mesh):
    devices = jax.devices()[: int(np.prod(mesh))]
    mesh = parallel.make_mesh(dict(zip(parallel.AXES, mesh, strict=True)), devices)
    preprocess, source = Preprocess(8, 1), config_lib.build(DIGITS)
    loader = Loader(source, preprocess, tokenizer=TOKENIZER, num_threads=0)
    templates, names = ("{} is", "a {}", "it: {}"), tuple("qwertyuiop")
    evaluate = ZeroShot(Toy(), loader, mesh, 100, templates, names)
    found = evaluate(state_of(params))
    texts = [t.format(name) for name in names for t in templates]
    images, texts = embed(params, source, texts, preprocess)
    classes = unit(texts.reshape(10, 3, -1).mean(1))
    np.testing.assert_allclose(evaluate.classes(params), classes, atol=1e-5)
    order = np.argsort(-(images @ classes.T), axis=1, kind="stable")
    right = order == source.labels[:, None]
    assert found["accuracy"] == pytest.approx(right[:, 0].mean(), abs=1e-9)
    assert found["top5_accuracy"] == pytest.approx(right[:, :5].sum(1).mean(), abs=1e-9)
    assert found["accuracy"] < found["top5_accuracy"] < 1 and found["examples"] == 360


def test_equal_classes_are_no_luck_and_unread_images_do_not_count():
    same = np.ones((20, 4), np.float32)
    labels = np.arange(20) % 10
    assert (ranks_of(same, same[:10], labels) == labels).all()
    found = scores(same, same[:10], labels, labels != 0)
    assert found == {"accuracy": 0.0, "top5_accuracy": pytest.approx(4 / 9), "examples": 18}


def numpy_ranks(images, texts, owners):
    logits = images @ texts.T
    by_image = np.argsort(-logits, axis=1, kind="stable")
    of_images = np.array([np.flatnonzero(owners[row] == i)[0] for i, row in enumerate(by_image)])
    by_text = np.argsort(-logits.T, axis=1, kind="stable")
    return of_images, (by_text == owners[:, None]).argmax(1)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("block", [8, 16, 1024])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_ranks_are_those_of_sorting_everything(devices, block, kind):
    """With several texts an image, in an order of their own, and with ties."""
    rng = np.random.default_rng(1)
    owners = rng.permutation(np.concatenate([np.arange(37), rng.integers(0, 37, 50)]))
    draw = rng.normal if kind == "normal" else lambda size: rng.integers(-1, 2, size)
    images = draw(size=(37, 6)).astype(np.float32)
    texts = (draw(size=(87, 6)) + images[owners]).astype(np.float32)
    mesh = parallel.make_mesh({"fsdp": -1}, jax.devices()[:devices])
    found = Ranks(mesh, block)(images, texts, owners)
    wanted = numpy_ranks(images, texts, owners)
    for ours, theirs in zip(found, wanted, strict=True):
        # Of an image's own texts the best counts, so that only wrong ones are in front of it.
        np.testing.assert_array_equal(ours, theirs)
    assert wanted[0].max() > 2 and wanted[1].max() > 5


@pytest.fixture
def pairs(tmp_path):
    rng, lines = np.random.default_rng(2), []
    for i in range(21):
        Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(tmp_path / f"{i}.png")
        captions = [f"{i} {rng.integers(0, 999)} {k}" for k in range(1 + i % 3)]
        quoted = ", ".join(f'"{text}"' for text in captions)
        lines.append(f'{{"image": "{i}.png", "caption": [{quoted}]}}')
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_retrieval_is_that_of_numpy_and_leaves_out_what_cannot_be_read(params, pairs):
    mesh = parallel.make_mesh({"fsdp": -1}, jax.devices())
    preprocess, source = Preprocess(8, 1), Pairs(str(pairs / "pairs.jsonl"))
    images = [np.asarray(Image.open(pairs / f"{i}.png")) for i in range(21)]
    (pairs / "5.png").write_bytes(b"broken")
    loader = Loader(source, preprocess, tokenizer=TOKENIZER, num_threads=0,
                    max_unreadable_fraction=1.0)  # fmt: skip
    found = Retrieval(Toy(), loader, mesh, 8, 16)(state_of(params))
    kept = [i for i in range(21) if i != 5]
    captions = [source.all_captions()[i] for i in kept]
    owners = np.repeat(np.arange(20), [len(own) for own in captions])
    readable = [{"image": images[i]} for i in kept]
    left, right = embed(params, readable, [t for own in captions for t in own], preprocess)
    of_images, of_texts = numpy_ranks(left, right, owners)
    for k in (1, 5, 10):
        assert found[f"image_to_text_recall_{k}"] == pytest.approx((of_images < k).mean())
        assert found[f"text_to_image_recall_{k}"] == pytest.approx((of_texts < k).mean())
    assert (found["examples"], found["texts"]) == (20, len(owners))
    assert 0 < found["text_to_image_recall_1"] < found["text_to_image_recall_10"] < 1


def test_what_an_evaluation_lacks_is_named(params):
    mesh = parallel.make_mesh({"fsdp": -1}, jax.devices())
    source, preprocess = config_lib.build(DIGITS), Preprocess(8, 1)

    def loader(source=source, **options):
        return Loader(source, preprocess, num_threads=0, **({"tokenizer": TOKENIZER} | options))

    with pytest.raises(InputError, match="SimpleNamespace has no text tower"):
        ZeroShot(types.SimpleNamespace(), loader(), mesh)
    with pytest.raises(InputError, match=r"needs data\.tokenizer"):
        ZeroShot(Toy(), loader(tokenizer=None), mesh)
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        ZeroShot(Toy(), loader(), mesh, 0)
    with pytest.raises(InputError, match="2 class_names for 10 classes"):
        ZeroShot(Toy(), loader(), mesh, class_names=("a", "b"))
    with pytest.raises(InputError, match="template 'x' must have one"):
        ZeroShot(Toy(), loader(), mesh, templates=("x",))
    with pytest.raises(InputError, match="needs one label an example"):
        ZeroShot(Toy(), loader(max_labels=2), mesh)
    with pytest.raises(InputError, match="Digits does not"):
        Retrieval(Toy(), loader(), mesh)
    with pytest.raises(InputError, match="block must be at least 1, got 0"):
        Retrieval(Toy(), loader(Captioned(DIGITS)), mesh, block=0)
