"""What a report says, section by section, as blocks that `report_page` writes as pages."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vitjax.medical.report import RATES

Report = Mapping[str, Any]
LISTED = 20
COMPARED = ("scratch", "pixels", "cnn")  # in the verdict


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of a page: title, heading, text, strong, aside, list, table, figure or fold."""

    kind: str
    text: str = ""
    rows: Sequence[Any] = ()
    head: Sequence[str] = ()


def _number(value: Any, sign: str = "") -> str:
    return "n/a" if value is None or value != value else f"{value:{sign}.3f}"


def _interval(found: Any, sign: str = "") -> str:
    """As "0.900 [0.880, 0.920]"; a word such as "insufficient" stays."""
    if not isinstance(found, Mapping):
        return str(found or "n/a")
    low, high = (_number(found.get(k), sign) for k in ("low", "high"))
    return f"{_number(found.get('value'), sign)} [{low}, {high}]"


def _text(value: Any) -> str:
    """What JSON holds, as words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else str(value)


def _p(value: Any) -> str:
    return "<0.001" if value is not None and value < 0.001 else _number(value)


def _say(text: str, kind: str = "text") -> Block:
    return Block(kind, text)


def _table(head: str, rows: Sequence[Sequence[str]], *more: str) -> Block:
    return Block("table", rows=rows, head=[*head.split("|"), *more])


def _listed(values: Sequence[Any]) -> Block:
    more = [f"and {len(values) - LISTED:,} more"] if len(values) > LISTED else []
    return Block("list", rows=[*map(_text, values[:LISTED]), *more])


def _sign(difference: Mapping[str, Any]) -> int:
    """1 or -1 if the interval lies on that side of zero, else 0."""
    low, high = difference.get("low"), difference.get("high")
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def _verdict(report: Report) -> list[Block]:
    chosen, of = report.get("chosen"), {m["method"]: m for m in report.get("methods") or []}
    if chosen not in of:
        return [_say("No preset was measured.")]
    mine, blocks = of[chosen], []
    values = {name: m["test_auroc"]["value"] or 0.0 for name, m in of.items()}
    differences = {d["method"]: d["difference"] for d in report.get("differences") or []}
    floors = [name for name, m in of.items() if m["kind"] == "floor" and name != chosen]
    for name in sorted(floors, key=lambda name: -values[name]):
        if values[name] > values[chosen]:
            verb = "beats" if _sign(differences.get(name, {})) else "scores higher than"
            text = f"The floor {name} {verb} the chosen preset {chosen}: test AUROC "
            text += f"{_number(values[name])} against {_number(values[chosen])}"
            if name in differences:
                d = differences[name]
                word = "excludes" if _sign(d) else "includes"
                text += f"; {chosen} minus {name} is {_interval(d, '+')}, which {word} zero"
            said = _number(of[name]["val_auroc"]), _number(mine["val_auroc"])
            text += f"; on validation {said[0]} against {said[1]}."
            blocks.append(_say(text, "strong"))
    seeds, tried = len(mine.get("seeds") or []), sum(m["kind"] == "preset" for m in of.values())
    level = ((report.get("settings") or {}).get("report") or {}).get("level", 0.95)
    folds = (report.get("settings") or {}).get("folds")
    where = f"in {folds}-fold cross-validation" if folds else "on the validation split"
    blocks.append(_say(
        f"Chosen: {chosen}, since of {tried} preset{'s' * (tried != 1)} it has the best AUROC "
        f"{where} ({_number(mine['val_auroc'])}, {seeds} seed{'s' * (seeds != 1)}). "
        f"Its AUROC on the test split is {_interval(mine['test_auroc'])}; intervals are of "
        f"{100 * level:g}%, over {(report.get('data') or {}).get('group_kind', 'group')}s."
    ))  # fmt: skip
    if report.get("official"):
        said = ", ".join(f"{k} {_interval(v)}" for k, v in report["official"].items())
        blocks.append(_say(f"The data set's own metric: {said}."))
    for g in report.get("goals") or []:
        short = g["goal"] - (g["value"] or 0.0)
        word = "reached" if short <= 0 else f"missed by {_number(short)}"
        text = f"Goal {g['metric']} {_number(g['goal'])}, {g['of']}: {_interval(g)}, {word}."
        blocks.append(_say(text, "strong" if short > 0 else "text"))
    words = {1: "it beats {} by", -1: "it loses to {}:", 0: "no difference from {} is shown:"}
    parts = [f"{words[_sign(d)].format(name)} {_interval(d, '+')}"
             for name, d in differences.items() if name in COMPARED]  # fmt: skip
    if parts:
        blocks.append(_say(f"By paired intervals of the test AUROC, {'; '.join(parts)}."))
    return blocks


def _methods(report: Report) -> list[Block]:
    rows = []
    for m in report.get("methods") or []:
        size, spread = m.get("num_params"), (m.get("over_seeds") or {}).get("standard_deviation")
        rows.append([
            m["method"] + " (chosen)" * (m["method"] == report.get("chosen")), m["kind"],
            str(len(m.get("seeds") or [])), _number(m["val_auroc"]), _interval(m["test_auroc"]),
            _number(spread), _interval(m.get("ensemble_auroc")),
            f"{(m.get('seconds') or 0) / 60:.1f}", "n/a" if size is None else f"{size:,}",
            m.get("chosen") or "",
        ])  # fmt: skip
    head = "method|kind|seeds|validation AUROC|test AUROC|sd over seeds|ensemble of seeds|minutes"
    others = [[k, _interval(v)] for k, v in (report.get("metrics") or {}).items()]
    text = "Of the chosen preset on the test split, means over seeds, questions and sets:"
    return [_table(head, rows, "parameters", "setting"), Block("figure", "methods.png"),
            *[_say(text)] * bool(others), _table("metric|value", others),
            Block("figure", "roc.png")]  # fmt: skip


def _official(report: Report) -> list[Block]:
    together = report.get("official_ensemble") or {}
    rows = [[k, _interval(v), _interval(together.get(k))]
            for k, v in (report.get("official") or {}).items()]  # fmt: skip
    none = _say("The data set has no metric of its own that is known here.")
    table = _table("metric|mean over seeds|ensemble of seeds", rows) if rows else none
    return [table, *_views(report.get("views") or {}), *_froc(report.get("froc") or {})]


def _views(part: Mapping[str, Any]) -> list[Block]:
    if not part:
        return []
    rows = [["auroc", _interval(part["test_auroc"]), _interval(part["ensemble_auroc"])]]
    rows += [[k, _interval(v), _interval(part["official_ensemble"].get(k))]
             for k, v in part["official"].items()]  # fmt: skip
    return [
        _say(f"With test-time augmentation, the mean over {part['number']} views of each image by "
             f"the policy {part['policy']!r}; the AUROC minus that of one look is "
             f"{_interval(part['difference'], '+')}. All else in this report is of one look."),
        _table("metric, all views|mean over seeds|ensemble of seeds", rows),
    ]  # fmt: skip


def _froc(part: Mapping[str, Any]) -> list[Block]:
    if not part:
        return []
    rows = [[f"{row['false_positives']:g}", _number(row["sensitivity"])]
            for row in part["sensitivities"]]  # fmt: skip
    left = part["left_out"]
    return [
        _say(f"FROC of the best seed, {_interval(part['score'])} over slides: the mean share of "
             f"{part['lesions']:,} lesions that are found at six rates of false positives, in "
             f"{part['slides']:,} slides. A detection is a tile that alone looks most like "
             f"a lesion within {part['radius']:g} micrometres."),
        _table("false positives a slide|share of lesions found", rows), Block("figure", "froc.png"),
        *[_say(f"Left out, since their lesions are not outlined: {_text(left)}.")] * bool(left),
    ]  # fmt: skip


def _thresholds(report: Report) -> list[Block]:
    rows = [[t["question"], t["rule"], _number(t["threshold"]), *(_interval(t[r]) for r in RATES)]
            for t in report.get("thresholds") or []]  # fmt: skip
    text = "Chosen on the validation split, by these rules; the rates are of the test split."
    return [_say(text), _table("question|rule|threshold", rows, *RATES)] if rows else []


def _differences(report: Report) -> list[Block]:
    rows = [[d["method"], _interval(d["difference"], "+"), _p((d.get("delong") or {}).get("p")),
             _p(d.get("p_holm"))] for d in report.get("differences") or []]  # fmt: skip
    text = (
        "Test AUROC of the chosen preset minus the method's, resampled together by group. DeLong's "
        "test is given where cases are independent and there is one question; Holm's p holds for "
        "all rows together."
    )
    return [_say(text), _table("method|chosen minus it|DeLong p|Holm p", rows)] if rows else []


def _calibration(report: Report) -> list[Block]:
    rows = [[c["label_set"], _number(c["temperature"])]
            + [f"{_number(c[k])} to {_number(c[f'{k}_after'])}" for k in ("ece", "brier", "nll")]
            for c in report.get("calibration") or []]  # fmt: skip
    text = "A temperature is fitted on the validation split; on the test split it changes:"
    table = _table("label set|temperature|ECE|Brier|negative log likelihood", rows)
    return [_say(text), table, Block("figure", "reliability.png")] if rows else []


def _subgroups(report: Report) -> list[Block]:
    audit, rows, gaps = report.get("audit") or [], [], []
    if not audit:
        return [_say("Not measured: there is no column to make subgroups of.")]
    for a in audit:
        for r in a.get("subgroups") or []:
            counts = (_text(r[k]) for k in ("n", "positives", "num_groups"))
            rows.append([a["question"], r["column"], r["value"], *counts, _number(r["prevalence"]),
                         *(_interval(r[k]) for k in ("auroc", "fpr", "fnr", "ece"))])  # fmt: skip
        for g in a.get("gaps") or []:
            gaps.append([a["question"], g["column"], g["metric"], _interval(g["gap"]),
                         g["worst"] or "", g["best"] or "", str(len(g["subgroups"]))])  # fmt: skip
    head = "question|column|subgroup|cases|positive|groups|prevalence|AUROC|false positive rate"
    return [
        _say("All at one threshold a question, Youden's on validation. Rows with too few cases "
             "stay, as insufficient. A gap is between the two subgroups that differ most, so among "
             "many it is too large by chance; where prevalence differs, so may rates."),
        Block("figure", "subgroups.png"),
        _table(head, rows, "false negative rate", "ECE"),
        _table("question|column|metric|gap|worst|best|subgroups compared", gaps),
    ]  # fmt: skip


def _robustness(report: Report) -> list[Block]:
    part, blocks = report.get("robustness") or {}, []
    if methods := part.get("methods"):
        sampled = f", a sample of {part['all_units']:,}" if part.get("is_sample") else ""
        blocks.append(_say(
            f"Corrupted images of the test split ({part['units']:,} units{sampled}), first seed of "
            "each method. A drop is clean minus corrupted AUROC of the same units; relative is the "
            "share it takes of what the clean AUROC is above 0.5."
        ))  # fmt: skip
        rows = [[m["method"], _interval(m["clean"]), _interval(m["corrupted"]),
                 _interval(m["mean_drop"], "+"), _number(m["relative"])]
                for m in methods]  # fmt: skip
        blocks.append(_table("method|clean|mean corrupted|mean drop|relative", rows))
        if any(m["method"].endswith("+noise") for m in methods):
            blocks.append(_say(
                "A row with +noise was trained on images with normal noise of random strength: it "
                "has seen that family, the others are new to it."
            ))  # fmt: skip
        for d in part.get("differences") or []:
            text = f"Mean drop of {d['method']} minus that of {d['against']}: {_interval(d, '+')}."
            blocks.append(_say(text))
        of = [{f["family"]: f for f in m["families"]} for m in methods]
        meanings = {k: f["meaning"] for k, f in (part.get("families") or {}).items()}
        rows = [[name, *(_interval(f[name]["mean_drop"], "+") for f in of), meanings.get(name, "")]
                for name in of[0]]  # fmt: skip
        drops = [f"mean drop of {m['method']}" for m in methods]
        blocks += [Block("figure", "robustness.png"), Block("figure", "corruptions.png"),
                   _table("family", rows, *drops, "severity sets the")]  # fmt: skip
    return blocks + [_say(f"{m['method']}: {m['why']}.") for m in part.get("not_measured") or []]


def _low_data(report: Report) -> list[Block]:
    part = report.get("low_data") or {}
    rows = [[c["method"], _text(p["labelled"]), _text(p["images"]), _interval(p),
             ", ".join(_number(v) for v in p.get("by_seed") or [])]
            for c in part.get("curves") or [] for p in c["points"]]  # fmt: skip
    more = [[d["method"], d["against"], _text(d["labelled"]), _interval(d, "+")]
            for d in part.get("differences") or []]  # fmt: skip
    head = f"method|labelled|images|test {part.get('metric')}|by seed"
    return [Block("figure", "low_data.png"), _table(head, rows),
            _table("method|against|labelled|difference", more)]  # fmt: skip


def _guards(report: Report) -> list[Block]:
    found, blocks = dict(report.get("guards") or {}), []
    count = found.pop("test_evaluations", None)
    if count is not None:
        many = f"The test split was looked at {count:,} times in this folder: what was changed "
        once = _say("The test split was looked at once in this folder.")
        many = _say(f"{many} between may be fitted to it.", "strong")
        blocks.append(many if count > 1 else once)
    if privacy := found.pop("privacy", None):
        said = {k: privacy.get(k) or [] for k in ("problems", "warnings")}
        text = ", ".join(f"{len(v)} {k}" for k, v in said.items())
        text += f" in {_text(privacy.get('looked_at'))} of {_text(privacy.get('total'))} images"
        blocks.append(_say(f"Privacy lint: {text}. It does not make data anonymous."))
        blocks.append(_listed([*said["problems"], *said["warnings"]]))
    if same := found.pop("duplicates", None):
        counts = {k: v for k, v in (same.get("counts") or {}).items() if v}
        is_across = any("/" in splits for v in counts.values() for splits in v)
        text = f"Duplicates among {_text(same.get('looked_at', 0))} images: {_text(counts)}."
        blocks.append(_say(text, "strong" if is_across else "text"))
        for kind in ("exact", "near"):
            blocks += [_say(f"{kind.capitalize()}:"), _listed(same[kind])] if same.get(kind) else []
    blocks.append(_listed([f"{k}: {_text(v)}" for k, v in found.items()]))
    return blocks


def _data(report: Report) -> list[Block]:
    data, counts = report.get("data") or {}, []
    splits = data.get("splits") or {}
    for s in data.get("label_sets") or []:
        of = [(v.get("labels") or {}).get(s["name"], {}) for v in splits.values()]
        for name in dict.fromkeys(n for labels in of for n in labels):
            found = [list(labels.get(name, {}).values()) for labels in of]
            if name in s["classes"] or any(map(any, found)):
                counts.append([s["name"], name, *(" / ".join(map(_text, v)) for v in found)])
    sizes = [[k, *(_text(v.get(n, 0)) for n in ("images", "units", "groups"))]
             for k, v in splits.items()]  # fmt: skip
    keys = ("group_kind", "unit_kind", "aggregate", "columns", "inputs", "licence", "hash")
    facts = [[k.replace("_", " "), _text(data[k])] for k in keys if k in data]
    return [_table("split|images|units|groups", sizes), _listed(data.get("notes") or []),
            _table("label set|class: yes / no / unknown", counts, *splits),
            _table("fact|value", facts)]  # fmt: skip


def _checkpoint(report: Report) -> list[Block]:
    found = {**(report.get("checkpoint") or {}), "written": report.get("checkpoint_written")}
    parts = {k: found.pop(k, None) or {} for k in ("model", "preprocess")}
    rows = [[k.replace("_", " "), _text(v)] for k, v in found.items() if v is not None]
    rows += [[f"{k}: {n}", _text(v)] for k, part in parts.items() for n, v in part.items()]
    return [_table("fact|value", rows)]


def _settings(report: Report) -> list[Block]:
    text = json.dumps(report.get("settings") or {}, indent=1, sort_keys=True)
    made = " ".join(str(report.get(k, "")) for k in ("created", "vitjax", "format"))
    return [Block("fold", "All settings:", [text]), _say(f"Made {made}.")]


SECTIONS = {
    "Verdict": _verdict, "Methods": _methods, "Official metric": _official,
    "Thresholds": _thresholds, "Differences": _differences, "Calibration": _calibration,
    "Subgroups": _subgroups, "Robustness": _robustness, "Low data": _low_data, "Guards": _guards,
    "Data": _data, "Checkpoint and preprocessing": _checkpoint, "Settings": _settings,
}  # fmt: skip


def blocks(report: Report, figures: Sequence[str]) -> list[Block]:
    """The report from top to bottom; pictures that are not among `figures` are left out."""
    page = [_say(f"Transfer report: {(report.get('data') or {}).get('name', '')}", "title"),
            _say(report.get("intended_use") or "For research only.", "aside")]  # fmt: skip
    for title, make in SECTIONS.items():
        made = [b for b in make(report) if b.kind not in ("table", "list") or b.rows]
        made = [b for b in made if b.kind != "figure" or b.text in figures]
        page += [_say(title, "heading"), *(made or [_say("Not measured.")])]
    return page
