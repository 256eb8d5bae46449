"""Judges weights: by their accuracy, or by what their backbone's features are good for.

    python -m pretrain evaluate SOURCE [CONFIG] [key=value …] [--weights raw|ema] [--probe N]

SOURCE is a run, a checkpoint, or weights in any of the formats that a job starts from. CONFIG says by what to judge them: model.name and
model.classes, which must be those of the weights; data.val, image size, resize, normalisation, precision. Without it a run is
judged by its own settings. --probe N asks what the backbone's features are good for (probe.py): classifiers on those of at most N
images a class of data.train are tried on data.val.

Every rank of a job runs this, or one process by itself.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data.common.placement import Placement
from data.dataset.index import Index, open_index
from data.loader.loaders import EvalLoader
from pretrain import config as settings
from pretrain.config import Config
from pretrain.engine import distributed
from pretrain.engine.distributed import all_gather_rows
from pretrain.engine.precision import DTYPES, usable_precision
from pretrain.evaluation.accuracy import evaluate, matched, none_left, restriction
from pretrain.evaluation.probe import NEIGHBOURS, LinearProbe, drawn_samples, features, knn_hits
from pretrain.model.build import build_model
from pretrain.model.fast.kernel_choice import use_kernels
from pretrain.model.formats import some
from pretrain.monitor.damage import check_shards, describe_bad_image, share_bad_images
from pretrain.weights.initial import HEAD, misfits, read_source, variant
from pretrain.weights.run_model import build_trained, is_run

# Of CONFIG: what a job starts from doesn't matter here, and whether there is training data is asked when it is needed.
_UNCHECKED = ("data.train", "model.init_from")


@dataclass(frozen=True)
class Weights:
    """A model with weights, the settings to judge it by, the names of its head's classes where they are known, and what it is."""

    model: nn.Module
    config: Config
    classes: tuple[str, ...] | None
    title: str


def judge(source: Path, config: Path | None, overrides: list[str], *, average: bool, probe: int | None) -> None:
    """Prints, on rank 0, how good weights are.

    Raises:
        ValueError: settings, weights and data do not fit each other, or too many images are bad.
    """
    if probe is not None and probe < 1:
        raise ValueError(f"--probe {probe}: it takes at least 1 image a class")
    distributed.join()
    weights = open_weights(source, config, overrides, average=average, headless=probe is not None)
    data, engine = weights.config.data, weights.config.engine
    device = distributed.rank_device(engine)
    if data.val is None:
        raise ValueError(f"{config or source}: its data.val is not set; add data.val=FOLDER")
    val = open_index(data.val, data.cache)
    train = open_index(data.train, data.cache) if probe is not None else None
    head = _head(weights, source, val) if train is None else train.classes
    told = restriction(head, val, data.val_except)
    check_shards([val] if train is None else [val, train], checksums=data.check == "checksums")
    dtype = DTYPES[usable_precision(device, engine.precision)]
    _say(use_kernels(weights.model.to(device), weights.config.model.kernels, device, data.image_size, dtype))
    rank, hosts = dist.get_rank(), distributed.gather_hosts()
    placement = Placement(device, engine.micro_batch, rank, len(hosts), ranks_on_node=hosts.count(hosts[rank]))
    if train is not None and probe is not None:
        _probe(weights, train, val, probe, placement)
        return
    if told:
        _say(told)
    with EvalLoader(val, data, placement) as loader:
        found = evaluate(weights.model, loader, head, engine.precision)
        _tell_of_bad(loader)
    _say(
        f"{weights.title}: top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}, loss {found['loss']:.4f} "
        f"on {found['images']} images of {val.place}" + (f"; {found['left_out']} bad ones left out" if found["left_out"] else "")
    )


def open_weights(source: Path, config: Path | None, overrides: list[str], *, average: bool, headless: bool) -> Weights:
    """The weights at `source`, and the settings to judge them by. With `headless` they need no head.

    Raises:
        ValueError: there are none, or they are of another model than the settings', or there are no settings.
    """
    given = settings.load(config, overrides, _UNCHECKED) if config else None
    if is_run(source):
        model, own, trainer = build_trained(source, average)
        used = given or settings.override(own, overrides)
        keys = [key for key in ("name", "classes") if getattr(used.model, key) != getattr(own.model, key)]
        if keys:
            differ = ", ".join(f"model.{key}={getattr(used.model, key)}, there {getattr(own.model, key)}" for key in keys)
            raise ValueError(f"{source} is of another model than the settings: {differ}. Without CONFIG it is judged by its own settings")
        kind = "moving average" if average else "weights"
        return Weights(model, used, tuple(trainer["classes"]), f"{source} ({kind} of step {trainer['step']})")
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if given is None:
        raise ValueError(
            f"{source} has no checkpoints; weights of other kinds are judged by a CONFIG: python -m pretrain evaluate {source} CONFIG"
        )
    if average:
        raise ValueError(f"--weights ema is for runs and checkpoints; {source} holds one set of weights")
    found = read_source(source)
    _check_fit(source, found.weights, given, headless)
    given.model.classes = len(found.weights[HEAD[0]]) if HEAD[0] in found.weights else 0
    model = build_model(given)
    model.load_state_dict(found.weights)
    return Weights(model, given, found.classes, str(source))


def _check_fit(source: Path, weights: dict[str, torch.Tensor], config: Config, headless: bool) -> None:
    """Raises ValueError where weights are not those of the model that the settings name, and says of which they are."""
    shapes = {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}
    backbone = {name: shape for name, shape in shapes.items() if name not in HEAD}
    if misfits(backbone, weights) and (name := variant(weights)):
        raise ValueError(f"{source} holds weights of {name}, but model.name={config.model.name}; set model.name={name}")
    if HEAD[0] not in weights:
        if not headless:
            raise ValueError(f"{source} holds no head, so it can't classify; --probe 100 tells what its features are good for")
    elif len(weights[HEAD[0]]) != config.model.classes:
        there = len(weights[HEAD[0]])
        raise ValueError(f"the head in {source} has {there} classes, but model.classes={config.model.classes}; set model.classes={there}")
    if wrong := misfits(shapes if HEAD[0] in weights else backbone, weights):
        raise ValueError(f"{source} does not fit {config.model.name}: {some(wrong, '; ')}")


def _head(weights: Weights, source: Path, val: Index) -> tuple[str, ...]:
    """The names of the head's classes.

    Raises:
        ValueError: they are not known, and not as many as those of the data.
    """
    if weights.classes is not None:
        return weights.classes
    if weights.config.model.classes != len(val.classes):
        raise ValueError(
            f"{source} does not name its {weights.config.model.classes:,} classes, so they could only be those of data.val; "
            f"{val.place} has {len(val.classes):,}. Runs, and files that `export` wrote, name theirs"
        )
    _say(f"{source} does not name its classes: taken for the {len(val.classes):,} of {val.place}, in their order")
    return val.classes


def _probe(weights: Weights, train: Index, val: Index, per_class: int, placement: Placement) -> None:
    data, device = weights.config.data, placement.device
    rows, targets = matched(train.classes, val, data.val_except)
    samples = drawn_samples(train, rows, per_class)
    targets_of_train = torch.full((len(train.classes),), -1, device=device)
    targets_of_train[torch.from_numpy(rows).to(device)] = torch.arange(len(rows), device=device)
    with EvalLoader(train, data, placement, samples=samples) as loader:
        own, labels = features(weights.model, loader, weights.config.engine.precision)
        _tell_of_bad(loader)
        bank, bank_labels = all_gather_rows(own), all_gather_rows(targets_of_train[labels])
        if not len(bank):
            raise ValueError(none_left(loader))
    with EvalLoader(val, data, placement) as loader:
        queries, labels = features(weights.model, loader, weights.config.engine.precision)
        labels = torch.from_numpy(targets).to(device)[labels]
        _tell_of_bad(loader)
    linear = LinearProbe(bank, bank_labels, len(rows))
    found = torch.stack(
        [
            knn_hits(bank, bank_labels, queries, labels, len(rows)),
            linear.hits(queries, labels),
            torch.tensor([len(labels)] * 2, device=device),
        ]
    )
    dist.all_reduce(found)
    knn, probed, (images, _) = found.tolist()
    if not images:
        raise ValueError(none_left(loader))
    shares = [f"top-1 {top1 / images:.2%}, top-5 {top5 / images:.2%}" for top1, top5 in (knn, probed)]
    _say(
        f"{weights.title}, features of {len(bank)} images of {train.place} (at most {per_class} a class): {NEIGHBOURS} nearest neighbours "
        f"{shares[0]}; linear probe {shares[1]}; on {images} images of {val.place}, {len(rows):,} classes"
    )


def _tell_of_bad(loader: EvalLoader) -> None:
    """Collective. Raises ValueError where there are too many."""
    for bad in share_bad_images(loader.quarantine):
        _say(f"bad image: {describe_bad_image(loader.quarantine, bad)}")
    loader.quarantine.check()


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)
