"""Describes a dataset for people: as text, or as a picture or a page with plots and a contact sheet of random samples.

    python -m data stats SHARDS [--out report.png|report.html]

The text needs the index alone. A page holds its pictures itself and asks nothing of a network.
"""

import base64
import html
import io
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data.dataset.index import Index, read_key
from data.loader.store import ShardStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

_BAR_COLUMNS = 36
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FEW_CLASSES = 24  # are shown one by one
_SIDES = (0, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 1 << 16)
_RATIOS = (0.0, 0.33, 0.5, 0.66, 0.74, 0.9, 1.1, 1.3, 1.4, 1.6, 2.0, 3.0, np.inf)
_ACROSS, _DOWN = 8, 6  # samples on a contact sheet
_THUMBNAIL = 180  # pixels of its longer side
_COLOUR = "#3b6ea8"


def facts(index: Index) -> dict[str, str]:
    """What is in a dataset, in a line each: counts, bytes, sizes in pixels."""
    total = sum(shard.bytes for shard in index.shards)
    sizes, width, height = _columns(index, "size", "width", "height")
    return {
        "dataset": index.place,
        "fingerprint": index.fingerprint,
        "samples": str(len(index)),
        "classes": f"{len(index.classes)}, samples a class {_spread(class_counts(index))}",
        "shards": f"{len(index.shards)}, {total / 1e9:.3f} GB, samples a shard {_spread(np.diff(index.shard_start))}",
        "image bytes": f"{_spread(sizes)}, mean {sizes.mean(dtype=np.float64):.0f}",
        "width": _spread(width),
        "height": _spread(height),
        "width/height": _spread(width.astype(np.float32) / height, digits=2),
    }


def stats(index: Index) -> str:
    """The facts, and how classes and sizes spread, as lines of at most 80 columns (a long path aside)."""
    counts = class_counts(index)
    width, height = _columns(index, "width", "height")
    if len(counts) <= _FEW_CLASSES:
        balance = bars("samples of each class", list(index.classes), counts)
    else:
        balance = bars("classes with so many samples", *binned(counts, _class_edges(int(counts.min()), int(counts.max()))))
        order = np.argsort(counts, kind="stable")
        for what, labels in (("fewest:", order[:3]), ("most:", order[:-4:-1])):
            balance.append(f"{what:>20} {', '.join(f'{index.classes[label]} ({counts[label]})' for label in labels)}")
    return "\n".join(
        [
            *(f"{name:<12} {value}" for name, value in facts(index).items()),
            *balance,
            *bars("images with so many pixels on the shorter side", *binned(np.minimum(width, height), _SIDES)),
            *bars("images with such a width/height", *binned(width.astype(np.float32) / height, _RATIOS)),
        ]
    )


def class_counts(index: Index) -> np.ndarray:
    """Samples of each class, int64 (classes,). Raises ValueError for labels without a class."""
    (labels,) = _columns(index, "label")
    counts = np.bincount(labels, minlength=len(index.classes))
    if len(counts) > len(index.classes):
        raise ValueError(f"{index.folder}: labels up to {len(counts) - 1} in {len(index.classes)} classes; see `python -m data verify`")
    return counts


def _columns(index: Index, *names: str) -> list[np.ndarray]:
    return [np.ascontiguousarray(index.samples[name]) for name in names]


def _spread(values: np.ndarray, digits: int = 0) -> str:
    return f"{values.min():.{digits}f} to {values.max():.{digits}f}, median {np.median(values):.{digits}f}"


def _class_edges(low: int, high: int) -> list[int]:
    """Bins for samples a class: equally wide, or, where the numbers span more than a power of ten, 0, 1, 2, 5, 10, 20, 50 …"""
    if high < 10 * low:
        width = -(-(high + 1 - low) // 10)
        return list(range(low, high + width + 1, width))
    return [0, *(step * 10**power for power in range(len(str(high))) for step in (1, 2, 5)), 10 ** len(str(high))]


def binned(values: np.ndarray, edges: Sequence[float]) -> tuple[list[str], np.ndarray]:
    """Names of the bins [edges[i], edges[i + 1]) and how many values lie in each, from the first that has some to the last."""
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges) - 1)
    first, last = np.flatnonzero(counts)[[0, -1]].tolist()
    return [_bin_name(edges[place], edges[place + 1]) for place in range(first, last + 1)], counts[first : last + 1]


def _bin_name(low: float, high: float) -> str:
    if isinstance(low, int) and isinstance(high, int):
        return str(low) if high == low + 1 else f"{low} to {high - 1}"
    return f"{low:.2f} to {high:.2f}" if high < np.inf else f"{low:.2f} and more"


def bars(title: str, names: Sequence[str], counts: np.ndarray) -> list[str]:
    """A histogram as lines of text, after an empty one."""
    lines = ["", title]
    for name, count in zip(names, counts.tolist(), strict=True):
        eighths = 8 * _BAR_COLUMNS * count / max(counts.max(), 1)
        whole, part = divmod(max(round(eighths), 1 if count else 0), 8)
        bar = "█" * whole + _EIGHTHS[part].strip()
        short = name if len(name) <= 20 else name[:19] + "…"
        lines.append(f"{short:>20} {bar:<{_BAR_COLUMNS}} {count:>10} {count / max(counts.sum(), 1):>7.2%}")
    return lines


@dataclass(frozen=True, eq=False)
class Drawn:
    """A sample of a contact sheet; `picture` is None where the image can't be decoded."""

    picture: Image.Image | None
    class_name: str
    size: str
    key: str


def draw(index: Index, count: int, seed: int) -> list[Drawn]:
    """Random samples, from as many shards as possible."""
    random = np.random.default_rng(seed)
    shards = np.resize(random.permutation(len(index.shards)), count)
    ids: list[int] = []
    for shard, times in enumerate(np.bincount(shards, minlength=len(index.shards)).tolist()):
        first, end = index.shard_start[shard : shard + 2].tolist()
        ids += (first + random.choice(end - first, min(times, end - first), replace=False)).tolist()
    with ShardStore(index) as store:
        return [_drawn(index, store, sample_id) for sample_id in random.permutation(ids).tolist()]


def _drawn(index: Index, store: ShardStore, sample_id: int) -> Drawn:
    row = index.samples[sample_id]
    picture = None
    with suppress(Exception):  # Pillow's decoders raise whatever the damage leads them to
        image = Image.open(io.BytesIO(store.read(sample_id).tobytes()))
        image.draft("RGB", (_THUMBNAIL, _THUMBNAIL))
        picture = image.convert("RGB")
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return Drawn(picture, index.classes[row["label"]], f"{row['width']} x {row['height']}", read_key(index, sample_id))


def write_report(index: Index, out: Path, *, seed: int = 0) -> None:
    """Writes a .png or a .html with the facts, two plots and a contact sheet of random samples, which `seed` draws.

    Raises ValueError for another kind of file.
    """
    kinds = {".png": _picture, ".html": _page}
    if out.suffix not in kinds:
        raise ValueError(f"{out}: a report is a .png or a .html")
    drawn = draw(index, _ACROSS * _DOWN, seed)
    with warnings.catch_warnings(action="ignore"):  # matplotlib's, of class names in letters that its font lacks
        out.write_bytes(kinds[out.suffix](index, drawn))


def _picture(index: Index, drawn: Sequence[Drawn]) -> bytes:
    from matplotlib.figure import Figure

    rows = -(-len(drawn) // _ACROSS)
    heights = [1.9, 3.4, 1.75 * rows]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    head, plots, sheet = figure.subfigures(3, 1, squeeze=False, height_ratios=heights).ravel()
    lines = "\n".join(f"{name:<12} {value}" for name, value in facts(index).items())
    head.text(0.01, 0.5, lines, family="monospace", va="center", parse_math=False)
    _plot(plots, index)
    cells = sheet.subplots(rows, _ACROSS, squeeze=False).ravel()
    sheet.suptitle(f"{len(drawn)} random samples")
    for axes in cells:
        axes.set_axis_off()
    for axes, sample in zip(cells, drawn, strict=False):
        if sample.picture is None:
            axes.text(0.5, 0.5, "can't be\ndecoded", ha="center", va="center", color="red")
        else:
            axes.imshow(sample.picture)
        axes.set_title(f"{short(sample.class_name)}\n{sample.size}", fontsize=7, parse_math=False)
    return saved(figure, dpi=110)


def _plot(figure: "FigureBase", index: Index) -> None:
    """Class balance and image sizes, side by side."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FixedLocator, NullLocator

    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    counts = class_counts(index)
    if len(counts) <= _FEW_CLASSES:
        left.barh(range(len(counts)), counts, color=_COLOUR)
        left.set_yticks(range(len(counts)), [short(name) for name in index.classes], parse_math=False)
        left.invert_yaxis()
        left.set_xlabel("samples")
    else:
        left.fill_between(np.arange(1, len(counts) + 1), np.sort(counts)[::-1], step="mid", color=_COLOUR)
        left.set_xlabel("classes, the largest first")
        left.set_ylabel("samples")
        left.margins(x=0)
        left.set_ylim(bottom=0)
    left.set_title("Samples of each class")

    width, height = _columns(index, "width", "height")
    low, high = int(min(width.min(), height.min())), int(max(width.max(), height.max())) + 1
    bins = int(np.clip(np.sqrt(len(index)) / 2, 10, 80))
    edges = np.geomspace(low, high, bins + 1)
    column, row = ((np.searchsorted(edges, side, side="right") - 1).clip(0, bins - 1) for side in (width, height))
    images = np.bincount(row * bins + column, minlength=bins * bins).reshape(bins, bins)
    norm = LogNorm() if images.max() > 100 else Normalize(0)
    mesh = right.pcolormesh(edges, edges, np.ma.masked_equal(images, 0), norm=norm, cmap="viridis")
    figure.colorbar(mesh, ax=right, label="images")
    right.plot([low, high], [low, high], color="black", linewidth=0.5, alpha=0.5)
    right.set(xscale="log", yscale="log", xlabel="width in pixels", ylabel="height in pixels", title="Image sizes", aspect="equal")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(FixedLocator([side for side in _SIDES if low <= side <= high]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:.0f}")


def saved(figure: "Figure", dpi: int) -> bytes:
    """A figure as a PNG, the same bytes for the same figure."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def short(name: str) -> str:
    """A class name that fits over a picture."""
    return name if len(name) <= 24 else name[:23] + "…"


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1240px; padding: 0 1em; color: #222; background: #fff; }
table { border-collapse: collapse; } td { padding: .15em 1.2em .15em 0; vertical-align: top; } td:first-child { color: #666; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 14px 10px; }
figure { margin: 0; } figure div { height: 150px; display: flex; align-items: end; justify-content: center; background: #f4f4f4; }
figure img { max-width: 100%; max-height: 150px; } figcaption { font-size: 12px; overflow-wrap: anywhere; } small { color: #777; }
"""


def _page(index: Index, drawn: Sequence[Drawn]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    _plot(figure, index)
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(value)}" for name, value in facts(index).items())
    sheet = []
    for sample in drawn:
        shown = "can't be decoded" if sample.picture is None else f"<img src='{_data_url(sample.picture)}' alt=''>"
        name, key = html.escape(sample.class_name), html.escape(sample.key)
        sheet.append(f"<figure title='{key}'><div>{shown}</div><figcaption>{name}<br><small>{sample.size}</small></figcaption></figure>")
    plots = base64.b64encode(saved(figure, dpi=200)).decode()
    title = html.escape(index.folder.name)
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f"<table>{rows}</table><p><img src='data:image/png;base64,{plots}' width=100% alt='class balance and image sizes'>"
        f"<h2>{len(drawn)} random samples</h2><div class=sheet>{''.join(sheet)}</div>"
    )
    return page.encode(errors="backslashreplace")


def _data_url(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
