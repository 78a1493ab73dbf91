"""The transfer report's pages and pictures: what must be said, and that nothing is let through."""

import copy
import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from vitjax.medical import report_figures, report_page, report_sections
from vitjax.medical.cohort import LabelSet
from vitjax.medical.scoring import Scored, averaged, mean_auroc

HOSTILE = "<script>alert('x')</script> | **b** `c` [d](http://evil.example/) $e$ _f_ \u202egh\n# i"
FULL = ("methods", "roc", "reliability", "subgroups", "robustness", "low_data")


def interval(value, half=0.03):
    return {"value": value, "low": value - half, "high": value + half}


def method(name, kind, auroc):
    return {
        "method": name, "kind": kind, "is_from_nothing": False, "seeds": [0, 1, 2],
        "val_auroc": auroc + 0.01, "test_auroc": interval(auroc), "chosen": "penalty 0.1",
        "ensemble_auroc": interval(auroc + 0.005), "seconds": 90.0,
        "test_by_seed": [auroc - 0.01, auroc, auroc + 0.01],
        "over_seeds": {"mean": auroc, "standard_deviation": 0.01, "n": 3},
        "num_params": 1_287_618, "flops_per_image": 10**8,
    }  # fmt: skip


def bins(shift):
    rows = []
    for i in range(15):
        p = (i + 0.5) / 15
        count = 0 if i == 3 else 60 - 7 * min(i, 14 - i)
        row = {"low": i / 15, "high": (i + 1) / 15, "count": count}
        known = {"mean_probability": p, "observed": p + shift * (0.5 - p)}
        rows.append(row | (known if count else dict.fromkeys(known)))
    return rows


def audited(question, gap):
    insufficient = dict.fromkeys(("auroc", "fpr", "fnr", "ece"), "insufficient")
    rows = []
    groups = [("all", "all"), ("sex", "F"), ("sex", "M"), ("age", "[18, 40)"), ("age", "[40, 60)"),
              ("age", "Unknown"), ("centre", "A")]  # fmt: skip
    for number, (column, value) in enumerate(groups):
        row = {"column": column, "value": value, "n": 400, "positives": 90, "num_groups": 300}
        few = {"n": 31, "positives": 4} | insufficient
        scores = {"auroc": interval(0.9 - gap * number / 6), "fpr": interval(0.1),
                  "fnr": interval(0.2), "ece": interval(0.05)}  # fmt: skip
        rows.append(row | {"prevalence": 0.225} | (few if value == "Unknown" else scores))
    gaps = [
        {"column": "sex", "metric": "auroc", "gap": interval(gap), "worst": "M", "best": "F",
         "subgroups": ["F", "M"]},
        {"column": "centre", "metric": "auroc", "gap": "insufficient", "worst": None, "best": None,
         "subgroups": ["A"]},
    ]  # fmt: skip
    return {"question": question, "threshold": 0.4, "subgroups": rows, "gaps": gaps}


def corrupted(name, loss):
    families = []
    for number, family in enumerate(["gaussian_noise", "jpeg", "contrast", "occlusion", "gamma"]):
        drops = [loss * (number + 1) * s / 5 for s in range(1, 6)]
        severities = [{"severity": s, "auroc": interval(0.9 - d), "drop": interval(d)}
                      for s, d in enumerate(drops, 1)]  # fmt: skip
        mean = float(np.mean(drops))
        families.append({"family": family, "mean_drop": interval(mean), "relative": mean / 0.4,
                         "severities": severities})  # fmt: skip
    return {"method": name, "seed": 0, "clean": interval(0.9), "corrupted": interval(0.85),
            "mean_drop": interval(loss), "relative": loss / 0.4, "families": families}  # fmt: skip


def full(questions=("pneumonia",), **changes):
    """A report that has every part."""
    points = [(50, 0.80), (200, 0.86), (1000, 0.91)]
    curve = np.linspace(0, 1, 50)
    rate = {r: interval(0.8) for r in ("sensitivity", "specificity", "ppv", "npv")}
    found = {
        "format": "vitjax-report-1", "created": "2026-01-01T00:00:00", "vitjax": "0.1.0",
        "intended_use": "Research. It is no medical device.",
        "data": {
            "name": "chests", "label_sets": [
                {"name": "finding", "kind": "multi", "classes": list(questions)}],
            "splits": {s: {"images": 900, "units": 800, "groups": 700, "labels": {"finding": {
                q: {"yes": 90, "no": 700, "unknown": 110} for q in questions}}}
                for s in ("train", "val", "test")},
            "group_kind": "patient", "unit_kind": "study", "aggregate": "max", "inputs": [],
            "columns": ["age", "sex"], "notes": ["Labels were mined."], "licence": "CC BY 4.0",
            "hash": "53dfa72ff750cf18"},
        "checkpoint": {"path": "runs/a", "hash": "457e", "model": {"width": 128},
                       "num_params": 1_288_650, "preprocess": {"image_size": 28, "mean": [0.48]}},
        "settings": {"report": {"level": 0.95}, "presets": ["full", "linear"]},
        "guards": {
            "privacy": {"problems": [], "warnings": ["column notes is free text"],
                        "looked_at": 1000, "total": 5856},
            "duplicates": {"counts": {"exact": {"train/val": 8}, "near": {"train/test": 3}},
                           "exact": [["a", "b"]], "near": [["c", "d", 0.991]], "looked_at": 5856},
            "groups": "no patient is in two splits", "test_evaluations": 1},
        "chosen": "full",
        "methods": [method("majority", "floor", 0.5), method("pixels", "floor", 0.8),
                    method("scratch", "floor", 0.85), method("cnn", "floor", 0.88),
                    method("linear", "preset", 0.87), method("full", "preset", 0.91)],
        "metrics": {"auroc": interval(0.91)}, "official": {"auc": interval(0.91)},
        "official_ensemble": {"auc": interval(0.93)},
        "views": {"number": 8, "policy": "chest_xray", "difference": interval(0.004),
                  "test_auroc": interval(0.914), "ensemble_auroc": interval(0.934),
                  "official": {"auc": interval(0.914)},
                  "official_ensemble": {"auc": interval(0.934)}},
        "thresholds": [{"question": q, "rule": "youden", "threshold": 0.4} | rate
                       for q in questions],
        "differences": [
            {"method": "pixels", "difference": interval(0.11), "delong": {"p": 1e-9},
             "p_holm": 2e-9},
            {"method": "scratch", "difference": interval(0.06), "delong": {"p": 0.2},
             "p_holm": 0.4},
            {"method": "cnn", "difference": interval(0.01)}],
        "calibration": [{"label_set": "finding", "temperature": 1.4, "ece": 0.1, "ece_after": 0.02,
                         "brier": 0.15, "brier_after": 0.14, "nll": 0.5, "nll_after": 0.4,
                         "reliability": {"before": bins(0.5), "after": bins(0.1)}}],
        "curves": [{"question": q, "fpr": curve.tolist(), "tpr": (curve ** 0.3).tolist()}
                   for q in questions],
        "audit": [audited(q, 0.02 * n) for n, q in enumerate(questions, 1)],
        "robustness": {
            "units": 2000, "all_units": 5000, "is_sample": True,
            "families": {"jpeg": {"meaning": "quality", "levels": [50, 7]}},
            "methods": [corrupted("full", 0.03), corrupted("cnn", 0.05)],
            "differences": [{"method": "full", "against": "cnn"} | interval(-0.02)],
            "not_measured": [{"method": "knn", "why": "not measured: it has no head"}]},
        "low_data": {
            "metric": "auroc", "curves": [
                {"method": m, "points": [{"labelled": n, "images": n, "by_seed": [v - less]}
                                         | interval(v - less, 0.02) for n, v in points]}
                for m, less in (("full", 0), ("scratch", 0.1), ("cnn", 0.05))],
            "differences": [{"method": "full", "against": "scratch", "labelled": 50}
                            | interval(0.1)]},
    }  # fmt: skip
    return found | changes


PARTS = sorted(full())


def poisoned(value):
    """Every word of the data, with what could end a cell, a tag or a line behind it."""
    if isinstance(value, dict):
        return {k: poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return f"{value} {HOSTILE}" if isinstance(value, str) else value


def hostile():
    """A report whose names, ids and notes are hostile."""
    found = full(questions=("pneumonia", HOSTILE))
    for part in ("data", "guards", "audit", "curves", "thresholds", "settings", "checkpoint"):
        found[part] = poisoned(found[part])
    found["data"]["label_sets"][0]["name"] = "finding"
    found["settings"]["report"] = {"level": 0.95}
    found["calibration"][0]["label_set"] = HOSTILE
    return found


class Tags(html.parser.HTMLParser):
    """The tags that a browser would see, with what they refer to; all must close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.references, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def cells(line):
    return len(re.split(r"(?<!\\)\|", line)) - 2


def check_tables(text):
    """Every row of every table has as many cells as its head; returns how many tables there are."""
    tables = [b.split("\n") for b in text.split("\n\n") if b.startswith("|")]
    for table in tables:
        assert re.fullmatch(r"(\|---)+\|", table[1])
        assert len({cells(line) for line in table}) == 1, table
    return len(tables)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The pictures of a full report, drawn once."""
    folder = tmp_path_factory.mktemp("figures")
    return report_figures.draw(full(), folder), folder


def test_every_part_of_a_full_report_is_drawn_and_opens(drawn):
    names, folder = drawn
    assert names == [f"{name}.png" for name in FULL]
    for name in names:
        with Image.open(folder / name) as image:
            image.load()
            assert min(image.size) > 250 and len(image.getcolors(10**6) or []) > 20
    assert {p.name for p in folder.iterdir()} == set(names)  # and nothing half written


def test_a_picture_whose_part_is_gone_is_removed(tmp_path):
    (tmp_path / "low_data.png").write_bytes(b"of an older report")
    assert report_figures.draw({}, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_many_methods_questions_and_hostile_names_are_drawn(tmp_path):
    rows = [method(f"method_{i}", "preset", 0.6 + i / 60) for i in range(20)]
    questions = [HOSTILE, "_hidden", r"$\frac{$", *(f"question {i}" for i in range(18))]
    report = hostile() | {"methods": rows, "chosen": "method_19"}
    report["audit"] = [audited(q, 0.01) for q in questions]
    report["curves"] = [{"question": q, "fpr": [0, 0, 1], "tpr": [0, 0.5, 1]} for q in questions]
    report["curves"].append({"question": "no case", "fpr": [None, None], "tpr": [0, 1]})
    assert len(report_figures.draw(report, tmp_path)) == len(FULL)


def test_the_html_is_whole_and_loads_nothing(drawn):
    names, folder = drawn
    page = Tags(report_page.html(full(), names, folder))
    assert page.seen.count("img") == len(FULL) and page.seen.count("details") == 1
    assert all(r.startswith("data:image/png;base64,") for r in page.references)
    assert not {"script", "link", "iframe", "a", "object", "base"} & set(page.seen)


def test_sections_come_in_order_with_the_intended_use_before_all():
    text = report_page.markdown(full(), [])
    titles = re.findall(r"^## (.*)", text, re.M)
    assert titles == list(report_sections.SECTIONS)
    assert text.index("It is no medical device") < text.index("## Verdict")
    assert text.index("0.910 [0.880, 0.940]") < text.index("## Methods")


def test_markdown_tables_are_even():
    assert check_tables(report_page.markdown(full(), [])) >= 12
    assert check_tables(report_page.markdown(hostile(), [])) >= 12


def test_hostile_names_stay_words(drawn):
    page = report_page.html(hostile(), *drawn)
    assert "<script" not in page and "\u202e" not in page
    assert "<script>alert" in Tags(page).text  # shown as what it is
    text = report_page.markdown(hostile(), [])
    outside = re.sub(r"(?m)^    .*", "", text)  # without the block of settings, which is code
    assert "<" not in outside and "\u202e" not in text
    for mark in (r"(?<!\\)\*\*b", r"(?<!\\)`", r"(?<!\\)\]\(http", r"(?<!\\)_f", r"(?<!\\)\$e"):
        assert not re.search(mark, outside), mark
    assert not re.search(r"(?m)^\s*# i", text)  # and no heading of its own


@pytest.mark.parametrize(
    "word", ["- a", "1. a", "+ a", "---", "===", "# a", "> a", "[a]: b", "[ ] a"]
)
def test_a_note_begins_no_block_of_markdown(word):
    report = full()
    report["data"]["notes"] = [word]
    line = next(
        x for x in report_page.markdown(report, []).split("## Data")[1].splitlines()
        if x.startswith("- ")
    )  # fmt: skip
    assert re.match(r"- (\\[-+=#\[>]|\d+\\\.)", line), line


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["absent", "empty", "none"])
def test_any_part_may_be_missing(part, how):
    report = full()
    value = report.pop(part)
    if how != "absent":
        report[part] = type(value)() if how == "empty" else None
    text = report_page.markdown(report, [])
    assert re.findall(r"^## (.*)", text, re.M) == list(report_sections.SECTIONS)
    check_tables(text)


def test_a_report_with_no_part_is_still_a_page(tmp_path):
    page = Tags(report_page.html({}, [], tmp_path))
    assert page.text.count("Not measured") >= 6 and "No preset was measured" in page.text


def test_numbers_that_are_not_there_are_said_not_to_be():
    report = full()
    report["methods"][5]["test_auroc"] = {"value": 0.9, "low": None, "high": None}
    report["methods"][0] |= {"num_params": None, "over_seeds": {"standard_deviation": None}}
    text = report_page.markdown(report, [])
    assert "0.900 [n/a, n/a]" in text and "None" not in text and "nan" not in text


def test_a_floor_that_beats_the_preset_comes_first_and_bold():
    report = full()
    verdict = report_page.markdown(report, []).split("## Verdict")[1].split("## ")[0]
    assert "**" not in verdict
    report["methods"][3] = method("cnn", "floor", 0.93)
    report["differences"][2]["difference"] = interval(-0.02)
    verdict = report_page.markdown(report, []).split("## Verdict")[1].split("## ")[0].strip()
    first = verdict.split("\n\n")[0]
    assert first.startswith("**The floor cnn scores higher than the chosen preset full: ")
    assert first.endswith("**")
    assert "0.930 against 0.910" in first and "includes zero" in first
    report["differences"][2]["difference"] = interval(-0.2)
    verdict = report_page.markdown(report, []).split("## Verdict")[1].strip()
    assert verdict.startswith("**The floor cnn beats the chosen preset full: ")
    assert "-0.200 [-0.230, -0.170], which excludes zero" in verdict.split("\n\n")[0]


def test_the_verdict_claims_no_difference_that_the_interval_does_not_show():
    verdict = report_page.markdown(full(), []).split("## Verdict")[1].split("## ")[0]
    assert "it beats pixels by +0.110" in verdict and "it beats scratch by +0.060" in verdict
    assert "no difference from cnn is shown: +0.010 [-0.020, +0.040]" in verdict


def test_the_choice_is_told_to_be_by_validation():
    report = full()
    report["methods"] = copy.deepcopy(report["methods"])
    report["methods"][5]["val_auroc"] = 0.777
    verdict = report_page.markdown(report, []).split("## Verdict")[1].split("## ")[0]
    assert "of 2 presets it has the best AUROC on the validation split (0.777, 3 seeds)" in verdict


@pytest.mark.parametrize(("count", "warned"), [(1, False), (2, True), (7, True)])
def test_more_than_one_look_at_the_test_split_is_warned_of(count, warned):
    report = full()
    report["guards"]["test_evaluations"] = count
    said = re.search(
        r"\*\*The test split was looked at (\d) times", report_page.markdown(report, [])
    )
    assert bool(said) == warned and (not said or said[1] == str(count))


def test_insufficient_subgroups_stay():
    assert "| age | Unknown | 31 | 4 | 300 | 0.225 | insufficient |" in report_page.markdown(
        full(), []
    )


def test_long_lists_of_ids_are_cut_and_counted():
    report = full()
    report["guards"]["duplicates"]["exact"] = [[f"id{i}", f"di{i}"] for i in range(50)]
    text = report_page.markdown(report, [])
    assert "id19, di19" in text and "id20" not in text and "and 30 more" in text


def test_write_leaves_whole_files_that_agree(tmp_path):
    report = full()
    report["methods"][0]["over_seeds"]["standard_deviation"] = float("nan")
    page = report_page.write(report, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["methods"][0]["over_seeds"]["standard_deviation"] is None
    assert written["chosen"] == "full"
    text = (tmp_path / "report.md").read_text()
    linked = re.findall(r"\]\((figures/[\w.]+)\)", text)
    assert linked and all((tmp_path / name).is_file() for name in linked)
    assert Tags(page.read_text()).seen.count("img") == len(linked)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"report.json", "report.md", "report.html", "figures"}


def test_goals_are_said_to_be_reached_or_missed_and_by_how_much():
    goal = {"metric": "auc", "goal": 0.92}
    goals = [goal | {"of": "mean over seeds"} | interval(0.91),
             goal | {"of": "ensemble of seeds"} | interval(0.93)]  # fmt: skip
    verdict = report_page.markdown(full(goals=goals), []).split("## Verdict")[1].split("## ")[0]
    missed = r"\*\*Goal auc 0.920, mean over seeds: 0.910 .*, missed by 0.010.\*\*"
    assert re.search(missed, verdict)
    assert re.search(r"^Goal auc 0.920, ensemble of seeds: 0.930 .*, reached.$", verdict, re.M)
    page = report_page.markdown(full(), []).split("## Official metric")[1].split("## ")[0]
    assert re.search(r"\| auc \| 0.910 \[.*\] \| 0.930 \[", page)


def test_an_ensemble_is_of_mean_probabilities():
    def run(*scores):
        p = np.array(scores)
        names = np.array(list("abcd"))
        labels = {"finding": np.array([0.0, 0, 1, 1])}
        found = {"finding": np.stack([1 - p, p], 1)}
        sets = (LabelSet("finding", "single", ("no", "yes")),)
        return Scored(names, names, labels, found, {}, sets)

    runs = [run(0.1, 0.6, 0.5, 0.9), run(0.5, 0.1, 0.6, 0.4)]
    assert [mean_auroc(r) for r in runs] == [0.75, 0.75]
    together = averaged(runs)
    np.testing.assert_allclose(together.questions()[0].scores, [0.3, 0.35, 0.55, 0.65])
    assert mean_auroc(together) == 1.0
