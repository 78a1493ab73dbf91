"""`vitjax data prepare`: from messy folders to shards, whatever interrupts it."""

import csv
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vitjax import lock
from vitjax.data import verb
from vitjax.data.images import decode
from vitjax.data.loader import Loader
from vitjax.data.preparing import prepare as preparing
from vitjax.data.preparing.options import Options
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources.prepared import Prepared
from vitjax.errors import InputError, SaveError, UnreadableImage

QUIET = Console(quiet=True)


def noise(seed, height=24, width=20, channels=3):
    """Smooth random pixels, which JPEG keeps nearly."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    return image.convert("L") if channels == 1 else image


def encoded(image, kind="jpeg", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def messy(root):
    """train/{robin,wren} with every kind of file that folders collect."""
    sixteen = Image.fromarray(np.linspace(0, 60_000, 480).reshape(24, 20).astype(np.uint16))
    frames = [noise(30 + i).convert("P") for i in range(3)]
    files = {
        "robin/a_plain.jpg": encoded(noise(1)),
        "robin/b_truncated.jpg": encoded(noise(2, 80, 80))[:-400],
        "robin/c_text.jpg": b"this is no image",
        "robin/d_cmyk.jpg": encoded(noise(3).convert("CMYK")),
        "robin/e_16bit.png": encoded(sixteen, "png"),
        "robin/f_moving.gif": encoded(frames[0], "gif", save_all=True, append_images=frames[1:]),
        "robin/g_empty.jpg": b"",
        "robin/h_big.png": encoded(noise(4, 90, 61), "png"),
        "wren/a_thin.png": encoded(noise(5, 10, 20_000), "png"),
        "wren/b_again.png": encoded(noise(4, 90, 61), "png", compress_level=1),
        "wren/c_rgba.png": encoded(noise(6).convert("RGBA"), "png"),
        "wren/d_grey.jpg": encoded(noise(7, 50, 70, channels=1)),
        "wren/e_plain.jpg": encoded(noise(8, 41, 40), quality=80),
        "wren/f_grey.png": encoded(noise(9, channels=1), "png"),
        "wren/g_again.png": encoded(noise(9, channels=1).convert("RGB"), "png"),
    }
    for name, data in files.items():
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


BAD = ["robin/b_truncated.jpg", "robin/c_text.jpg", "robin/g_empty.jpg"]
AGAIN = {"wren/b_again.png": "robin/h_big.png", "wren/g_again.png": "wren/f_grey.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("messy")
    messy(root)
    return root


def run(source, out, **changes):
    options = {"split": "train", "num_shards": 4, "num_workers": 1, "max_unreadable": 0.5}
    options |= changes
    return preparing.prepare(Options(source=str(source), **options), Path(out), QUIET)


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    """The messy folder, with the files kept as they are."""
    out = tmp_path_factory.mktemp("out") / "birds"
    run(folder, out, licence="CC BY 4.0")
    return out


def contents(out):
    """Every file of a prepared folder but for what says when and how long."""
    found = {}
    for path in sorted(Path(out).rglob("*")):
        if path.is_file() and path.name not in ("card.json", "README.md", lock.NAME):
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    card = json.loads((Path(out) / "card.json").read_text())
    card |= {"date": "", "name": ""}
    for split in card["splits"].values():
        split |= {"date": "", "seconds": 0}
    return found, card


def left_out(out, split="train"):
    with (Path(out) / f"{split}.left_out.csv").open() as file:
        return list(csv.DictReader(file))


def test_readable_files_are_copied_bit_for_bit_and_the_others_listed(prepared, folder):
    source = Prepared(str(prepared))
    files = messy(folder)
    kept = [name for name in sorted(files) if name not in BAD and name not in AGAIN]
    assert [source[i]["id"] for i in range(len(source))] == [f"train/{name}" for name in kept]
    assert [source[i]["image"] for i in range(len(source))] == [files[name] for name in kept]
    assert source.class_names == ("robin", "wren")
    expected = [("robin", "wren").index(name.split("/")[0]) for name in kept]
    assert source.all_labels().tolist() == expected == [record["label"] for record in source]
    rows = left_out(prepared)
    bad = {row["id"]: row["detail"] for row in rows if row["problem"] == "unreadable"}
    assert list(bad) == [f"train/{name}" for name in BAD] and all(bad.values())
    again = {row["id"]: row["detail"] for row in rows if row["problem"] == "duplicate"}
    assert again == {f"train/{k}": f"train/{v}" for k, v in AGAIN.items()}
    (conflict,) = [row for row in rows if row["problem"] == "conflict"]
    assert conflict["id"] == "train/wren/b_again.png" and "is robin" in conflict["detail"]
    assert source.problems() == []


def test_the_card_tells_what_the_records_hold(prepared):
    card = json.loads((prepared / "card.json").read_text())
    split, source = card["splits"]["train"], Prepared(str(prepared))
    records = list(source)
    images = [decode(record["image"], 3) for record in records]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255.0
    np.testing.assert_allclose(split["mean"], pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(split["std"], pixels.std(axis=0), atol=1e-6)
    heights = [image.shape[0] for image in images]
    assert split["size"]["height"] == {
        "min": min(heights), "median": int(np.median(heights)), "max": max(heights)
    }  # fmt: skip
    assert split["size"]["width"]["max"] == 20_000
    assert split["class_counts"] == np.bincount(source.all_labels()).tolist()
    assert split["num_examples"] == len(source) == 10
    kinds = {"16-bit": 1, "CMYK": 1, "RGB": 4, "RGBA": 1, "grey": 2, "palette": 1}
    assert split["kinds_in_source"] == kinds
    lines = (f"{r['id']}\t{hashlib.sha256(r['image']).hexdigest()}\t{r['label']}" for r in records)
    digests = sorted(hashlib.sha256(line.encode()).digest() for line in lines)
    assert split["content_hash"] == hashlib.sha256(b"".join(digests)).hexdigest()
    assert split["bytes"] == sum(p.stat().st_size for p in prepared.glob("*.array_record"))
    text = (prepared / "README.md").read_text()
    assert "Licence: CC BY 4.0" in text and split["content_hash"] in text


def test_larger_images_become_smaller_jpegs_and_others_keep_their_bytes(folder, tmp_path):
    run(folder, tmp_path / "out", short_side=32)
    records = {r["id"].removeprefix("train/"): r["image"] for r in Prepared(str(tmp_path / "out"))}
    files = messy(folder)
    shrunk = {"robin/h_big.png": (47, 32), "wren/d_grey.jpg": (32, 45),
              "wren/e_plain.jpg": (33, 32)}  # fmt: skip
    for name, data in records.items():
        if name not in shrunk:
            assert data == files[name]
            continue
        opened = Image.open(io.BytesIO(data))
        assert (opened.format, opened.size[::-1]) == ("JPEG", shrunk[name])
        assert opened.mode == ("L" if "grey" in name else "RGB")
        whole = Image.fromarray(decode(files[name], 3))
        like = np.asarray(whole.resize(opened.size, Image.Resampling.LANCZOS), float)
        assert np.abs(decode(data, 3) - like).mean() < 3


def test_any_number_of_workers_writes_the_same_bytes(folder, prepared, tmp_path):
    run(folder, tmp_path / "three", num_workers=3, licence="CC BY 4.0")
    assert contents(tmp_path / "three") == contents(prepared)


KILLED = """
import sys, time
from pathlib import Path
from rich.console import Console
from vitjax.data.preparing import options as options_lib
from vitjax.data.preparing import prepare

if __name__ == "__main__":
    options = options_lib.Options(
        source=sys.argv[1], split="train", num_shards=12, num_workers=2, short_side=32,
    )
    prepare.prepare(options, Path(sys.argv[2]), Console(quiet=True))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """240 images of two classes, some of them twice."""
    root = tmp_path_factory.mktemp("many")
    for i in range(240):
        place = root / "train" / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        seed = i if i % 9 else i // 2
        (place / f"{i:03}.jpg").write_bytes(encoded(noise(seed, 200 + seed % 7, 180)))
    return root


def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(many, tmp_path, root):
    whole = {"num_shards": 12, "short_side": 32}
    run(many, tmp_path / "whole", **whole)
    out, script = tmp_path / "killed", tmp_path / "killed.py"
    script.write_text(KILLED)
    chance, kills = random.Random(0), 0
    for least in (1, 3, 5, 8, 11):
        command = [sys.executable, str(script), str(many), str(out)]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)})
        while process.poll() is None and len(list(out.rglob("*.npz"))) < least:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if not (out / "card.json").exists():
            with pytest.raises(InputError, match="not finished: run the same `vitjax data prep"):
                Prepared(str(out))
    assert kills >= 3
    run(many, out, **whole)
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.rglob("*.tmp-*")) and not (out / ".preparing").exists()


def test_stopping_before_any_file_is_written_or_moved_changes_nothing(
    folder, prepared, tmp_path, monkeypatch
):
    """Each launch dies at its n-th step; the last one has none left to die at."""
    out, steps = tmp_path / "out", {"left": 0}

    def dying(function):
        def step(*arguments, **options):
            steps["left"] -= 1
            if steps["left"] == 0:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return step

    for module, name in (
        (preparing.whole_files, "write_bytes"), (preparing.os, "replace"),
        (preparing, "in_processes"), (preparing.shutil, "rmtree"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    deaths = 0
    for number in range(1, 40):
        steps["left"] = number
        try:
            run(folder, out, licence="CC BY 4.0")
            break
        except KeyboardInterrupt:
            deaths += 1
            stale = out / "train-00000-of-00004.array_record.tmp-1"
            stale.write_text("")
    assert 5 <= deaths < 39
    assert contents(out) == contents(prepared)
    assert not (out / ".preparing").exists()


@pytest.fixture
def told(caplog):
    """What the package logs."""
    logger = logging.getLogger("vitjax")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def test_a_restart_skips_finished_shards_and_refuses_other_options(folder, tmp_path, told):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"examples cannot be read, more than 0.0% of 15 ") as bad:
        run(folder, out, max_unreadable=0.0)
    assert "train/robin/b_truncated.jpg: " in str(bad.value)
    finished = {path.name: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    assert finished
    with pytest.raises(InputError, match=r"quality: 92 there, 80 here.*remove the folder"):
        run(folder, out, quality=80)
    plan = out / ".preparing" / "train" / "plan.json"
    whole = plan.read_text()
    plan.write_text(whole.replace('"num_examples": 15', '"num_examples": 16'))
    with pytest.raises(InputError, match="num_examples: 16 there, 15 here"):
        run(folder, out)
    plan.write_text(whole)
    run(folder, out)
    assert f"going on: {len(finished)} of 4 shards of train are written already" in told.text
    assert len(Prepared(str(out))) == 10
    told.clear()
    run(folder, out)
    assert "nothing to do" in told.text
    with pytest.raises(InputError, match="short_side: None there, 32 here"):
        run(folder, out, short_side=32)


SOURCE = """
import sys
import numpy as np

class Slides:
    num_classes = 3
    class_names = ("a", "b", "c")

    def __init__(self, groups=True, split="train"):
        self._groups = groups

    def __len__(self):
        return 9

    def __getitem__(self, i):
        kinds = ((6, 5), (6, 5, 1), (6, 5, 3), (6, 5, 4))
        dtype = np.uint16 if i in (4, 8) else np.uint8
        image = np.random.default_rng(i).integers(0, 256, kinds[i % 4]).astype(dtype)
        label = [[], [0], [2, 1]][i % 3]
        jax = "jax" in sys.modules
        record = {"image": image, "label": label, "id": f"slide {i} jax={jax}"}
        return record | ({"group": f"patient {i // 4}"} if self._groups else {})
"""


def test_arrays_groups_and_several_labels_survive_and_workers_import_no_jax(tmp_path, monkeypatch):
    (tmp_path / "slides_for_prepare.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    import slides_for_prepare  # pyright: ignore[reportMissingImports]

    name = "slides_for_prepare:Slides"
    run(name, tmp_path / "out", arguments={"groups": True}, num_shards=2)
    source, origin = Prepared(str(tmp_path / "out")), slides_for_prepare.Slides()
    assert source.all_groups() == [f"patient {i // 4}" for i in range(9)]
    assert source.all_labels() == [[[], [0], [2, 1]][i % 3] for i in range(9)]
    for i, record in enumerate(source):
        assert (record["id"], record["group"]) == (f"slide {i} jax=False", f"patient {i // 4}")
        assert record["label"] == origin[i]["label"]
        np.testing.assert_array_equal(decode(record["image"], 3), decode(origin[i]["image"], 3))
    loader = Loader(source, Preprocess(8), max_labels=2)
    batch = next(loader.eval_batches(9))
    assert batch["labels"].tolist() == [[-1, -1], [0, -1], [2, 1]] * 3 and batch["mask"].all()
    run(name, tmp_path / "plain", arguments={"groups": False})
    assert Prepared(str(tmp_path / "plain")).all_groups() is None


def test_a_prepared_set_is_read_by_the_loader_for_training(prepared):
    source = Prepared(str(prepared))
    loader = Loader(source, Preprocess(16), num_threads=3)
    batch = loader.train_batch(0, 10, seed=0)
    assert batch["images"].shape == (10, 16, 16, 3) and not loader.faults.reasons
    assert sorted(batch["labels"].tolist()) == sorted(source.all_labels().tolist())


def test_duplicates_may_be_kept_and_an_emptied_shard_is_no_trouble(tmp_path):
    for i in range(6):
        place = tmp_path / "in" / ("a", "b")[i // 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(encoded(noise(i % 2), "png"))
    run(tmp_path / "in", tmp_path / "few", split="all", num_shards=3)
    few = Prepared(str(tmp_path / "few"), "all")
    assert [record["id"] for record in few] == ["a/0.png", "a/1.png"]
    split = run(tmp_path / "in", tmp_path / "all", split="all", keep_duplicates=True)
    assert len(Prepared(str(tmp_path / "all"), "all")) == 6
    assert (split["duplicates"]["count"], split["conflicts"]["count"]) == (4, 3)


def test_labels_of_a_second_split_follow_the_first_ones_classes(tmp_path):
    for place in ("train/a", "train/b", "val/b", "odd/z"):
        (tmp_path / "in" / place).mkdir(parents=True)
        (tmp_path / "in" / place / "1.png").write_bytes(encoded(noise(len(place)), "png"))
    for split in ("train", "val"):
        run(tmp_path / "in", tmp_path / "out", split=split, keep_duplicates=True)
    assert Prepared(str(tmp_path / "out"), "val")[0]["label"] == 1
    with pytest.raises(InputError, match="the class 'z' of split 'odd' is not in the splits"):
        run(tmp_path / "in", tmp_path / "out", split="odd")
    with pytest.raises(InputError, match=r"no split 'vall'; did you mean 'val'\?"):
        Prepared(str(tmp_path / "out"), "vall")


def test_two_processes_do_not_prepare_in_one_folder(folder, tmp_path):
    (tmp_path / "out").mkdir()
    held = lock.take(tmp_path / "out" / lock.NAME)
    with pytest.raises(InputError, match=f"process {os.getpid()} on .* is preparing"):
        run(folder, tmp_path / "out")
    held.close()
    run(folder, tmp_path / "out")


LIMITED = """
import resource
from vitjax.errors import SaveError

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
"""


def test_a_disk_that_refuses_more_stops_with_one_message_and_keeps_what_is_there(
    many, tmp_path, root
):
    script, out = tmp_path / "limited.py", tmp_path / "out"
    script.write_text(KILLED.replace("import sys, time", "import sys, time" + LIMITED))

    def start(limit):
        command = [sys.executable, str(script), str(many), str(out), str(limit)]
        environment = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    failed = start(40_000)  # less than a shard
    assert failed.returncode == 1
    message = failed.stderr.strip().splitlines()[-1]
    assert "SaveError: cannot write" in message and "File too large" in message
    assert "start the same command again" in message
    assert not list(out.rglob("*.tmp-*")) and not list(out.rglob("*.array_record"))
    assert start(10**9).returncode == 0
    run(many, tmp_path / "whole", num_shards=12, short_side=32)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_worker_that_is_killed_is_told_in_one_sentence(tmp_path, monkeypatch):
    text = SOURCE.replace(
        "jax = ", "import os; os.kill(os.getpid(), 9) if i == 8 else None; jax = "
    )
    (tmp_path / "deadly_slides.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SaveError, match=r"a worker process died.*start the same command again"):
        run("deadly_slides:Slides", tmp_path / "out", num_shards=2)
    assert [path.stem for path in (tmp_path / "out").rglob("*.npz")] == ["00000"]


def test_damaged_prepared_folders_are_refused_or_reported(prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = copy / "train-00001-of-00004.array_record"
    shard.write_bytes(shard.read_bytes()[:-10])
    source = Prepared(str(copy))
    (problem,) = source.problems()
    assert "train-00001-of-00004.array_record has" in problem
    with pytest.raises(UnreadableImage):
        source[2]  # in the second shard
    shard.unlink()
    source = Prepared(str(copy))
    (problem,) = source.problems()
    assert problem.endswith("train-00001-of-00004.array_record is missing")
    bad = 0
    for i in range(len(source)):
        try:
            assert source[i]["id"]
        except UnreadableImage:
            bad += 1
    assert bad == 3
    (copy / "train.index.npz").unlink()
    with pytest.raises(InputError, match=r"cannot read .*train\.index\.npz"):
        Prepared(str(copy))
    (copy / "card.json").write_text("{}")
    with pytest.raises(InputError, match="is no data set card"):
        Prepared(str(copy))
    (copy / "card.json").unlink()
    with pytest.raises(InputError, match="was not made by `vitjax data prepare`"):
        Prepared(str(copy))
    with pytest.raises(InputError, match="no such folder"):
        Prepared(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prepare --source={folder} --out={new} --split=trian", "did you mean 'train'"),
        ("prepare --source={folder}x --out={new}", "no such file or folder, and no import path"),
        ("prepare --source=no.module:X --out={new}", "cannot import 'no.module'"),
        ("prepare --source={folder} --out={file}", "is a file"),
        ("prepare --source={folder} --out={file}/x", "cannot write to --out"),
        ("prepare --source={folder} --out={full}", "is not empty and was not prepared"),
        ("prepare --source={folder} --out={new} --short_side=0", "--short_side must be at least 1"),
        ("prepare --source={folder} --out={new} --workers=0", "--workers must be at least 1"),
        ("prepare --source={folder} --out={new} --shards=x", "--shards must be a number or auto"),
        ("prepare --source={folder} --out={new} --quality=0", "--quality must be 1 to 100"),
        ("prepare --source={folder} --out={new} --channels=2", "--channels must be 1"),
        ("prepare --source={folder} --out={new} --max_unreadable=2", "--max_unreadable must be 0"),
        ("prepare --source={folder} --out={new} --split=a/b", "cannot name files"),
        ("prepare --source={folder} --out={new} --split=train,train", "names a split twice"),
        ("prepare --source={folder} --out={new} --source.size=3", "takes no argument 'size'"),
        ("prepare --source={folder} --out={new} --config.seed=3", "does not go with"),
        ("inspect --out={new}", "give either --source or --config"),
        ("inspect --out={file} --source={folder}", "is a file"),
        ("inspect --out={new} --source={folder} --rows=0", "--rows must be 1 to 100"),
        ("inspect --out={new} --source={folder} --check=some", "--check must be"),
        ("inspect --out={new} --source={folder} --split=trian", "did you mean 'train'"),
        ("inspect --out={new} --config={empty}", "data.source.target is not set"),
        ("bench --config={empty}", "data.source.target is not set"),
        ("bench --config=quickstart --batches=0", "--batches must be at least 1"),
        ("bench --config=quickstart --threads=one", "--threads must be integers"),
        ("bench --config=quickstart --json={new}/x/y.json", "no such folder"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing_behind(words, message, folder, tmp_path):
    places = {name: tmp_path / name for name in ("new", "file", "full", "empty")}
    places["file"].write_text("")
    places["full"].mkdir()
    (places["full"] / "diary.txt").write_text("")
    places["empty"] = tmp_path / "empty.py"
    places["empty"].write_text("from vitjax.config import base_config as get_config")
    with pytest.raises(InputError, match=message) as error:
        verb.main(words.format(folder=folder, **places).split())
    assert "\n" not in str(error.value)
    assert not places["new"].exists()


@pytest.mark.parametrize(
    "words",
    [
        "prepare --source=x --out=y --shortside=3",
        "prepare --source=x --out=y --short=3",
        "inspect --source=x --out=y --row=3",
        "bench --config=quickstart --batch=3",
    ],
)
def test_an_unknown_or_shortened_option_is_named(words, capsys):
    with pytest.raises(SystemExit) as ended:
        verb.main(words.split())
    assert ended.value.code == 2 and words.split()[-1] in capsys.readouterr().err


def test_the_verb_prepares_several_splits_with_arguments_for_the_source(tmp_path, capsys):
    out = tmp_path / "digits"
    name = "vitjax.data.sources.arrays:Digits"
    words = f"prepare --source={name} --split=train,test --out={out} --channels=1 --workers=2"
    assert verb.main([*words.split(), "--keep_duplicates"]) == 0
    from vitjax.data.sources.arrays import Digits

    for split in ("train", "test"):
        source, origin = Prepared(str(out), split), Digits(split)
        assert source.all_labels().tolist() == origin.all_labels().tolist()
        np.testing.assert_array_equal(decode(source[3]["image"], 1)[..., 0], origin[3]["image"])
    assert "test: 360 examples in 1 shards" in capsys.readouterr().err
