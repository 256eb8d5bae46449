"""Lists the part of the training state that this rank holds, by parameter name, in any ZeRO stage.

ZeRO lays parameters end to end in flat buffers and gives each rank a range of them, differently in every stage. Here a range becomes a list
of pieces: parameter, position in the flattened parameter, and live views of the fp32 weight and its optimizer states. Checkpoints save and
load these views, and evaluation assembles whole tensors from them.

    pieces = list_pieces(engine); …write into them…; deepspeed_compat.publish_weights(engine)
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine import deepspeed_compat

WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """Holds a contiguous range of one flattened parameter and of its optimizer states.

    `tensors` maps "weight" and the name of each state to a 1-D fp32 view. All views have the same length and begin at element `start` of
    the parameter's `numel` elements.
    """

    name: str
    start: int
    numel: int
    tensors: dict[str, Tensor]


def start_optimizer(engine: Any) -> None:
    """Creates the optimizer's states, so that pieces exist before the first update."""
    engine.basic_optimizer.start_states(deepspeed_compat.list_flat_weights(engine))


def get_step_counter(engine: Any) -> Tensor:
    """Returns the live count of updates, a scalar on the device; skipped steps are not counted."""
    return engine.basic_optimizer.state[deepspeed_compat.list_flat_weights(engine)[0]]["step"]


def set_optimizer_steps(engine: Any, steps: int) -> None:
    """Sets the optimizer's count of updates."""
    for weight in deepspeed_compat.list_flat_weights(engine):
        engine.basic_optimizer.state[weight]["step"].fill_(steps)


def list_pieces(engine: Any) -> list[Piece]:
    """Returns this rank's pieces, in the order of the model's parameters. In stage 0 every rank holds everything."""
    pieces = []
    for name, parameter in engine.module.named_parameters():
        if location := deepspeed_compat.locate(engine, parameter):
            state = engine.basic_optimizer.state[location.flat]
            tensors = {WEIGHT: location.flat} | {key: state[key] for key in engine.basic_optimizer.state_keys}
            views = {key: tensor.detach().view(-1).narrow(0, location.offset, location.length) for key, tensor in tensors.items()}
            pieces.append(Piece(name, location.start, location.numel, views))
    return pieces


def list_saved_pieces(engine: Any) -> list[Piece]:
    """Returns the pieces that this rank saves; one rank saves each element. Stage 0 divides the parameters among the ranks."""
    pieces = list_pieces(engine)
    if engine.zero_optimization_stage() != 0:
        return pieces
    rank, ranks, total = dist.get_rank(), dist.get_world_size(), sum(piece.numel for piece in pieces)
    starts = itertools.accumulate((piece.numel for piece in pieces), initial=0)
    return [piece for piece, start in zip(pieces, starts, strict=False) if start * ranks // total == rank]


def start_average(engine: Any) -> None:
    """Sets the moving average to the weights, in this rank's pieces."""
    for piece in list_pieces(engine):
        piece.tensors["ema"].copy_(piece.tensors[WEIGHT])


def assemble_tensors(engine: Any, key: str) -> dict[str, Tensor]:
    """Returns the whole tensors of one key ("weight", "ema", …) by parameter name, assembled from all ranks' pieces. Collective."""
    shapes = {name: deepspeed_compat.get_shape(engine, p) for name, p in engine.module.named_parameters()}
    pieces = list_pieces(engine)
    if engine.zero_optimization_stage() == 0:
        return {piece.name: piece.tensors[key].view(shapes[piece.name]) for piece in pieces}
    sizes = [shape.numel() for shape in shapes.values()]
    flat = torch.zeros(sum(sizes), device=engine.device)
    whole = dict(zip(shapes, flat.split(sizes), strict=True))
    for piece in pieces:
        part = piece.tensors[key]
        whole[piece.name].narrow(0, piece.start, part.numel()).copy_(part)
    dist.all_reduce(flat)  # each element comes from one rank, so the sum is exact
    return {name: whole[name].view(shape) for name, shape in shapes.items()}
