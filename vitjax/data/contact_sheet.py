"""Pictures of data: images with a few words under each, and how many examples a class has."""

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

SIDE = 144  # pixels that an image may take
GAP = 10
TEXT = 12  # size of the letters, in pixels
LINE = 16
INK, FADED, PAPER, FRAME = "#202020", "#707070", "#ffffff", "#ececec"
MOST_BARS = 50
LOG_ABOVE = 20  # times as many examples in the largest class as in the smallest


def _font(size: int) -> Any:
    """DejaVu, which has most alphabets; it comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size
    )


def shorten(text: str, fits: Any, keep_end: bool = False) -> str:
    """The text with as much of it cut away as `fits(text)` asks, at its end or its front."""
    if fits(text):
        return text
    for length in range(len(text) - 1, 0, -1):
        cut = f"…{text[-length:]}" if keep_end else f"{text[:length]}…"
        if fits(cut):
            return cut
    return "…"


def _fitted(image: UInt8[np.ndarray, "Y X C"]) -> Image.Image:
    """An image at the cell's size, its shape kept; enlarged, its pixels stay squares."""
    opened = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")
    scale = SIDE / max(opened.size)
    size = (max(1, round(opened.width * scale)), max(1, round(opened.height * scale)))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return opened.resize(size, how)


def draw_sheet(
    rows: Sequence[Sequence[tuple[np.ndarray, Sequence[str]]]],
    heads: Sequence[str] = (),
    with_ids: bool = False,
) -> bytes:
    """A sheet of images as a PNG.

    Args:
      rows: cells of an image, uint8 `[Y, X, C]`, and lines of text under it.
      heads: what stands above the columns.
      with_ids: the last line is an id: fainter, and cut at its front where it is too long.
    """
    font = _font(TEXT)
    num_lines = max((len(lines) for row in rows for _, lines in row), default=0)
    cell = (SIDE + GAP, SIDE + num_lines * LINE + GAP)
    top = GAP + (LINE + 4 if heads else 0)
    columns = max(map(len, rows), default=0)
    sheet = Image.new("RGB", (GAP + columns * cell[0], top + len(rows) * cell[1]), PAPER)
    draw = ImageDraw.Draw(sheet)

    def fits(text: str) -> bool:
        return font.getlength(text) <= SIDE

    for column, head in enumerate(heads):
        draw.text((GAP + column * cell[0], GAP - 2), shorten(head, fits), FADED, font)
    for i, row in enumerate(rows):
        for j, (image, lines) in enumerate(row):
            left, up = GAP + j * cell[0], top + i * cell[1]
            draw.rectangle((left, up, left + SIDE - 1, up + SIDE - 1), FRAME)
            small = _fitted(image)
            sheet.paste(small, (left + (SIDE - small.width) // 2, up + (SIDE - small.height) // 2))
            for number, text in enumerate(lines):
                is_id = with_ids and number == len(lines) - 1
                place = (left, up + SIDE + 2 + number * LINE)
                colour = FADED if is_id else INK
                draw.text(place, shorten(text, fits, keep_end=is_id), colour, font)
    file = io.BytesIO()
    sheet.save(file, "png")
    return file.getvalue()


def bars(names: Sequence[str], counts: Sequence[int]) -> list[tuple[str, int, bool]]:
    """(name, count, whether it is a class) of what is drawn: the largest classes, then the rest."""
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    if len(order) <= MOST_BARS:
        return [(names[i], counts[i], True) for i in order]
    shown, rest = order[: MOST_BARS - 1], order[MOST_BARS - 1 :]
    drawn = [(names[i], counts[i], True) for i in shown]
    return [*drawn, (f"{len(rest):,} other classes", sum(counts[i] for i in rest), False)]


def draw_classes(names: Sequence[str], counts: Sequence[int], title: str) -> bytes:
    """A bar for each class as a PNG; on a logarithmic axis where the classes differ much."""
    from matplotlib.figure import Figure

    drawn = bars(names, counts)
    is_log = max(counts) > LOG_ABOVE * max(1, min(counts))
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(drawn)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    colours = ["#3b6ea5" if is_class else "#b0b0b0" for _, _, is_class in drawn]
    places = range(len(drawn))
    heights = [count for _, count, _ in drawn]
    axes.barh(places, heights, color=colours, height=0.72, log=is_log)
    for place, height in zip(places, heights, strict=True):
        axes.annotate(
            f"{height:,}", (max(height, 1 if is_log else 0), place), (3, 0),
            textcoords="offset points", va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_yticks(
        places,
        [shorten(_literal(name), lambda t: len(t) <= 32) for name, _, _ in drawn],
        fontsize=8,
    )
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    largest = max(heights)
    if is_log:
        axes.set_xlim(0.8, 10 ** (math.log10(largest) * 1.1 + 0.15))
    else:
        axes.set_xlim(0, max(largest, 1) * 1.1)
    axes.set_xlabel("examples (logarithmic)" if is_log else "examples", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    mean = f"on average {sum(counts) / len(counts):,.0f} a class, from {min(counts):,} to "
    axes.set_title(f"{title}\n{mean}{max(counts):,}", fontsize=10, loc="left")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(file, format="png")
    return file.getvalue()


def _literal(text: str) -> str:
    """Without the signs that matplotlib takes for formulas."""
    return text.replace("$", r"\$")
