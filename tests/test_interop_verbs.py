"""`vitjax import` and `vitjax export` as a user types them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitjax
from vitjax import cli, state
from vitjax.errors import DamagedCheckpointError

FOLDERS = ("hf", "timm", "npz", "safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the quickstart, shrunk."""
    from conftest import tiny_config

    from vitjax import parallel
    from vitjax import train as train_lib

    patch = pytest.MonkeyPatch()
    make_mesh = parallel.make_mesh
    patch.setattr(
        parallel, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1])
    )
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    train_lib.train(tiny_config(total_steps=4), folder)
    patch.undo()
    return folder


def images(count=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)


@pytest.mark.parametrize("format", FOLDERS)
def test_a_run_goes_out_and_comes_back_the_same(format, run, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    assert cli.main(["export", f"--checkpoint={run}", f"--format={format}", f"--out={out}"]) == 0
    assert cli.main(["import", f"--source={out}", f"--out={back}"]) == 0
    assert "18,154 parameters" in capsys.readouterr().err
    first = vitjax.load(run)
    for place in (out, back):
        again = vitjax.load(place)
        np.testing.assert_array_equal(again.logits(images()), first.logits(images()))
        assert again.preprocess == first.preprocess and again.class_names == first.class_names
        assert again.loss_type == "softmax"
    card = (out / "README.md").read_text()
    for words in (
        "18,154 parameters",
        "1 channel",
        "| width | 32 |",
        "10: 0, 1, 2",
    ):
        assert words in card


def test_a_file_name_gives_one_file_and_its_card(run, tmp_path):
    for suffix in ("npz", "safetensors"):
        out = tmp_path / f"mine.{suffix}"
        assert (
            cli.main(["export", f"--checkpoint={run}", f"--format={suffix}", f"--out={out}"]) == 0
        )
        np.testing.assert_array_equal(
            vitjax.load(out).logits(images()), vitjax.load(run).logits(images())
        )
    found = {p.name for p in tmp_path.iterdir()}
    assert found == {"mine.npz", "mine.json", "mine.safetensors", "mine.md"}


def test_an_exported_folder_predicts(run, tmp_path):
    np.savez(tmp_path / "images.npz", images=images())
    cli.main(["export", f"--checkpoint={run}", "--format=hf", f"--out={tmp_path / 'hf'}"])
    rows = []
    for name in (run, tmp_path / "hf"):
        out = tmp_path / "predictions.csv"
        status = cli.main(
            [
                "predict",
                f"--checkpoint={name}",
                f"--images={tmp_path / 'images.npz'}",
                f"--out={out}",
            ]
        )
        assert status == 0
        rows.append(out.read_text())
    assert rows[0] == rows[1]


def test_predicting_compiles_once(run, tmp_path):
    """Batches are padded to one shape, and loading compiles nothing of the model."""
    np.savez(tmp_path / "images.npz", images=images(130))
    names = []
    logger = "jax._src.interpreters.pxla"
    import logging

    class Listen(logging.Handler):
        def emit(self, record):
            text = record.getMessage()
            if text.startswith("Compiling") and "<lambda>" in text:
                names.append(text)

    handler = Listen()
    logging.getLogger(logger).addHandler(handler)
    try:
        with jax.log_compiles():
            vision = vitjax.load(run)
            for start in (0, 64, 128):
                part = images(130)[start : start + 64]
                padded = np.pad(part, ((0, 64 - len(part)), (0, 0), (0, 0), (0, 0)))
                vision.logits(padded)
    finally:
        logging.getLogger(logger).removeHandler(handler)
    assert len(names) == 1, names


def test_a_dry_run_describes_and_writes_nothing(run, tmp_path, capsys):
    out = tmp_path / "a.npz"
    cli.main(["export", f"--checkpoint={run}", "--format=npz", f"--out={out}"])
    out.with_suffix(".json").unlink()
    before = sorted(tmp_path.iterdir())
    assert cli.main(["import", f"--source={out}", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert (
        "npz: big_vision, 18,154 parameters" in said and "note: npz holds no preprocessing" in said
    )
    assert sorted(tmp_path.iterdir()) == before


def test_import_takes_what_the_file_does_not_say(run, tmp_path):
    out = tmp_path / "a.npz"
    cli.main(["export", f"--checkpoint={run}", "--format=npz", f"--out={out}"])
    out.with_suffix(".json").unlink()
    status = cli.main([
        "import", f"--source={out}", f"--out={tmp_path / 'b'}", "--preprocess.mean=(0.3,)",
        "--preprocess.std=(0.38,)", "--preprocess.interpolation=bicubic",
        "--preprocess.resize=shorter_side", "--model.activation=gelu", "--image-size=12",
    ])  # fmt: skip
    assert status == 0
    found = vitjax.load(tmp_path / "b")
    assert found.preprocess.mean == (0.3,) and found.preprocess.image_size == 12
    assert found.config["activation"] == "gelu"
    assert found.contract["origin"]["file"] == "a.npz"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format=tf"], "unknown format 'tf'; did you mean 'hf'? allowed: npz, timm, hf"),
        (["--format=hf", "--dtype=int8"], "unknown dtype 'int8'"),
        (["--format=hf", "--output=logits"], "--output is for onnx, stablehlo"),
        (["--format=onnx", "--output=probabilities"], "no output 'probabilities'"),
        (["--format=npz", "--out=a.safetensors"], "must end in .npz for --format=npz"),
        (["--format=npz", "--out=none/a.npz"], "does not exist"),
        (["--format=hf", "--out=taken"], "is not empty; nothing was written"),
        (["--format=npz", "--out=taken/a.npz"], "exists already"),
        (["--format=dinov2"], "unknown format 'dinov2'"),
    ],
    ids=str,
)
def test_wrong_exports_are_refused(options, words, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a.npz").write_bytes(b"precious")
    status = cli.main(["export", f"--checkpoint={run}", "--out=x", *options])
    assert status == 2 and words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    assert (tmp_path / "taken" / "a.npz").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--source=none"], "no such checkpoint, file or folder: none"),
        (["--source=good", "--format=tf"], "unknown format 'tf'"),
        (["--source=good", "--format=timm"], "is not of the format 'timm'"),
        (["--source=good", "--model.widht=3"], "unknown --model.widht; did you mean 'width'"),
        (
            ["--source=good", "--preprocess.means=3"],
            "unknown --preprocess.means; did you mean 'mean'",
        ),
        (["--source=good", "--model.depth=3"], "missing"),
        (["--source=good", "--image-size=9"], "image size 9 is not divisible by patch size 2"),
        (["--source=good", "--out=good"], "is not an empty folder; nothing was written"),
        (["--source=two"], "several files may be meant"),
        (["--source=truncated.safetensors"], "bytes are missing"),
        (["--source=other.safetensors"], "of no architecture that vitjax knows"),
        (["--source=shape.safetensors"], r"wanted"),
    ],
    ids=str,
)
def test_wrong_imports_are_refused(options, words, run, tmp_path, monkeypatch, capsys):
    from vitjax.interop.files import open_weights, write_safetensors

    monkeypatch.chdir(tmp_path)
    vitjax.load(run).save("good", format="hf")
    (tmp_path / "two").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(tmp_path / "good" / "model.safetensors", tmp_path / "two" / name)
    whole = (tmp_path / "good" / "model.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[:-100])
    ones = ("conv1.weight", (3, 3), "float32", lambda: np.ones((3, 3), np.float32))
    write_safetensors(tmp_path / "other.safetensors", [ones])
    vitjax.load(run).save("t", format="timm")
    weights = open_weights(tmp_path / "t")
    entries = [
        (n, (s[0] + 1, *s[1:]) if n == "norm.bias" else s, "float32",
         lambda n=n, s=s: np.zeros((s[0] + 1, *s[1:]) if n == "norm.bias" else s, np.float32))
        for n, s in weights.shapes.items()
    ]  # fmt: skip
    write_safetensors(tmp_path / "shape.safetensors", entries)
    more = ["--model.num_heads=2"] if "shape" in options[0] else []
    status = cli.main(["import", "--out=x", *options, *more])
    said = capsys.readouterr().err
    assert status == 2 and words in said, said
    assert not (tmp_path / "x").exists()


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs torch")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil()}, tmp_path / "a.pth")
    assert cli.main(["import", f"--source={tmp_path / 'a.pth'}", "--dry-run"]) == 2
    assert "asks to run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_flipped_bit_is_seen(run, tmp_path):
    vitjax.load(run).save(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=r"checksum|damaged|CRC"):
        vitjax.load(tmp_path / "a")


@pytest.mark.parametrize("output", [None, "embedding", "tokens"])
@pytest.mark.parametrize("format", ["stablehlo", "onnx"])
def test_programs_are_written(format, output, run, tmp_path):
    first = vitjax.load(run)
    ready = np.asarray(state.prepare(jnp.asarray(images(7)), first.preprocess))
    wanted = {None: first.logits, "embedding": first.embed, "tokens": first.tokens}[output]
    out = tmp_path / f"m.{format}"
    more = [f"--output={output}"] if output else []
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    assert (
        cli.main(["export", f"--checkpoint={run}", f"--format={format}", f"--out={out}", *more])
        == 0
    )
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(out))
        (found,) = session.run(None, {"images": ready})
    else:
        found = jax.export.deserialize(bytearray(out.read_bytes())).call(ready)
    np.testing.assert_allclose(found, wanted(images(7)), rtol=1e-4, atol=1e-4)
    assert "normalised" in (tmp_path / "m.md").read_text()


def test_bfloat16_halves_the_file(run, tmp_path):
    for dtype in ("float32", "bfloat16"):
        status = cli.main([
            "export", f"--checkpoint={run}", "--format=hf", f"--out={tmp_path / dtype}",
            f"--dtype={dtype}",
        ])  # fmt: skip
        assert status == 0
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("float32", "bfloat16")]
    assert 1.7 < sizes[0] / sizes[1] < 2
    a, b = (vitjax.load(tmp_path / d).logits(images()) for d in ("float32", "bfloat16"))
    np.testing.assert_allclose(a, b, atol=0.05)
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["model_type"] == "ijepa"


def test_padding_is_refused_by_formats_that_cannot_say_it():
    from vitjax.data.preprocess import Preprocess
    from vitjax.errors import InputError
    from vitjax.interop.processors import to_processor
    from vitjax.interop.timm import _pretrained_cfg

    padded = Preprocess(32, resize="pad")
    for make in (to_processor, lambda p: _pretrained_cfg(p, 10)):
        with pytest.raises(InputError, match="cannot say resize="):
            make(padded)
