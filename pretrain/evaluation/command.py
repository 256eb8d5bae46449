"""The command `evaluate`: prints the accuracy of weights, or k-NN and linear-probe accuracy on the backbone's frozen features.

    python -m pretrain evaluate SOURCE [CONFIG] [key=value …] [--weights raw|ema] [--probe N]

SOURCE is a run, a checkpoint, or weights in any format that a job can start from. CONFIG has the settings of the evaluation: model.name and
model.classes, which must be those of the weights, data.val, image size, resize, normalization and precision. For a run, CONFIG defaults to
the run's settings. --probe N fits the classifiers of probe.py on at most N images per class of data.train and tests them on data.val.

Runs in a single process or on every rank of a job.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data.common.placement import Placement
from data.common.text import join_first
from data.dataset.index import Index, open_index
from data.loader.loaders import EvalLoader
from pretrain import config as settings
from pretrain.config import Config
from pretrain.engine import distributed
from pretrain.engine.distributed import all_gather_rows
from pretrain.evaluation.accuracy import describe_restriction, evaluate, format_result, match_classes, no_usable_image
from pretrain.evaluation.probe import NEIGHBORS, LinearProbe, extract_features, knn_correct, select_samples
from pretrain.model.build import build_model
from pretrain.model.fast.registry import find_fast_paths
from pretrain.monitor.damage import check_shards, describe_bad_image, share_bad_images
from pretrain.weights.run_model import build_trained, is_run
from pretrain.weights.source import Source, architecture, find_mismatches, head_keys, read_source

_UNCHECKED = ("data.train", "model.init_from")  # keys of CONFIG whose values are not checked


@dataclass(frozen=True)
class Weights:
    """A model with weights, the settings of its evaluation, the names of its head's classes (None: unknown), and a title for the output."""

    model: nn.Module
    config: Config
    classes: tuple[str, ...] | None
    title: str


def print_evaluation(source: Path, config: Path | None, overrides: list[str], *, average: bool, probe: int | None) -> None:
    """Evaluates weights and prints the result on rank 0. Collective.

    Args:
        source: a run, a checkpoint, or a file or folder of weights.
        config: the settings of the evaluation; None: the run's.
        overrides: `key=value`, applied to the settings.
        average: evaluate the moving average instead of the weights.
        probe: training images per class for k-NN and the linear probe; None: evaluate the head.

    Raises:
        ValueError: settings, weights and data do not match, or too many images are bad.
    """
    if probe is not None and probe < 1:
        raise ValueError(f"--probe {probe}: must be at least 1 image per class")
    distributed.join()
    weights = open_weights(source, config, overrides, average=average, needs_head=probe is None)
    data, engine = weights.config.data, weights.config.engine
    device = distributed.select_device(engine)
    if data.val is None:
        raise ValueError(f"{config or source}: its data.val is not set; add data.val=FOLDER")
    val = open_index(data.val, data.cache)
    train = open_index(data.train, data.cache) if probe is not None else None
    head = _head_classes(weights, source, val) if train is None else train.classes
    restriction = describe_restriction(head, val, data.val_except)
    check_shards([val] if train is None else [val, train], checksums=data.check == "checksums")
    weights.model.to(device)
    if device.type == "cpu" and (paths := find_fast_paths(weights.model)):
        paths.use_cpu_path(weights.model)
    rank, hosts = dist.get_rank(), distributed.gather_hosts()
    placement = Placement(device, engine.micro_batch, rank, len(hosts), ranks_on_node=hosts.count(hosts[rank]))
    if train is not None and probe is not None:
        _print_once(_probe(weights, train, val, probe, placement))
        return
    if restriction:
        _print_once(restriction)
    with EvalLoader(val, data, placement) as loader:
        result = evaluate(weights.model, loader, head, engine.precision)
        _report_bad_images(loader)
    _print_once(f"{weights.title}: {format_result(result, f' of {val.place}')}")


def open_weights(source: Path, config: Path | None, overrides: list[str], *, average: bool, needs_head: bool) -> Weights:
    """Loads the weights at `source` and the settings of their evaluation; the arguments are those of `print_evaluation`.

    Raises:
        ValueError: there are no weights or no settings, they are of different models, or the weights lack a head that is needed.
    """
    given = settings.load(config, overrides, _UNCHECKED) if config else None
    if is_run(source):
        model, run_config, trainer = build_trained(source, average)
        used = given or settings.override(run_config, overrides)
        keys = [key for key in ("name", "classes") if getattr(used.model, key) != getattr(run_config.model, key)]
        if keys:
            differ = ", ".join(f"model.{key}={getattr(used.model, key)}, there {getattr(run_config.model, key)}" for key in keys)
            raise ValueError(f"{source} is of another model than the settings: {differ}. Omit CONFIG to use the run's settings")
        kind = "moving average" if average else "weights"
        return Weights(model, used, tuple(trainer["classes"]), f"{source} ({kind} of step {trainer['step']})")
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if given is None:
        raise ValueError(f"{source} has no checkpoints; other weights need a CONFIG: python -m pretrain evaluate {source} CONFIG")
    if average:
        raise ValueError(f"--weights ema is for runs and checkpoints; {source} holds one set of weights")
    model = build_model(given)
    loaded = read_source(source, model)
    _load(model, loaded, source, given, needs_head)
    return Weights(model, given, loaded.classes, str(source))


def _load(model: nn.Module, loaded: Source, source: Path, config: Config, needs_head: bool) -> None:
    """Loads weights into the model that the settings name; raises ValueError if they do not fit."""
    head, weights = head_keys(model), loaded.weights
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    backbone = {name: shape for name, shape in shapes.items() if name not in head}
    if loaded.architecture not in (None, architecture(model)) and find_mismatches(backbone, weights, optional=head):
        raise ValueError(
            f"{source} holds weights of {loaded.architecture}, but model.name={config.model.name}; set model.name={loaded.architecture}"
        )
    has_head = head[0] in weights
    if needs_head and not has_head:
        raise ValueError(f"{source} holds no head, so it can't classify; use --probe 100 to evaluate its features")
    if has_head and len(weights[head[0]]) != config.model.classes:
        rows = len(weights[head[0]])
        raise ValueError(f"the head in {source} has {rows} classes, but model.classes={config.model.classes}; set model.classes={rows}")
    if wrong := find_mismatches(shapes if has_head else backbone, weights):
        raise ValueError(f"{source} does not fit {config.model.name}: {join_first(wrong, '; ')}")
    if not has_head:
        model.reset_classifier(0)  # type: ignore[operator]
    model.load_state_dict(weights)


def _head_classes(weights: Weights, source: Path, val: Index) -> tuple[str, ...]:
    """Returns the names of the head's classes, if unknown the data's; raises ValueError if their numbers differ."""
    if weights.classes is not None:
        return weights.classes
    if weights.config.model.classes != len(val.classes):
        raise ValueError(
            f"{source} does not name its {weights.config.model.classes:,} classes, so they could only be those of data.val; "
            f"{val.place} has {len(val.classes):,}. Runs and exported files name their classes"
        )
    _print_once(f"{source} does not name its classes: assuming the {len(val.classes):,} of {val.place}, in their order")
    return val.classes


def _probe(weights: Weights, train: Index, val: Index, per_class: int, placement: Placement) -> str:
    """Fits k-NN and the linear probe on features of `train` and tests them on `val`; returns the result as a line. Collective."""
    data, device, precision = weights.config.data, placement.device, weights.config.engine.precision
    outputs, targets = match_classes(train.classes, val, data.val_except)
    train_targets = torch.full((len(train.classes),), -1, device=device)
    train_targets[torch.from_numpy(outputs).to(device)] = torch.arange(len(outputs), device=device)
    with EvalLoader(train, data, placement, samples=select_samples(train, outputs, per_class)) as loader:
        rank_features, labels = extract_features(weights.model, loader, precision)
        _report_bad_images(loader)
        bank, bank_labels = all_gather_rows(rank_features), all_gather_rows(train_targets[labels])
        if not len(bank):
            raise ValueError(no_usable_image(loader))
    with EvalLoader(val, data, placement) as loader:
        queries, labels = extract_features(weights.model, loader, precision)
        labels = torch.from_numpy(targets).to(device)[labels]
        _report_bad_images(loader)
    knn = knn_correct(bank, bank_labels, queries, labels, len(outputs))
    linear = LinearProbe(bank, bank_labels, len(outputs)).correct(queries, labels)
    totals = torch.stack([knn, linear, torch.full_like(knn, len(labels))])
    dist.all_reduce(totals)
    *counts, (images, _) = totals.tolist()
    if not images:
        raise ValueError(no_usable_image(loader))
    knn_text, linear_text = (f"top-1 {top1 / images:.2%}, top-5 {top5 / images:.2%}" for top1, top5 in counts)
    return (
        f"{weights.title}, features of {len(bank)} images of {train.place} (at most {per_class} a class): {NEIGHBORS}-nearest-neighbor "
        f"{knn_text}; linear probe {linear_text}; on {images} images of {val.place}, {len(outputs):,} classes"
    )


def _report_bad_images(loader: EvalLoader) -> None:
    """Prints the bad images of all ranks. Collective. Raises ValueError if there are too many."""
    for bad in share_bad_images(loader.quarantine):
        _print_once(f"bad image: {describe_bad_image(loader.quarantine, bad)}")
    loader.quarantine.check()


def _print_once(line: str) -> None:
    """Prints a line on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)
