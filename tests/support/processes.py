"""Ranks of a gloo process group, forked once, that run functions of the tests."""

import io
import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import fastattn.parallel  # noqa: F401  (before the fork: children start with it)
from children import FORK, PATIENCE

_meshes: dict = {}


class Team:
    """`size` processes; `run(function, *arguments)` is function(rank, *arguments) of each, all at once."""

    def __init__(self, size: int, folder, timeout: float = PATIENCE):
        self.pipes, self.children = [], []
        for rank in range(size):
            mine, theirs = FORK.Pipe()
            child = FORK.Process(target=_serve, args=(theirs, rank, size, str(folder / "store"), timeout), daemon=True)
            child.start()
            theirs.close()
            self.pipes.append(mine)
            self.children.append(child)

    def start(self, function, *arguments, ranks=None) -> None:
        for rank, pipe in enumerate(self.pipes):
            if ranks is None or rank in ranks:
                pipe.send_bytes(_packed((function, arguments)))

    def results(self, ranks=None) -> list:
        """What each has returned, or the exception of a rank that raised."""
        return [_answer(pipe, rank) for rank, pipe in enumerate(self.pipes) if ranks is None or rank in ranks]

    def run(self, function, *arguments) -> list:
        """As `results`, but fails the test if a rank has raised."""
        self.start(function, *arguments)
        found = self.results()
        for rank, answer in enumerate(found):
            if isinstance(answer, Raised):
                pytest.fail(f"rank {rank}:\n{answer.traceback}")
        return found

    def kill(self, rank: int) -> None:
        self.children[rank].kill()
        self.children[rank].join()

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.join()


def team_of(size: int):
    """A fixture: the team of so many ranks that the tests of a file share."""

    @pytest.fixture(scope="module")
    def team(tmp_path_factory):
        ranks = Team(size, tmp_path_factory.mktemp("team"))
        yield ranks
        ranks.close()

    return team


class Raised:
    """An exception of a rank."""

    def __init__(self, error: BaseException):
        self.kind, self.text, self.traceback = type(error).__name__, str(error), traceback.format_exc()


def mesh_of(*sizes: int):
    """The mesh of these sizes in a rank, with dimensions "cp", or "outer" and "inner"."""
    if sizes not in _meshes:
        names = ("cp",) if len(sizes) == 1 else ("outer", "inner")
        _meshes[sizes] = dist.init_device_mesh("cpu", sizes, mesh_dim_names=names)
    return _meshes[sizes]


def _serve(pipe, rank: int, size: int, store: str, timeout: float) -> None:
    torch.set_num_threads(1)  # a forked child has no OpenMP threads
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            function, arguments = _unpacked(pipe.recv_bytes())
        except EOFError:  # the tests are over
            os._exit(0)
        try:
            answer = function(rank, *arguments)
        except Exception as error:
            answer = Raised(error)
        pipe.send_bytes(_packed(answer))


def _answer(pipe, rank: int):
    try:
        assert pipe.poll(PATIENCE), f"rank {rank} hangs"
        return _unpacked(pipe.recv_bytes())
    except EOFError:
        pytest.fail(f"rank {rank} has died")


def _packed(x) -> bytes:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes):
    return torch.load(io.BytesIO(data), weights_only=False)
