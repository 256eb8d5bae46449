"""Lists a sample's augmentation parameters as text.

for slot, (sample_id, texts) in enumerate(zip(ids, list_parameters(recipe, epoch, ids, order.copies, index))):
    print(slot, sample_id, texts)        # {"crop": "y 12 x 34 h 200 w 180", "flip": "yes", "operators": "rotate -24.1, invert", …}
"""

import numpy as np

from data.augment.randaugment import Layer, Operator
from data.augment.recipe import Recipe
from data.augment.sampling import Mix
from data.dataset.index import Index, read_key


def list_parameters(recipe: Recipe, epoch: int, ids: np.ndarray, copies: np.ndarray, index: Index) -> list[dict[str, str]]:
    """Lists, for each sample, the name and value of each augmentation parameter that the settings use.

    `ids` and `copies` are those of consecutive slots that start at an even one. Both samples of a pair have the same `mix`.
    """
    drawn = recipe.draw(epoch, ids, copies, index.samples[ids])
    columns = {
        "crop": [_format_box(*box) for box in drawn.crops.tolist()],
        "flip": ["yes" if flipped else "no" for flipped in drawn.mirrored.tolist()],
    }
    if drawn.layers:
        columns["operators"] = [_format_operators([layer for layer, _ in drawn.layers], number) for number in range(len(ids))]
    if drawn.erased is not None:
        columns["erased"] = [", ".join(_format_box(*box) for box in boxes if box[2]) or "no" for boxes in drawn.erased.boxes.tolist()]
    mix = recipe.draw_mix(epoch, ids, copies)
    if mix is not None:
        columns["mix"] = np.repeat(_format_mixes(mix), 2)[: len(ids)].tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _format_box(y: int, x: int, height: int, width: int) -> str:
    return f"y {y} x {x} h {height} w {width}"


def _format_operators(layers: list[Layer], number: int) -> str:
    """Formats the operators applied to one sample, in order, with their arguments."""
    texts = []
    for layer in layers:
        operator, argument = Operator(layer.operator[number]), layer.argument[number]
        if operator in (Operator.AUTO_CONTRAST, Operator.EQUALIZE, Operator.INVERT):
            texts.append(operator.name.lower())
        elif operator != Operator.NONE:
            texts.append(f"{operator.name.lower()} {argument:.3g}")
    return ", ".join(texts) or "no"


def _format_mixes(mix: Mix) -> list[str]:
    texts = []
    for (y0, y1, x0, x1), share in zip(mix.box.tolist(), mix.lam.tolist(), strict=True):
        is_cutmix = y1 > y0 and x1 > x0
        texts.append(f"cutmix {share:.2f} y {y0}:{y1} x {x0}:{x1}" if is_cutmix else f"mixup {share:.2f}")
    return texts


def format_slots(epoch: int, step: int, ids: np.ndarray, parameters: list[dict[str, str]], index: Index) -> list[str]:
    """Formats one line of name=value pairs per slot of a step's global batch; `parameters` are those of list_parameters."""
    labels = index.samples["label"][ids].tolist()
    lines = []
    for slot, (sample_id, label, texts) in enumerate(zip(ids.tolist(), labels, parameters, strict=True)):
        sample = {"epoch": epoch, "step": step, "slot": slot, "key": read_key(index, sample_id), "class": index.classes[label]}
        lines.append("  ".join(f"{name}={value}" for name, value in (sample | texts).items()))
    return lines
