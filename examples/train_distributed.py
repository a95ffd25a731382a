"""Data-parallel training of a SCORE model, by DDP or FSDP2, that goes on where its last checkpoint ends.

    torchrun --nproc-per-node 2 examples/train_distributed.py --wrap fsdp2 --checkpoint /tmp/score

runs in seconds on a CPU; on GPUs give --nproc-per-node their number. Any number of processes sees the same batches and has the
same losses, to rounding, and loads the checkpoints of any other. Without torchrun, by `python`, it is one process.

On many nodes the script stays as it is, and every node runs (this was never run on more than one node)

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --rdzv-id score \\
        examples/train_distributed.py --wrap fsdp2 --checkpoint /a/folder/that/all/nodes/share

What one may then want to change: shards inside a node and copies between nodes (the line `mesh =` of `wrapped`),

    mesh = init_device_mesh(device.type, (world // 8, 8), mesh_dim_names=("replicate", "shard"))

16-bit products, weights and sums over ranks in float32 (the call of `fully_shard`, with its `MixedPrecisionPolicy`),

    fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))

and data of your own: `batch` gives every rank its rows of a step.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import score_kernels as sk

INPUTS, FEATURES, HIDDEN, ITERATIONS, ROWS = 2, 64, 128, 8, 256


def main(arguments: Sequence[str] | None = None) -> float:
    """Trains up to `--steps` steps in all; returns the last loss, of the whole batch."""
    parser = argparse.ArgumentParser(description="Data-parallel training of a SCORE model.")
    parser.add_argument("--wrap", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--steps", type=int, default=40, help="in all, those before the checkpoint included (default 40)")
    parser.add_argument("--checkpoint", type=Path, help="folder: load what is there, save after every 20th step and the last")
    given = parser.parse_args(arguments)
    device = start()
    try:
        torch.manual_seed(0)  # before the model: all ranks start with the same parameters
        model = wrapped(build().to(device), given.wrap, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        done = load(model, optimizer, given.checkpoint)
        loss = torch.tensor(float("nan"))
        for step in range(done, given.steps):
            optimizer.zero_grad()
            x, target = batch(step, device)
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            if given.checkpoint and ((step + 1) % 20 == 0 or step + 1 == given.steps):
                save(model, optimizer, given.checkpoint, step + 1)
        loss = loss.detach()
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} processes, {given.wrap}, steps {done} to {given.steps}: loss {loss.item():.6f}")
        return loss.item()
    finally:
        leave()


def leave() -> None:
    """Parts from the other processes.

    A thread of gloo's takes the GIL to let go of the last tensor that it reduced, and the end of a process group waits for that
    thread with the GIL in its hand (torch 2.13): the thread gets its turn before.
    """
    time.sleep(0.5)
    dist.destroy_process_group()


def start() -> torch.device:
    """Joins the other processes, or is alone without torchrun; returns the device of this one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def build() -> nn.Module:
    body = sk.ScoreMLP(FEATURES, HIDDEN, iterations=ITERATIONS, norm="layernorm", learn_dt="scalar")
    return nn.Sequential(nn.Linear(INPUTS, FEATURES), body, nn.Linear(FEATURES, 1))


def wrapped(model: nn.Module, wrap: str, device: torch.device) -> nn.Module:
    world = dist.get_world_size()
    if wrap == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (world,))
    for part in (*(m for m in model.modules() if isinstance(m, sk.ScoreMLP)), model):
        fully_shard(part, mesh=mesh)
    return model


def batch(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's rows of a batch that depends on the step alone: points of a plane, and a wave over it."""
    x = torch.rand(ROWS, INPUTS, generator=torch.Generator().manual_seed(step)) * 2 - 1
    x = x.tensor_split(dist.get_world_size())[dist.get_rank()].to(device)
    return x, torch.sin(2 * x.sum(-1, keepdim=True))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    parameters, optimizer_state = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": optimizer_state, "step": 0}


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    """One folder for each step: a run that dies while saving leaves the one before it whole."""
    dcp.save({**state_of(model, optimizer), "step": step}, checkpoint_id=folder / f"step-{step:08}")


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None) -> int:
    """Loads the newest whole checkpoint, if there is one; returns how many steps it has seen."""
    whole = sorted(path.parent for path in folder.glob("step-*/.metadata")) if folder else []
    if not whole:
        return 0
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=whole[-1])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])  # type: ignore[arg-type]
    return int(state["step"])  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
