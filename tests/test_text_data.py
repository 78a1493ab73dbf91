"""Tokenizers, and sources of images with captions."""

import json

import numpy as np
import pytest
from PIL import Image

from vitjax import config as config_lib
from vitjax.data.check import check_source
from vitjax.data.loader import Loader
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources.pairs import Captioned, Pairs
from vitjax.data.text import BOS, EOS, PAD, ByteTokenizer, SentencePieceTokenizer
from vitjax.errors import InputError

DIGITS = {"target": "vitjax.data.sources.arrays:Digits", "split": "test"}


@pytest.mark.parametrize("text", ["a cat.", "naïve café", "猫 и кот 🐈", "", "A  b\n"])
def test_bytes_come_back_as_the_text(text):
    tokenizer = ByteTokenizer(40)
    tokens = tokenizer(text)
    length = len(text.encode())
    assert tokens.shape == (40,) and tokens.dtype == np.int32
    assert tokens[0] == BOS and tokens[length + 1] == EOS == tokens.max()
    assert (tokens[length + 2 :] == PAD).all() and tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize(("length", "kept"), [(5, "aé"), (4, "a"), (6, "aéb"), (3, "a")])
def test_long_texts_are_cut_between_characters_and_still_end(length, kept):
    tokens = ByteTokenizer(length)("aébcd")
    assert ByteTokenizer(length).decode(tokens) == kept
    assert (tokens == EOS).sum() == 1 and tokens[0] == BOS
    assert tokens.argmax() == len(kept.encode()) + 1


def test_letters_are_made_small_on_request():
    assert ByteTokenizer(9, lower=True).decode(ByteTokenizer(9, lower=True)("ÀB")) == "àb"


def test_the_least_length_is_three():
    with pytest.raises(InputError, match="length must be at least 3, got 2"):
        ByteTokenizer(2)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model of a few words."""
    trainer = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("a photo of a cat\na photo of a dog\nthe cat saw a dog\n" * 20)
    trainer.SentencePieceTrainer.Train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=30,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "m.model"


def test_pieces_are_cut_padded_and_come_back(pieces):
    tokenizer = SentencePieceTokenizer(str(pieces), 24, lower=True)
    tokens = tokenizer("A photo of a CAT")
    assert tokens.shape == (24,) and 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == "a photo of a cat"
    assert tokens[-1] == 2  # that model's end, which pads where it has no padding
    short = SentencePieceTokenizer(str(pieces), 5, bos=True, pad_id=0)
    assert short("a photo of a cat")[0] == 1 and short("a photo of a cat")[4] == 2
    assert list(short("a"))[-1] == 0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("none.model", {}, "no such file: .*none.model"),
        ("broken.model", {}, "cannot read .*broken.model as a SentencePiece model"),
        ("m.model", {"pad_id": 999}, "pad_id must be in 0 to .*, got 999"),
        ("m.model", {"length": 1}, "length must be at least 3, got 1"),
    ],
)
def test_wrong_models_of_pieces_are_named(pieces, name, options, words):
    (pieces.parent / "broken.model").write_bytes(b"no model at all")
    with pytest.raises(InputError, match=words):
        SentencePieceTokenizer(str(pieces.parent / name), **({"length": 8} | options))


def write(folder, name, rows, missing=()):
    """A table of the ending's kind, and its images but for the missing ones."""
    for row in rows:
        if row.get("image") and row["image"] not in missing:
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / row["image"])
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if name.endswith(".tsv") else ","
        lines = [mark.join(rows[0])]
        lines += [mark.join(f'"{v}"' for v in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return str(path)


ROWS = [{"image": f"{i}.png", "caption": f"number {i}, twice", "split": "ab"[i % 2]}
        for i in range(4)]  # fmt: skip


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_pairs_are_read_from_tables(tmp_path, name):
    source = Pairs(write(tmp_path, name, ROWS))
    check_source(source, "data.source")
    assert len(source) == 4 and source[2]["captions"] == ("number 2, twice",)
    assert source.all_captions()[3] == ("number 3, twice",)
    part = Pairs(str(tmp_path / name), split="b")
    assert [part[i]["captions"][0][7] for i in range(len(part))] == ["1", "3"]
    assert Image.open(part[0]["id"]).size == (8, 8)


def test_columns_may_have_other_names(tmp_path):
    rows = [{"path": "x.png", "text": "hello"}]
    path = write(tmp_path, "t.csv", rows)
    source = Pairs(path, image="path", caption="text")
    assert source.all_captions() == [("hello",)]


def test_rows_without_a_caption_are_counted_and_named(tmp_path):
    captions = ["fine", "", "  ", None, ["a", " "], []]
    rows = [{"image": f"{i}.png", "caption": text} for i, text in enumerate(captions)]
    rows.append({"image": "6.png"})
    source = Pairs(write(tmp_path, "t.jsonl", rows))
    with pytest.raises(InputError, match=r"5 rows have no caption: line 2, 3, 4, 6, 7$"):
        check_source(source, "data.source")
    assert source.all_captions() == [("fine",), ("a",)]


def test_images_that_are_not_there_are_counted_and_named(tmp_path):
    path = write(tmp_path, "t.csv", ROWS, missing=("1.png", "3.png"))
    words = r"2 rows have an image that is not there: line 3, 5; the first is .*1\.png"
    with pytest.raises(InputError, match=words):
        check_source(Pairs(path), "data.source")


@pytest.mark.parametrize(
    ("name", "text", "options", "words"),
    [
        ("t.csv", "image,text\na.png,hello\n", {}, "has no column 'caption'; allowed: image, text"),
        ("t.jsonl", '{"image": "a", "captoin": "b"}\n', {}, "no column 'caption'; did you mean"),
        ("t.jsonl", '{"image": "a"\n', {}, "t.jsonl, line 1: no JSON"),
        ("t.jsonl", "[1]\n", {}, "expected an object of keys"),
        ("t.csv", "image,caption\n", {}, "has no rows"),
        ("t.csv", "image,caption\na.png,\n", {}, "1 row has no caption: line 2"),
        ("t.csv", "image,caption,split\na,b,c\n", {"split": "d"}, "no split 'd' in .*allowed: c"),
        ("t.txt", "", {}, "must end in .csv, .tsv, .jsonl"),
        ("t.csv", None, {}, "no such file"),
    ],
)
def test_wrong_tables_are_named(tmp_path, name, text, options, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        Pairs(str(tmp_path / name), **options)


def test_class_names_become_captions():
    names = tuple("abcdefghij")
    source = Captioned(DIGITS, ("one {}", "{} again"), names)
    plain = config_lib.build(DIGITS)
    for index in (0, 5):
        record, name = source[index], names[plain[index]["label"]]
        assert record["captions"] == (f"one {name}", f"{name} again")
        assert record["label"] == plain[index]["label"]
        assert source.all_captions()[index] == record["captions"]
    check_source(source, "data.source")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_names": ("a",)}, "1 class_names for 10 classes"),
        ({"templates": "a {}"}, "templates must be a list of texts"),
        ({"templates": ()}, "templates must be a list of texts"),
        ({"templates": ("a photo",)}, "template 'a photo' must have one {} for the class name"),
        ({"templates": ("{} and {}",)}, "must have one {}"),
        ({"templates": ("a {name}",)}, "must have one {}"),
    ],
)
def test_wrong_templates_and_names_are_named(options, words):
    with pytest.raises(InputError, match=words):
        Captioned(DIGITS, **options)


def test_sources_without_names_need_some(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.arange(2))
    block = {"target": "vitjax.data.sources.arrays:Npz", "path": str(tmp_path / "x.npz")}
    with pytest.raises(InputError, match="Npz does not name its classes: give class_names"):
        Captioned(block)


def test_one_caption_is_drawn_anew_each_epoch_and_always_the_same():
    templates = tuple(f"{i} {{}}" for i in range(5))
    tokenizer = ByteTokenizer(16)
    source = Captioned(DIGITS, templates)
    loader = Loader(source, Preprocess(8, 1), tokenizer=tokenizer, num_threads=0)

    def read(step, rows=None, seed=0):
        texts = loader.train_batch(step, 360, seed, rows)["texts"]
        return [tokenizer.decode(row) for row in texts]

    order = loader.order(0)
    first, second = read(0), read(1)
    assert first == read(0) and first != read(0, seed=1)
    by_example = [dict(zip(order(np.arange(360) + 360 * s), texts, strict=True))
                  for s, texts in enumerate((first, second))]  # fmt: skip
    changed = sum(by_example[0][i] != by_example[1][i] for i in range(360))
    assert 0.6 < changed / 360 < 0.95  # four of five
    counts = np.bincount([int(text[0]) for text in first], minlength=5)
    assert counts.min() > 40
    labels = [source[int(i)]["label"] for i in order(np.arange(360))]
    assert [text[2:] for text in first] == [str(label) for label in labels]
    rows = np.array([3, 200])
    assert read(1, rows) == [second[3], second[200]]
    batch = next(iter(loader.eval_batches(4)))
    assert [tokenizer.decode(row)[0] for row in batch["texts"]] == ["0"] * 4


def test_an_unreadable_pair_is_replaced_with_its_caption_too(tmp_path):
    path = write(tmp_path, "t.csv", ROWS)
    (tmp_path / "1.png").write_bytes(b"no image")
    tokenizer = ByteTokenizer(32)
    loader = Loader(Pairs(path), Preprocess(8, 1), tokenizer=tokenizer, num_threads=0,
                    max_unreadable_fraction=1.0)  # fmt: skip
    texts = [tokenizer.decode(row) for row in loader.train_batch(0, 4, 0)["texts"]]
    numbers = [2 if i == 1 else i for i in loader.order(0)(np.arange(4))]
    assert [int(text[7]) for text in texts] == numbers


def test_a_source_without_captions_gives_no_texts():
    loader = Loader(config_lib.build(DIGITS), Preprocess(8, 1), tokenizer=ByteTokenizer(8))
    assert "texts" not in loader.train_batch(0, 4, 0)
    loader.close()
