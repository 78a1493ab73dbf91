"""Published fits, computed again from their data: docs/scaling_reproductions.md.

    python benchmarks/scaling_reproductions.py [--data FOLDER]

The data sets are third parties' and not part of the project; FOLDER/scaling holds their files.
"""

import argparse
import csv
import json
import os
from pathlib import Path

import numpy as np

from vitjax.scaling.isoflop import fit_isoflop
from vitjax.scaling.parametric import NAMES, fit_parametric
from vitjax.scaling.shape_law import scale_shape

CHINCHILLA_BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)
Row = tuple[str, str, str]  # what, published, found here

HEAD = """# Published fits, computed again

Every number in the last column is printed by `python benchmarks/scaling_reproductions.py` from the
authors' data. Where it differs from the published one, the reason is given as far as it is known.
"""


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def columns(rows: list[dict], *names: str) -> list[np.ndarray]:
    return [np.array([float(row[name]) for row in rows]) for name in names]


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Exponent and coefficient of y = b x^a, by least squares of the logarithms."""
    exponent, level = np.polyfit(np.log(x), np.log(y), 1)
    return float(exponent), float(np.exp(level))


def best_of_bins(x: np.ndarray, y: np.ndarray, bins: int) -> np.ndarray:
    """Rows of the lowest y in each of the bins, evenly spaced in ln x."""
    place = np.log(x / x.min()) / np.log(x.max() / x.min()) * bins
    index = np.minimum(place.astype(int), bins - 1)
    return np.array([np.flatnonzero(index == k)[y[index == k].argmin()] for k in np.unique(index)])


def lower_hull(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rows of the lower convex hull of (ln x, ln y), up to the lowest y."""
    u, v = np.log(x), np.log(y)
    rows: list[int] = []
    for i in np.lexsort((v, u)):
        while len(rows) >= 2:
            a, b = rows[-2:]
            turn = (u[b] - u[a]) * (v[i] - v[a]) - (v[b] - v[a]) * (u[i] - u[a])
            if turn > 0:
                break
            rows.pop()
        rows.append(int(i))
    return np.array(rows[: int(np.argmin(v[rows])) + 1])


def chinchilla(folder: Path) -> list[Row]:
    n, c, loss = columns(
        read(folder / "chinchilla_points.csv"), "Model Size", "Training FLOP", "loss"
    )
    d = c / 6 / n
    law = fit_parametric(n, d, loss, drop_highest=5)
    published = {"E": "1.8172", "A": "477.84", "B": "2143.86", "alpha": ".34731", "beta": ".36718"}
    errors = {"E": ".026", "A": "124.5", "B": "1293", "alpha": ".015", "beta": ".021"}
    rows = [
        (f"{k} (standard error)", f"{published[k]} ({errors[k]})",
         f"{law.params[k]:.5g} ({law.standard_errors[k]:.3g})") for k in NAMES
    ]  # fmt: skip
    low, high = law.exponent_interval(0.95)
    rows.append(("objective, the sum", ".0010182740", f"{law.objective:.10f}"))
    rows.append(
        (
            "N exponent, 95% interval",
            ".513 (SE .020)",
            f"{law.exponent:.4f}, {low:.3f} to {high:.3f}",
        )
    )
    whole = fit_parametric(n, d, loss, resamples=0)
    rows.append(
        ("the same with all 245 runs: N exponent, beta", ".565, .453",
         f"{whole.exponent:.3f}, {whole.params['beta']:.3f}")
    )  # fmt: skip
    kept = np.argsort(loss)[:-5]
    parabolas = fit_isoflop(c[kept], n[kept], loss[kept])
    low, high = parabolas.exponent_interval(0.95)
    rows.append(
        ("N exponent by parabolas, budgets found in the runs", ".510 (printed by the authors: .49)",
         f"{parabolas.exponent:.4f}, {low:.3f} to {high:.3f}")
    )  # fmt: skip
    for tolerance in (0.1, 0.15):
        aimed = fit_isoflop(
            c[kept], n[kept], loss[kept], budgets=CHINCHILLA_BUDGETS, tolerance=tolerance,
            resamples=0,
        )  # fmt: skip
        what = f"the same, runs within {tolerance:g} in ln C of the nine budgets aimed at"
        rows.append((what, ".510", f"{aimed.exponent:.4f}"))
    return rows


def comma(folder: Path) -> list[Row]:
    table = read(folder / "isoflop_comma.csv")
    names = ("throughput/total_gflops", "parameter_count", "eval/paloma/macro_loss",
             "throughput/total_tokens")  # fmt: skip
    rows = []
    for what, chosen in (
        ("N exponent, isoFLOP runs", [r for r in table if r["Name"].startswith("isoflop")]),
        ("the same with the seven runs that check the optima", table),
    ):
        c, n, loss, tokens = columns(chosen, *names)
        law = fit_isoflop(c * 1e9, n, loss, num_examples=tokens)
        low, high = law.exponent_interval(0.95)
        rows.append((what, ".405", f"{law.exponent:.4f}, 95%: {low:.3f} to {high:.3f}"))
    return rows


def openclip(folder: Path) -> list[Row]:
    table = read(folder / "openclip_imagenet1k.csv")
    rows = []
    for data, published in (("LAION", "5.86 C^-.111"), ("WIT", "23.2 C^-.164")):
        chosen = [row for row in table if data in row["upstream_dataset"]]
        c, accuracy = columns(chosen, "gmacs_total", "acc1")
        error = 1 - accuracy
        front = best_of_bins(c, error, 5)
        exponent, level = line(c[front], error[front])
        found = f"{level:.2f} C^{exponent:.3f} ({len(front)} points)"
        rows.append((f"{data}: best of 5 log bins", published, found))
        if data == "LAION":
            largest = int(np.argmax(c))
            predicted = 100 * (1 - level * c[largest] ** exponent)
            measured = 100 * accuracy[largest]
            rows.append(("H/14 on 34B: predicted, measured", "78.1, 78.0",
                         f"{predicted:.1f}, {measured:.1f}, a point of the fit"))  # fmt: skip
            rest = c < c[largest]
            held = best_of_bins(c[rest], error[rest], 5)
            slope, height = line(c[rest][held], error[rest][held])
            rows.append(("the same with H/14 held out", "-",
                         f"{100 * (1 - height * c[largest] ** slope):.1f}"))  # fmt: skip
            rows.append(("all points: exponent", "-.101", f"{line(c, error)[0]:.3f}"))
    return rows


def overtraining(folder: Path) -> list[Row]:
    table = read(folder / "overtraining_rpj.csv")
    n, d, loss, multiple = columns(table, "params", "tokens", "val:c4_val", "chinchilla_multiplier")
    small = n < 4.2e8
    rows = []
    published = {True: "+.10%, +.12%, +.31%", False: "up to -7.9%"}
    for is_tied in (True, False):
        for delta, objective in ((1e-3, "Huber 1e-3"), (1.0, "squares")):
            law = fit_parametric(
                n[small], d[small], loss[small], tie_exponents=is_tied, delta=delta, resamples=0
            )
            errors = law.predict(n[~small], d[~small]) / loss[~small] - 1
            what = f"{'tied' if is_tied else 'free'} exponents, {objective}"
            rows.append((what, published[is_tied], ", ".join(f"{e:+.2%}" for e in errors)))
    where = ", ".join(
        f"{size / 1e9:.1f}B at {m:g}x" for size, m in zip(n[~small], multiple[~small], strict=True)
    )
    rows.append(("fitted on up to 411M, the errors are at", "1.4B, 1.4B at 32x, 6.9B", where))
    return rows


def gemstones(folder: Path) -> list[Row]:
    with (folder / "gemstones_hot.jsonl").open() as file:
        table = [json.loads(text) for text in file]
    n, d, loss = columns(table, "params_active_precise", "tokens", "final_loss")
    c = 6 * n * d
    hull, bins = lower_hull(c, loss), best_of_bins(c, loss, 5)
    return [
        ("N exponent, lower convex hull in ln C, ln L", ".499",
         f"{line(c[hull], n[hull])[0]:.3f} ({len(hull)} points)"),
        ("N exponent, best of 5 log bins", ".499", f"{line(c[bins], n[bins])[0]:.3f}"),
    ]  # fmt: skip


def sovit(_: Path) -> list[Row]:
    shape = scale_shape(608, 10, 928, 1.1e3)
    found = f"{shape.width}/{shape.depth}/{shape.mlp_dim}, {shape.num_heads} heads"
    return [("(608, 10, 928) scaled by tau = 1.1e3", "1152/27/4304 (SoViT-400m)", found)]


SECTIONS = (
    ("Chinchilla: 245 digitised runs (Hoffmann et al. 2022; Besiroglu et al. 2024)", chinchilla,
     "The highest five losses are left out, as in the replication: those five move the exponent by "
     "2.6 standard errors. The digitised FLOPs scatter around nine budgets with many runs between "
     "them; `fit_isoflop` takes the densest windows of +-0.15 in ln C and leaves the rest unused. "
     "Parabolas and the parametric law differ on the same runs, so both are reported."),
    ("Marin, Comma mix: isoFLOP curves", comma,
     "The column holds GFLOP. Of the seven checks four fall into a budget, and move the exponent "
     "by .005."),
    ("openCLIP: zero-shot ImageNet error over C in GMAC (Cherti et al. 2023)", openclip,
     "The exponents are those printed; the coefficient depends on which run is the best of a bin "
     "(5.81 here, 5.86 there). By this rule H/14 is itself one of the five points of the line, so "
     "that its 78.0 is a fit and no prediction; held out, the line says 78.2."),
    ("Over-training: RedPajama, C4 validation loss (Gadre et al. 2024)", overtraining,
     "Tied exponents reproduce to 0.01%. Free exponents err by 3.0% under the Huber objective and "
     "7.3% under squares of ln L; 7.9% was not met with either."),
    ("Gemstones: 22 shapes at a constant learning rate (McLeish et al. 2025)", gemstones,
     "Does not reproduce from this file. The authors' rule is the hull, over FLOPs counted with "
     "attention (.596 too). Their table, by its name, has a checkpoint every 477 steps, 2B tokens, "
     "where this file has one every 10B: probably the low end of the frontier is what is missing."),
    ("SoViT: the shape of the 400M model (Alabdulmohsin et al. 2023)", sovit,
     "With the rounded exponents that are printed; within 12, 6 and 13% of the published shape."),
)  # fmt: skip


def main() -> None:
    default = os.environ.get("VITJAX_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(default))
    folder = parser.parse_args().data / "scaling"
    if not folder.is_dir():
        parser.error(f"--data={folder.parent} holds no folder scaling")
    parts = [HEAD]
    for title, compute, remark in SECTIONS:
        rows = compute(folder)
        table = ["| what | published | here |", "|---|---|---|"]
        table += [f"| {what} | {there} | {here} |" for what, there, here in rows]
        parts += [f"## {title}\n", "\n".join(table) + "\n", remark + "\n"]
        print(parts[-3], parts[-2], sep="\n")
    path = Path(__file__).parents[1] / "docs" / "scaling_reproductions.md"
    path.write_text("\n".join(parts))
    print(path)


if __name__ == "__main__":
    main()
