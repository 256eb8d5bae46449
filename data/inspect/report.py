"""Describes a dataset: as text, or as a .png or .html with plots and a contact sheet of random samples.

    python -m data stats SHARDS [--out report.png|report.html]

The text needs only the index. A .html embeds its images and loads nothing from a network.
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
_MAX_LISTED_CLASSES = 24  # a dataset with more classes is summarized
_SIDES = (0, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 1 << 16)
_RATIOS = (0.0, 0.33, 0.5, 0.66, 0.74, 0.9, 1.1, 1.3, 1.4, 1.6, 2.0, 3.0, np.inf)
_COLUMNS, _ROWS = 8, 6  # contact sheet
_THUMBNAIL = 180  # pixels of the longer side
_COLOR = "#3b6ea8"


def list_facts(index: Index) -> dict[str, str]:
    """Lists counts, bytes and image sizes of a dataset by name."""
    total = sum(shard.bytes for shard in index.shards)
    sizes, width, height = _read_columns(index, "size", "width", "height")
    return {
        "dataset": index.place,
        "fingerprint": index.fingerprint,
        "samples": str(len(index)),
        "classes": f"{len(index.classes)}, samples per class {_format_spread(count_classes(index))}",
        "shards": f"{len(index.shards)}, {total / 1e9:.3f} GB, samples per shard {_format_spread(np.diff(index.shard_start))}",
        "image bytes": f"{_format_spread(sizes)}, mean {sizes.mean(dtype=np.float64):.0f}",
        "width": _format_spread(width),
        "height": _format_spread(height),
        "width/height": _format_spread(width.astype(np.float32) / height, digits=2),
    }


def format_stats(index: Index) -> str:
    """Formats the facts, and histograms of classes and image sizes, in lines of at most 80 columns."""
    counts = count_classes(index)
    width, height = _read_columns(index, "width", "height")
    if len(counts) <= _MAX_LISTED_CLASSES:
        balance = format_bars("samples per class", list(index.classes), counts)
    else:
        edges = _choose_class_edges(int(counts.min()), int(counts.max()))
        balance = format_bars("classes by number of samples", *count_bins(counts, edges))
        order = np.argsort(counts, kind="stable")
        for title, labels in (("fewest:", order[:3]), ("most:", order[:-4:-1])):
            balance.append(f"{title:>20} {', '.join(f'{index.classes[label]} ({counts[label]})' for label in labels)}")
    return "\n".join(
        [
            *(f"{name:<12} {value}" for name, value in list_facts(index).items()),
            *balance,
            *format_bars("images by pixels of the shorter side", *count_bins(np.minimum(width, height), _SIDES)),
            *format_bars("images by width/height", *count_bins(width.astype(np.float32) / height, _RATIOS)),
        ]
    )


def count_classes(index: Index) -> np.ndarray:
    """Counts the samples of each class, int64 (classes,). Raises ValueError for labels without a class."""
    (labels,) = _read_columns(index, "label")
    counts = np.bincount(labels, minlength=len(index.classes))
    if len(counts) > len(index.classes):
        raise ValueError(f"{index.folder}: labels up to {len(counts) - 1} in {len(index.classes)} classes; see `python -m data verify`")
    return counts


def _read_columns(index: Index, *names: str) -> list[np.ndarray]:
    return [np.ascontiguousarray(index.samples[name]) for name in names]


def _format_spread(values: np.ndarray, digits: int = 0) -> str:
    return f"{values.min():.{digits}f} to {values.max():.{digits}f}, median {np.median(values):.{digits}f}"


def _choose_class_edges(low: int, high: int) -> list[int]:
    """Chooses bins of equal width, or 0, 1, 2, 5, 10, 20 … for numbers that span more than a power of ten."""
    if high < 10 * low:
        width = -(-(high + 1 - low) // 10)
        return list(range(low, high + width + 1, width))
    return [0, *(step * 10**power for power in range(len(str(high))) for step in (1, 2, 5)), 10 ** len(str(high))]


def count_bins(values: np.ndarray, edges: Sequence[float]) -> tuple[list[str], np.ndarray]:
    """Counts the values in each bin [edges[i], edges[i + 1]).

    Returns names and counts from the first to the last filled bin.
    """
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges) - 1)
    first, last = np.flatnonzero(counts)[[0, -1]].tolist()
    return [_name_bin(edges[number], edges[number + 1]) for number in range(first, last + 1)], counts[first : last + 1]


def _name_bin(low: float, high: float) -> str:
    if isinstance(low, int) and isinstance(high, int):
        return str(low) if high == low + 1 else f"{low} to {high - 1}"
    return f"{low:.2f} to {high:.2f}" if high < np.inf else f"{low:.2f} and more"


def format_bars(title: str, names: Sequence[str], counts: np.ndarray) -> list[str]:
    """Formats a histogram as an empty line, the title, and one bar per count."""
    lines = ["", title]
    for name, count in zip(names, counts.tolist(), strict=True):
        eighths = 8 * _BAR_COLUMNS * count / max(counts.max(), 1)
        whole, part = divmod(max(round(eighths), 1 if count else 0), 8)
        bar = "█" * whole + _EIGHTHS[part].strip()
        lines.append(f"{shorten(name, 20):>20} {bar:<{_BAR_COLUMNS}} {count:>10} {count / max(counts.sum(), 1):>7.2%}")
    return lines


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A sample on a contact sheet; `picture` is None if the image can't be decoded."""

    picture: Image.Image | None
    class_name: str
    size: str
    key: str


def load_thumbnails(index: Index, count: int, seed: int) -> list[Thumbnail]:
    """Loads `count` random samples from as many shards as possible."""
    random = np.random.default_rng(seed)
    shards = np.resize(random.permutation(len(index.shards)), count)
    ids: list[int] = []
    for shard, times in enumerate(np.bincount(shards, minlength=len(index.shards)).tolist()):
        first, end = index.shard_start[shard : shard + 2].tolist()
        ids += (first + random.choice(end - first, min(times, end - first), replace=False)).tolist()
    with ShardStore(index) as store:
        return [_load_thumbnail(index, store, sample_id) for sample_id in random.permutation(ids).tolist()]


def _load_thumbnail(index: Index, store: ShardStore, sample_id: int) -> Thumbnail:
    row = index.samples[sample_id]
    picture = None
    with suppress(Exception):  # Pillow's decoders raise errors of many types
        image = Image.open(io.BytesIO(store.read(sample_id).tobytes()))
        image.draft("RGB", (_THUMBNAIL, _THUMBNAIL))
        picture = image.convert("RGB")
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return Thumbnail(picture, index.classes[row["label"]], f"{row['width']} x {row['height']}", read_key(index, sample_id))


def write_report(index: Index, out: Path, *, seed: int = 0) -> None:
    """Writes a .png or .html with the facts, two plots and a contact sheet. Raises ValueError for another file extension."""
    renderers = {".png": _render_picture, ".html": _render_page}
    if out.suffix not in renderers:
        raise ValueError(f"{out}: a report is a .png or a .html")
    thumbnails = load_thumbnails(index, _COLUMNS * _ROWS, seed)
    with warnings.catch_warnings(action="ignore"):  # matplotlib warns of class names in letters that its font lacks
        out.write_bytes(renderers[out.suffix](index, thumbnails))


def _render_picture(index: Index, thumbnails: Sequence[Thumbnail]) -> bytes:
    from matplotlib.figure import Figure

    rows = -(-len(thumbnails) // _COLUMNS)
    heights = [1.9, 3.4, 1.75 * rows]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    head, plots, sheet = figure.subfigures(3, 1, squeeze=False, height_ratios=heights).ravel()
    lines = "\n".join(f"{name:<12} {value}" for name, value in list_facts(index).items())
    head.text(0.01, 0.5, lines, family="monospace", va="center", parse_math=False)
    _plot(plots, index)
    cells = sheet.subplots(rows, _COLUMNS, squeeze=False).ravel()
    sheet.suptitle(f"{len(thumbnails)} random samples")
    for axes in cells:
        axes.set_axis_off()
    for axes, thumbnail in zip(cells, thumbnails, strict=False):
        if thumbnail.picture is None:
            axes.text(0.5, 0.5, "can't be\ndecoded", ha="center", va="center", color="red")
        else:
            axes.imshow(thumbnail.picture)
        axes.set_title(f"{shorten(thumbnail.class_name)}\n{thumbnail.size}", fontsize=7, parse_math=False)
    return render_png(figure, dpi=110)


def _plot(figure: "FigureBase", index: Index) -> None:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FixedLocator, NullLocator

    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    counts = count_classes(index)
    if len(counts) <= _MAX_LISTED_CLASSES:
        left.barh(range(len(counts)), counts, color=_COLOR)
        left.set_yticks(range(len(counts)), [shorten(name) for name in index.classes], parse_math=False)
        left.invert_yaxis()
        left.set_xlabel("samples")
    else:
        left.fill_between(np.arange(1, len(counts) + 1), np.sort(counts)[::-1], step="mid", color=_COLOR)
        left.set_xlabel("classes, the largest first")
        left.set_ylabel("samples")
        left.margins(x=0)
        left.set_ylim(bottom=0)
    left.set_title("Samples per class")

    width, height = _read_columns(index, "width", "height")
    low, high = int(min(width.min(), height.min())), int(max(width.max(), height.max())) + 1
    bins = int(np.clip(np.sqrt(len(index)) / 2, 10, 80))
    edges = np.geomspace(low, high, bins + 1)
    images, _, _ = np.histogram2d(height, width, bins=[edges, edges])
    norm = LogNorm() if images.max() > 100 else Normalize(0)
    mesh = right.pcolormesh(edges, edges, np.ma.masked_equal(images, 0), norm=norm, cmap="viridis")
    figure.colorbar(mesh, ax=right, label="images")
    right.plot([low, high], [low, high], color="black", linewidth=0.5, alpha=0.5)
    right.set(xscale="log", yscale="log", xlabel="width in pixels", ylabel="height in pixels", title="Image sizes", aspect="equal")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(FixedLocator([side for side in _SIDES if low <= side <= high]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:.0f}")


def render_png(figure: "Figure", dpi: int) -> bytes:
    """Renders a figure as a PNG; equal figures give equal bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def shorten(name: str, characters: int = 24) -> str:
    """Shortens a class name, by default to fit over an image."""
    return name if len(name) <= characters else name[: characters - 1] + "…"


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1240px; padding: 0 1em; color: #222; background: #fff; }
table { border-collapse: collapse; } td { padding: .15em 1.2em .15em 0; vertical-align: top; } td:first-child { color: #666; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 14px 10px; }
figure { margin: 0; } figure div { height: 150px; display: flex; align-items: end; justify-content: center; background: #f4f4f4; }
figure img { max-width: 100%; max-height: 150px; } figcaption { font-size: 12px; overflow-wrap: anywhere; } small { color: #777; }
"""


def _render_page(index: Index, thumbnails: Sequence[Thumbnail]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    _plot(figure, index)
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(value)}" for name, value in list_facts(index).items())
    sheet = []
    for thumbnail in thumbnails:
        image = "can't be decoded" if thumbnail.picture is None else f"<img src='{_encode_data_url(thumbnail.picture)}' alt=''>"
        name, key = html.escape(thumbnail.class_name), html.escape(thumbnail.key)
        sheet.append(f"<figure title='{key}'><div>{image}</div><figcaption>{name}<br><small>{thumbnail.size}</small></figcaption></figure>")
    plots = base64.b64encode(render_png(figure, dpi=200)).decode()
    title = html.escape(index.folder.name)
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f"<table>{rows}</table><p><img src='data:image/png;base64,{plots}' width=100% alt='class balance and image sizes'>"
        f"<h2>{len(thumbnails)} random samples</h2><div class=sheet>{''.join(sheet)}</div>"
    )
    return page.encode(errors="backslashreplace")


def _encode_data_url(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
