"""The parts of the training state that this rank holds, by parameter name, in any ZeRO stage.

ZeRO lays parameters end to end in flat buffers and gives each rank a stretch of them, differently in every stage. Here that becomes
a list of pieces: parameter, position in the flattened parameter, and live views of the fp32 weight and its optimizer states.
Checkpoints save and load these views, and evaluation puts whole tensors together from them; nothing else knows ZeRO's insides.

    pieces = local_pieces(engine)           a rank's share
    publish(engine)                         after writing into the pieces: makes the model compute with them
    whole_tensors(engine, "ema")            collective: the whole tensors, on every rank

How each stage addresses its pieces was read in DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py (_link_all_hp_params),
stage3.py (_get_fp32_opt_state_partition). So was what the functions change that leave something out. Check again when its version moves.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """A contiguous stretch of one flattened parameter and of its optimizer states.

    `tensors` maps "weight" and each state's name to a 1-D fp32 view, all of one length, which starts at `start` of `numel` elements.
    """

    name: str
    start: int
    numel: int
    tensors: dict[str, Tensor]


def start_optimizer(engine: Any) -> None:
    """Creates the optimizer's states, so that pieces can be saved and loaded before the first update."""
    engine.basic_optimizer.start_states(_flat_weights(engine))


def step_counter(engine: Any) -> Tensor:
    """Updates made so far, on the device; fewer than the steps taken where some were skipped."""
    return engine.basic_optimizer.state[_flat_weights(engine)[0]]["step"]


def set_optimizer_steps(engine: Any, steps: int) -> None:
    for weight in _flat_weights(engine):
        engine.basic_optimizer.state[weight]["step"].fill_(steps)


def local_pieces(engine: Any) -> list[Piece]:
    """This rank's pieces, in the order of the model's parameters. In stage 0 every rank holds everything."""
    stage = engine.zero_optimization_stage()
    pieces = []
    for name, parameter in engine.module.named_parameters():
        located = _locate[stage](engine, parameter)
        if located is None:
            continue
        flat, offset, start, length, numel = located
        state = engine.basic_optimizer.state[flat]
        views = {WEIGHT: flat} | {key: state[key] for key in engine.basic_optimizer.state_keys}
        pieces.append(Piece(name, start, numel, {key: t.detach().view(-1).narrow(0, offset, length) for key, t in views.items()}))
    return pieces


def saved_pieces(engine: Any) -> list[Piece]:
    """The pieces that this rank saves: of all ranks together, each element once. In stage 0 each takes its share of the parameters."""
    pieces = local_pieces(engine)
    if engine.zero_optimization_stage() != 0:
        return pieces
    rank, ranks, total = dist.get_rank(), dist.get_world_size(), sum(piece.numel for piece in pieces)
    before = itertools.accumulate((piece.numel for piece in pieces), initial=0)
    return [piece for piece, start in zip(pieces, before, strict=False) if start * ranks // total == rank]


def gradients(engine: Any) -> list[Tensor]:
    """What this rank holds of the step's gradients, averaged over micro-batches and ranks; for after a step's last backward pass and
    before its update. In stage 0 that is all of them, on every rank; else the ranks' parts make up the whole."""
    if engine.zero_optimization_stage() == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    if _offloads(engine):
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)  # they are copied to the host beside the backward pass, and the CPU is to use them next
        return [weight.grad for weight in _flat_weights(engine) if weight.grad is not None]
    return [part for parts in engine.optimizer.averaged_gradients.values() for part in parts]


def leave_out_norm(engine: Any) -> None:
    """Makes ZeRO measure and scale no gradients where no setting does, as `compute_grad_norm` does in stages 1 and 2 without offload: in
    stage 3, which it costs a pass over them and two waits for the device a step; and with offload in 1 and 2, two for each parameter."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3 and not _offloads(engine):
        optimizer._get_norm_groups = lambda: [torch.ones(())]
        optimizer.unscale_and_clip_grads = lambda *_: None
    elif stage in (1, 2) and _offloads(engine):
        optimizer.set_norm_for_param_grad_in_gpu = lambda parameter: None
        optimizer.update_offload_overflow_tracker_for_param_grad = lambda parameter: None
        optimizer.scaled_global_norm = lambda *_: torch.ones(())


def leave_out_wait(engine: Any) -> None:
    """Makes the end of ZeRO-2's reductions, which run on a stream of their own beside the backward pass, known to the device's other work
    alone, where DeepSpeed lets the host wait for the device in each of them. ZeRO-3 keeps such a wait."""
    if engine.zero_optimization_stage() != 2 or _offloads(engine):
        return
    from deepspeed.accelerator import get_accelerator

    optimizer = engine.optimizer
    epilogue = optimizer.independent_gradient_partition_epilogue

    def by_streams() -> None:
        optimizer.reduce_ipg_grads()  # the last bucket
        if optimizer.reduction_stream is not None:
            get_accelerator().current_stream().wait_stream(optimizer.reduction_stream)
        optimizer.overlap_comm = False  # the epilogue has nothing left to reduce, and nothing to wait for
        epilogue()
        optimizer.overlap_comm = True

    optimizer.independent_gradient_partition_epilogue = by_streams


def leave_out_relinking(engine: Any) -> None:
    """Makes ZeRO-1 and 2 let the parameters be views of their flat buffers, which they are since the engine was built. DeepSpeed makes
    them so anew behind every update, parameter by parameter."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._update_model_bit16_weights = lambda group: None


def optimizer_device(engine: Any) -> torch.device:
    """Where weights are updated: with engine.offload on the host."""
    return _flat_weights(engine)[0].device


def _offloads(engine: Any) -> bool:
    return engine.zero_offload_optimizer() is not None


def start_average(engine: Any) -> None:
    """Sets the moving average to the weights in the pieces."""
    for piece in local_pieces(engine):
        piece.tensors["ema"].copy_(piece.tensors[WEIGHT])


def publish(engine: Any) -> None:
    """Takes the weights written into the pieces over into the tensors that the model computes with. Collective."""
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)


def whole_tensors(engine: Any, key: str) -> dict[str, Tensor]:
    """The whole tensors of one key ("weight", "ema", …) by parameter name, put together from all ranks' pieces. Collective."""
    stage = engine.zero_optimization_stage()
    shapes = {name: p.ds_shape if stage == 3 else p.shape for name, p in engine.module.named_parameters()}
    pieces = local_pieces(engine)
    if stage == 0:
        return {piece.name: piece.tensors[key].view(shapes[piece.name]) for piece in pieces}
    sizes = [shape.numel() for shape in shapes.values()]
    together = torch.zeros(sum(sizes), device=engine.device)
    whole = dict(zip(shapes, together.split(sizes), strict=True))
    for piece in pieces:
        part = piece.tensors[key]
        whole[piece.name].narrow(0, piece.start, part.numel()).copy_(part)
    dist.all_reduce(together)  # every element comes from one rank, so the sum is exact
    return {name: whole[name].view(shape) for name, shape in shapes.items()}


def _flat_weights(engine: Any) -> list[Tensor]:
    """The tensors that the optimizer updates on this rank."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [p for p in engine.module.parameters() if p.requires_grad]
    return engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else engine.optimizer.single_partition_of_fp32_groups


def _locate_0(engine: Any, p: Any) -> tuple[Tensor, int, int, int, int]:
    return p, 0, 0, p.numel(), p.numel()


def _locate_1_2(engine: Any, p: Any) -> tuple[Tensor, int, int, int, int] | None:
    mapping = p._hp_mapping
    if mapping is None:
        return None
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return (
        flat,
        mapping.hp_fragment_address.start,
        mapping.lp_fragment_address.start,
        mapping.lp_fragment_address.numel,
        p.numel(),
    )


def _locate_3(engine: Any, p: Any) -> tuple[Tensor, int, int, int, int] | None:
    optimizer = engine.optimizer
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(p)]
    size = p.partition_numel()
    start = dist.get_rank() * size
    length = min(size, p.ds_numel - start)  # the last pieces are padded, or all padding
    return (optimizer.fp32_partitioned_groups_flat[group], offset, start, length, p.ds_numel) if length > 0 else None


_locate = {0: _locate_0, 1: _locate_1_2, 2: _locate_1_2, 3: _locate_3}
