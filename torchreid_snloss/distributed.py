"""Communication between the processes that `torchrun` starts, one for each GPU.

Everything here also works without a process group: there is then one process, with rank 0.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from torchreid_snloss import device
from torchreid_snloss.deprecation import renamed
from torchreid_snloss.errors import text_of

__all__ = [
    "PeerError",
    "all_reduce_max",
    "all_reduce_sum",
    "average_buffers",
    "broadcast_module",
    "broadcast_object",
    "broadcast_tensor",
    "check_environment",
    "gather_counts",
    "gather_objects",
    "gather_rows",
    "main_process_first",
    "mute_other_ranks",
    "named_failures",
    "rank",
    "rows_of",
    "start",
    "stop",
    "world_size",
]

_NEW_NAMES = {
    "add_up": "all_reduce_sum",
    "all_of": "gather_objects",
    "copy_from_first": "broadcast_module",
    "from_first": "broadcast_object",
    "in_turn": "main_process_first",
    "largest": "all_reduce_max",
    "silent_but_first": "mute_other_ranks",
}
__getattr__ = renamed(__name__, {old: f"{__name__}.{new}" for old, new in _NEW_NAMES.items()})

_T = TypeVar("_T")
TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the others, such as for rank 0 while it loads data or draws ranked lists."""


class PeerError(RuntimeError):
    """Another process failed or ended; its own error message says why."""


def check_environment(use_gpu: bool) -> None:
    """Checks the environment variables that torchrun sets, before any process waits for another.

    Raises:
        ValueError: if a variable is missing, or there is no GPU for this process.
    """
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    if 0 < len(given) < 3:
        raise ValueError(f"the environment has only {given} of what torchrun sets: start several processes with it")
    if given and use_gpu and int(os.environ["LOCAL_RANK"]) >= device.count():
        raise ValueError(
            f"torchrun started process {os.environ['LOCAL_RANK']} (from 0) on this machine, which has "
            f"{device.count()} GPUs: start at most as many, or set use_gpu False"
        )


def start(use_gpu: bool | None = None) -> None:
    """Joins the other processes if `torchrun` started this one; otherwise does nothing.

    Your own script calls this function first, and `stop` last. The engines then train on all processes.

    Args:
        use_gpu: whether to use NCCL between GPUs, one for each process, besides Gloo; None: if there are GPUs.

    Raises:
        ValueError: as `check_environment` does.
    """
    use_gpu = device.is_available() if use_gpu is None else use_gpu
    check_environment(use_gpu)
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if use_gpu:
        device.use(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(
        dist.rendezvous(  # type: ignore[attr-defined]
            "env://", timeout=TIMEOUT
        )
    )
    # On a single machine, torchrun's store may survive a restart and still hold the addresses of processes that have
    # ended. With several machines, each restart has its own store, and the restart counts of the machines differ.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if os.environ.get("GROUP_WORLD_SIZE") == "1" else 0
    attempt = dist.PrefixStore(  # type: ignore[attr-defined]
        f"attempt-{restarts}", store
    )
    backend = device.collective_backend(use_gpu)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=TIMEOUT)


def stop() -> None:
    """Leaves the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # A DistributedDataParallel in a reference cycle keeps Gloo's threads alive. A thread that is still alive when
        # the interpreter is torn down can abort the process.
        gc.collect()


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Replaces a tensor by its sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number: int) -> int:
    """The largest of the numbers that the processes pass."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def broadcast_object(value: _T) -> _T:
    """Returns rank 0's value, any object that can be pickled, on every process."""
    if world_size() > 1:
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]
    return value


def broadcast_tensor(tensor: Tensor, source: int = 0) -> None:
    """Replaces a contiguous tensor by that of the rank `source`, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=source)


def gather_objects(value: _T) -> list[_T]:
    """The values of all processes, by rank, on rank 0; an empty list on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def gather_counts(count: int) -> list[int]:
    """The number of rows of each process, by rank."""
    if world_size() == 1:
        return [count]
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = count
    return [int(number) for number in all_reduce_sum(counts)]


def rows_of(counts: list[int]) -> slice:
    """The slice of this process's rows among the gathered rows."""
    before = sum(counts[: rank()])
    return slice(before, before + counts[rank()])


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Gathers the rows of all processes, in the order of their ranks, on every process; differentiable.

    The gradient of a row is the sum of its gradients on all processes.

    Args:
        rows: (n, ...), where n is this process's entry in `counts`.
        counts: the result of `gather_counts`.

    Returns:
        (sum of counts, ...); `rows` itself if there is one process.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, counts)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        most = max(counts)
        padded = rows.contiguous()
        if len(rows) < most:
            padded = torch.cat([padded, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad.contiguous().clone())[rows_of(ctx.counts)], None


def average_buffers(model: nn.Module) -> None:
    """Replaces each buffer by its mean over the processes, such as batch norm's running statistics."""
    if world_size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                all_reduce_sum(buffer).div_(world_size())


def main_process_first(function: Callable[[], _T]) -> _T:
    """Calls a function that makes or downloads files: on rank 0, then on one process of each machine, then on the rest.

    Raises:
        PeerError: if the function raised on another process.
    """
    if world_size() == 1:
        return function()
    mine = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    result: list[_T] = []
    for turn in range(3):
        error: Exception | None = None
        if turn == mine:
            try:
                result.append(function())
            except Exception as raised:  # sent to the other processes, which wait for this one, and raised again below
                error = raised
        if all_reduce_max(error is not None):
            told = broadcast_object(
                [(number, text) for number, text in enumerate(gather_objects(error and text_of(error))) if text]
            )
            raise error or PeerError("; ".join(f"rank {number}: {text}" for number, text in told))
    return result[0]


def broadcast_module(module: nn.Module) -> None:
    """Gives every process rank 0's parameters and buffers."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            broadcast_tensor(tensor.detach())


@contextlib.contextmanager
def mute_other_ranks() -> Iterator[None]:
    """A context in which only rank 0 prints."""
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# Parts of the messages of Gloo and NCCL when another process has ended; they have no exception class for this.
_OF_A_PEER = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "ncclRemoteError",
    "communicator was aborted",
    "Broken pipe",
    "Timed out waiting",
    "Watchdog caught collective operation timeout",
)


@contextlib.contextmanager
def named_failures() -> Iterator[None]:
    """A context in which communication errors are raised as `PeerError`."""
    try:
        yield
    except RuntimeError as error:
        classes = tuple(getattr(dist, name) for name in ("DistNetworkError", "DistStoreError") if hasattr(dist, name))
        lost = isinstance(error, classes) or any(words in str(error) for words in _OF_A_PEER)
        if world_size() == 1 or not lost or isinstance(error, PeerError):
            raise
        raise PeerError(
            f"rank {rank()} of {world_size()} lost another process, which torchrun names as the first failure: "
            + text_of(error, longest=200)
        ) from error
