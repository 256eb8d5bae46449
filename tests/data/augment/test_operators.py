"""Each operator of the DALI graph gives the pixels of timm's."""

import numpy as np
import pytest
from matplotlib import cbook
from nvidia.dali import fn, pipeline_def
from PIL import Image
from timm.data import auto_augment as timm_augment

from data.augment.operators import CpuResizer, apply_layer, compute_operator_inputs, resize
from data.augment.randaugment import Layer, Operator, draw_rand_augment
from data.settings import parse_policy

pytestmark = pytest.mark.slow

SIZE, COUNT = 224, 32
FILL = (124, 116, 104)
GEOMETRY = (Operator.ROTATE, Operator.SHEAR_X, Operator.SHEAR_Y, Operator.TRANSLATE_X, Operator.TRANSLATE_Y)
TIMM = {
    Operator.AUTO_CONTRAST: timm_augment.auto_contrast,
    Operator.EQUALIZE: timm_augment.equalize,
    Operator.INVERT: timm_augment.invert,
    Operator.ROTATE: timm_augment.rotate,
    Operator.POSTERIZE: timm_augment.posterize,
    Operator.SOLARIZE: timm_augment.solarize,
    Operator.SOLARIZE_ADD: timm_augment.solarize_add,
    Operator.COLOR: timm_augment.color,
    Operator.CONTRAST: timm_augment.contrast,
    Operator.BRIGHTNESS: timm_augment.brightness,
    Operator.SHARPNESS: timm_augment.sharpness,
    Operator.SHEAR_X: timm_augment.shear_x,
    Operator.SHEAR_Y: timm_augment.shear_y,
    Operator.TRANSLATE_X: timm_augment.translate_x_rel,
    Operator.TRANSLATE_Y: timm_augment.translate_y_rel,
}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Crops of a photograph, enlarged and reduced, and special cases: one color, two colors, a gray ramp."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        whole = Image.open(file).convert("RGB")
    draw = np.random.default_rng(0)
    crops = []
    for side in draw.integers(60, 500, COUNT - 3).tolist():
        x, y = draw.integers(0, whole.width - side), draw.integers(0, whole.height - side)
        crops.append(whole.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)))
    ramp = np.tile(np.arange(SIZE, dtype=np.uint8)[:, None, None], (1, SIZE, 3))
    two = np.where(np.arange(SIZE)[:, None, None] < 30, np.uint8(7), np.uint8(200)) * np.ones((1, SIZE, 3), np.uint8)
    return [*crops, Image.new("RGB", (SIZE, SIZE), (10, 20, 30)), Image.fromarray(two), Image.fromarray(ramp)]


def in_dali(photos: list[Image.Image], layers: list[Layer], *, mirrored: np.ndarray, linear: np.ndarray) -> list[np.ndarray]:
    """Applies the layers as the graph of a loader does, mirrored last."""
    feeds = [np.array(photo) for photo in photos], mirrored.astype(np.int32)
    inputs = [compute_operator_inputs(layer, mirrored, linear, SIZE) for layer in layers]

    @pipeline_def(enable_conditionals=True, exec_dynamic=True, batch_size=len(photos), num_threads=1, device_id=None)
    def graph():
        images, mirror, *nodes = fn.external_source(
            lambda: [*feeds, *(part for layer in inputs for part in layer)], num_outputs=2 + 3 * len(inputs), batch=True, layout=["HWC"]
        )
        for number in range(len(inputs)):
            images = apply_layer(images, *nodes[3 * number : 3 * number + 3], list(map(float, FILL)))
        return fn.flip(images, horizontal=mirror)

    (output,) = graph().run()
    return [np.array(output.at(number)) for number in range(len(photos))]


def in_timm(photo: Image.Image, operator: int, argument: float, *, mirrored: bool, linear: bool) -> np.ndarray:
    if mirrored:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    options = {"fillcolor": FILL, "resample": Image.Resampling.BILINEAR if linear else Image.Resampling.BICUBIC}
    whole = operator in (Operator.POSTERIZE, Operator.SOLARIZE, Operator.SOLARIZE_ADD)
    arguments = () if operator in (Operator.AUTO_CONTRAST, Operator.EQUALIZE, Operator.INVERT) else (int(argument) if whole else argument,)
    return np.array(TIMM[Operator(operator)](photo, *arguments, **(options if operator in GEOMETRY else {})))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize("operator", TIMM, ids=lambda operator: operator.name)
def test_operator_gives_timms_pixels(photos: list[Image.Image], operator: Operator) -> None:
    """With arguments as drawn for it, mirrored and not, in both interpolations."""
    layer = draw_rand_augment(0, 0, np.arange(20_000), parse_policy("rand-m9-mstd0.5-inc1"))[0]
    own = np.flatnonzero(layer.operator == operator)[: len(photos)]
    layer = Layer(layer.operator[own], layer.argument[own])
    mirrored, linear = np.arange(len(photos)) % 2 == 0, np.arange(len(photos)) % 4 < 2
    found = in_dali(photos, [layer], mirrored=mirrored, linear=linear)
    bound = 2 if operator in GEOMETRY else 1
    for place, photo in enumerate(photos):
        expected = in_timm(photo, operator, layer.argument[place], mirrored=mirrored[place], linear=linear[place])
        assert difference(found[place], expected) <= bound, f"photo {place}, argument {layer.argument[place]}"


@pytest.mark.parametrize(
    ("operator", "argument", "other"),
    [(Operator.ROTATE, 10.0, 11.0), (Operator.TRANSLATE_Y, 0.1, 0.11), (Operator.BRIGHTNESS, 1.2, 1.23), (Operator.SHARPNESS, 1.9, 0.9)],
)
def test_comparison_detects_another_argument(photos: list[Image.Image], operator: Operator, argument: float, other: float) -> None:
    layer = Layer(np.full(len(photos), operator, np.int32), np.full(len(photos), other))
    never = np.zeros(len(photos), bool)
    found = in_dali(photos, [layer], mirrored=never, linear=never)
    bound = 2 if operator in GEOMETRY else 1
    assert difference(found[0], in_timm(photos[0], operator, argument, mirrored=False, linear=False)) > bound


def test_extreme_arguments_give_timms_pixels(photos: list[Image.Image]) -> None:
    edges = [(Operator.POSTERIZE, bits) for bits in (0, 1, 7, 8)] + [(Operator.SOLARIZE, limit) for limit in (0, 1, 255, 256)]
    edges += [(Operator.SOLARIZE_ADD, 0), (Operator.SOLARIZE_ADD, 128), (Operator.ROTATE, 0), (Operator.ROTATE, 30), (Operator.NONE, 0)]
    edges += [(operator, factor) for operator in (Operator.BRIGHTNESS, Operator.CONTRAST, Operator.COLOR) for factor in (0, 1, 1.9)]
    layer = Layer(np.array([operator for operator, _ in edges], np.int32), np.array([float(argument) for _, argument in edges]))
    never = np.zeros(len(edges), bool)
    for photo in (photos[0], photos[-1]):
        found = in_dali([photo] * len(edges), [layer], mirrored=never, linear=never)
        for place, (operator, argument) in enumerate(edges):
            none = operator == Operator.NONE
            expected = np.array(photo) if none else in_timm(photo, operator, argument, mirrored=False, linear=False)
            assert difference(found[place], expected) <= 1, (operator.name, argument)


def test_graph_can_be_defined_for_a_gpu() -> None:
    """Needs no GPU: DALI checks the device of each node's inputs when the graph is defined."""

    @pipeline_def(enable_conditionals=True, exec_dynamic=True, batch_size=1, num_threads=1, device_id=0)
    def graph():
        encoded, size, linear, group, matrix, value = fn.external_source(lambda: None, num_outputs=6, batch=True)
        images = resize(fn.decoders.image(encoded, device="mixed"), size, linear, CpuResizer(1))
        output = apply_layer(images, group, matrix, value, list(map(float, FILL)))
        assert output.device == "gpu"
        return output

    graph()
