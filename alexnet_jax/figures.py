"""Figures, one per function, legible in print and to colour-blind readers."""

import functools
import importlib.util
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from alexnet_jax.errors import UserError, shortened
from alexnet_jax.files import naming

# Okabe and Ito's colours, distinct for every kind of colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#7F7F7F",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK, GREY)
MARKS = "os^Dv*Xp"
WIDTH = 7.0  # inches, a page's text width
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called $5
    "svg.hashsalt": "alexnet_jax",  # the same numbers give the same file
}

Curve = Sequence[tuple[float, float]]  # (epoch, value)
P = ParamSpec("P")
T = TypeVar("T")


class Guess(NamedTuple):
    """An image and a net's best guesses for it."""

    image: np.ndarray  # (s, s, 3) uint8
    title: str  # name of the right class, or of the file
    labels: Sequence[str]  # the five best
    probabilities: Sequence[float]
    right: str | None  # the right class, marked among the five; None if unknown


def check_installed() -> None:
    """Raises UserError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "figures are drawn by matplotlib, which is not installed; pip install -e '.[figures]'"
        )


def in_style(drawing: Callable[P, T]) -> Callable[P, T]:
    """`drawing` in `STYLE`, which other figures of the process, as in a notebook, do not get."""

    @functools.wraps(drawing)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        check_installed()
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return drawing(*args, **kwargs)

    return styled


@in_style
def save(figure: Any, path: pathlib.Path) -> list[str]:
    """Write a figure to a path ending in .png or .svg, or without suffix to both.

    Returns:
      The file names.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path] if path.suffix else [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in written:
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        with naming(file):
            figure.savefig(file, dpi=200, metadata=metadata)
    return [str(file) for file in written]


def _figure(height: float, rows: int, columns: int, **options: Any) -> tuple[Any, np.ndarray]:
    """A figure of `height` inches and its axes, (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


@in_style
def curves(
    training: Mapping[str, Curve],
    validation: Mapping[str, Curve],
    *,
    ylabel: str,
    target: float | None = None,
    logarithmic: bool = False,
    splits: Mapping[str, str] | None = None,
) -> Any:
    """Values by epoch: a colour and a marker per run, training solid, validation dashed.

    Args:
      splits: for each run, the split that serves as validation.
      target: value at which to draw a horizontal line.
    """
    names = list(dict.fromkeys([*training, *validation]))
    entries = sum(map(bool, [*training.values(), *validation.values()]))
    figure, ((axes,),) = _figure(max(3.2, 0.175 * entries + 0.3), 1, 1)
    for place, name in enumerate(names):
        colour, mark = (
            COLOURS[place % len(COLOURS)],
            MARKS[(place + place // len(COLOURS)) % len(MARKS)],
        )
        for found, line, words in (
            (training, "-", "training" if validation else ""),
            (validation, "--", (splits or {}).get(name, "validation")),
        ):
            if found.get(name):
                axes.plot(
                    *zip(*found[name]),
                    line,
                    color=colour,
                    marker=mark,
                    markevery=max(1, len(found[name]) // 8),
                    markersize=3,
                    label=", ".join(filter(None, (shortened(name, 28), words))),
                )
    if target is not None:
        axes.axhline(target, color=GREY, linestyle=":", linewidth=1)
        axes.annotate(
            f"{target:g}", (1, target), xycoords=("axes fraction", "data"), xytext=(2, 0),
            textcoords="offset points", va="center", color=GREY,
        )  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    if entries:
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


@in_style
def kernels(towers: Sequence[np.ndarray], titles: Sequence[str]) -> Any:
    """First-layer kernels, tower above tower, 16 per row, on one shared scale (figure 3).

    Args:
      towers: (k, k, 3, o) float for each tower.
    """
    low, high = (
        float(bound(np.concatenate([t.ravel() for t in towers]))) for bound in (np.min, np.max)
    )
    sheets = [_sheet((tower - low) / max(high - low, 1e-12)) for tower in towers]
    shares = [sheet.shape[0] for sheet in sheets]
    height = WIDTH * sum(shares) / sheets[0].shape[1] + 0.35 * len(towers)
    figure, axes = _figure(height, len(towers), 1, height_ratios=shares)
    for (one,), sheet, title in zip(axes, sheets, titles):
        one.imshow(sheet, interpolation="nearest")
        one.set_title(title, loc="left")
        one.set_axis_off()
    return figure


def _sheet(tower: np.ndarray) -> np.ndarray:
    """Kernels (k, k, 3, o) in 0..1 as a grid with a white pixel between: (h, w, 3)."""
    size, count = tower.shape[0], tower.shape[3]
    columns = min(16, count)
    rows = math.ceil(count / columns)
    sheet = np.ones((rows * (size + 1) - 1, columns * (size + 1) - 1, 3))
    for place in range(count):
        top, left = (size + 1) * (place // columns), (size + 1) * (place % columns)
        sheet[top : top + size, left : left + size] = tower[..., place]
    return sheet


def colour_selectivity(tower: np.ndarray) -> float:
    """How much of a tower's kernels is colour: 0 for grey ones, 2/3 for noise, 1 for pure colour.

    The mean over kernels of the share of a kernel's energy that remains when each pixel's mean
    over the three channels is subtracted.

    Args:
      tower: (k, k, 3, o) float.
    """
    grey = tower.mean(axis=2, keepdims=True)
    colour, whole = (np.sum(part**2, axis=(0, 1, 2)) for part in (tower - grey, tower))
    return float(np.mean(colour / np.maximum(whole, np.finfo(np.float32).tiny)))


@in_style
def confusion(counts: np.ndarray, labels: Sequence[str], most: int = 40) -> Any:
    """Confusion matrix: which class (row) was taken for which, in per cent of the row.

    The row of a class without examples stays white.

    Args:
      counts: (classes, classes) int.
      most: with more classes, only the ones mistaken most often are drawn.
    """
    examples = counts.sum(1, keepdims=True)
    shares = np.full(counts.shape, np.nan)
    np.divide(100 * counts, examples, out=shares, where=examples > 0)
    chosen = np.arange(len(labels))
    if len(labels) > most:
        right = np.nan_to_num(np.diag(shares), nan=np.inf)
        chosen = np.sort(np.argsort(right, kind="stable")[:most])
    shares = shares[np.ix_(chosen, chosen)]
    names = [shortened(labels[int(place)], 24) for place in chosen]
    figure, ((axes,),) = _figure(WIDTH * 0.85, 1, 1)
    drawn = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    size = min(8, 200 / len(names))  # so that one name does not run into the next
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_xlabel("taken for")
    if len(labels) > most:
        axes.set_title(
            f"the {most} of {len(labels)} classes that are mistaken most; others they are taken "
            "for are not drawn"
        )
    axes.set_ylabel("is")
    if len(names) <= 20:
        for row, column in np.argwhere(shares >= 0.5):
            share = shares[row, column]
            colour = "black" if share > 55 else "white"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="% of the class")
    return figure


@in_style
def guesses(found: Sequence[Guess], columns: int = 4) -> Any:
    """Images above their five best labels, the right one marked (figure 4, left)."""
    rows = math.ceil(len(found) / columns)
    figure, axes = _figure(2.75 * rows, 2 * rows, columns, height_ratios=[1.7, 1] * rows)
    for one in axes.flat:
        one.set_axis_off()
    for place, guess in enumerate(found):
        row, column = divmod(place, columns)
        picture, bars = axes[2 * row, column], axes[2 * row + 1, column]
        picture.imshow(guess.image)
        picture.set_title(shortened(guess.title, 20), fontweight="bold")
        _bars(bars, guess)
    return figure


def _bars(axes: Any, guess: Guess) -> None:
    """Bars with their labels on them; the right class has another colour and bold text."""
    axes.set(xlim=(0, 1), ylim=(len(guess.labels) - 0.5, -0.5))
    for place, (label, probability) in enumerate(zip(guess.labels, guess.probabilities)):
        right = label == guess.right
        axes.barh(place, probability, height=0.8, color=ORANGE if right else SKY)
        words = shortened(label, 22) + f"  {probability:.0%}"
        weight = "bold" if right else "normal"
        text = axes.text(
            0.02, place, words, va="center", fontsize=7, fontweight=weight, clip_on=True
        )
        text.set_in_layout(False)  # or a long label would squeeze the picture


@in_style
def neighbours(
    queries: Sequence[tuple[np.ndarray, str]], nearest: Sequence[Sequence[tuple[np.ndarray, str]]]
) -> Any:
    """Query images, each in a row with the images nearest to it, and their classes (figure 4).

    Args:
      queries: image (s, s, 3) uint8 and class.
      nearest: the same, per query, nearest first. A class other than the query's is marked.
    """
    columns = 1 + max(map(len, nearest))
    figure, axes = _figure(1.18 * len(queries), len(queries), columns)
    for row, (query, found) in enumerate(zip(queries, nearest)):
        for one, (image, label) in zip(axes[row], [query, *found]):
            one.imshow(image)
            one.set(xticks=[], yticks=[])
            same = label == query[1]
            words = shortened(label, 14)
            one.set_xlabel(words if same else f"≠ {words}", fontsize=7, labelpad=2,
                           color="black" if same else RED)  # fmt: skip
            for spine in one.spines.values():
                spine.set_visible(one is axes[row, 0])
                spine.set(color=BLUE, linewidth=2)
        for one in axes[row, 1 + len(found) :]:
            one.set_axis_off()
    axes[0, 0].set_title("query", fontweight="bold")
    axes[0, 1].set_title("nearest in training", loc="left", fontweight="bold")
    return figure
