"""What is drawn for each sample, in words, for people to read.

for slot, (sample_id, drawn) in enumerate(zip(ids, parameters(recipe, epoch, ids, order.copies, index))):
    print(slot, sample_id, drawn)        # {"crop": "y 12 x 34 h 200 w 180", "flip": "yes", "operators": "rotate -24.1, invert", …}
"""

import numpy as np

from data.augment.randaugment import Layer, Operator
from data.augment.recipe import Recipe
from data.augment.sampling import Mix
from data.dataset.index import Index, read_key


def parameters(recipe: Recipe, epoch: int, ids: np.ndarray, copies: np.ndarray, index: Index) -> list[dict[str, str]]:
    """Of samples in the order of their slots, from an even one on: the name of each parameter and its value. What the settings never
    ask for is not there; both samples of a pair have the same `mix`."""
    drawn = recipe.draw(epoch, ids, copies, index.samples[ids])
    columns = {
        "crop": [f"y {y} x {x} h {h} w {w}" for y, x, h, w in drawn.crops.tolist()],
        "flip": ["yes" if flipped else "no" for flipped in drawn.mirrored.tolist()],
    }
    if drawn.layers:
        columns["operators"] = [_operators([layer for layer, _ in drawn.layers], number) for number in range(len(ids))]
    if drawn.erased is not None:
        columns["erased"] = [
            ", ".join(f"y {y} x {x} h {h} w {w}" for y, x, h, w in boxes if h) or "no" for boxes in drawn.erased.boxes.tolist()
        ]
    mix = recipe.mix(epoch, ids, copies)
    if mix is not None:
        columns["mix"] = np.repeat(_mixes(mix), 2)[: len(ids)].tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _operators(layers: list[Layer], number: int) -> str:
    """Those applied to one sample, in order, with their arguments."""
    texts = []
    for layer in layers:
        operator, argument = Operator(layer.operator[number]), layer.argument[number]
        if operator in (Operator.AUTO_CONTRAST, Operator.EQUALIZE, Operator.INVERT):
            texts.append(operator.name.lower())
        elif operator != Operator.NONE:
            texts.append(f"{operator.name.lower()} {argument:.3g}")
    return ", ".join(texts) or "no"


def _mixes(mix: Mix) -> list[str]:
    texts = []
    for (y0, y1, x0, x1), share in zip(mix.box.tolist(), mix.lam.tolist(), strict=True):
        cut = y1 > y0 and x1 > x0
        texts.append(f"cutmix {share:.2f} y {y0}:{y1} x {x0}:{x1}" if cut else f"mixup {share:.2f}")
    return texts


def lines(epoch: int, step: int, ids: np.ndarray, drawn: list[dict[str, str]], index: Index) -> list[str]:
    """A line a slot of a step's global batch: name=value, two blanks apart."""
    labels = index.samples["label"][ids].tolist()
    found = []
    for slot, (sample_id, label, own) in enumerate(zip(ids.tolist(), labels, drawn, strict=True)):
        about = {"epoch": epoch, "step": step, "slot": slot, "key": read_key(index, sample_id), "class": index.classes[label]}
        found.append("  ".join(f"{name}={value}" for name, value in {**about, **own}.items()))
    return found
