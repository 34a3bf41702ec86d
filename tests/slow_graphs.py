"""CUDA graphs in slow motion, on the CPU: what is captured is recorded operation by operation, and a replay does
the same operations on the same memory again. So what Python decided, and every number that it passed on, is frozen
as in a graph; and what a graph cannot hold, a look at a value or a copy from the host, is an error."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HOST = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "lift_fresh",
    "_unique2",
    "linalg_solve_ex",
    "equal",
)
# what torch 2.11 refuses on a GPU with deterministic algorithms
NOT_DETERMINISTIC = ("histc", "put_", "kthvalue", "median")
IN_SHAPE = ("squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_", "swapaxes_")


def tensors(x):
    return [leaf for leaf in tree_leaves(x) if torch.is_tensor(leaf)]


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.written = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "index_put") else ()
        if name in HOST or any(x is not None and x.dtype == torch.bool for x in indices):
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        if name in NOT_DETERMINISTIC or (name == "cumsum" and args[0].is_floating_point()):
            raise RuntimeError(f"{op} does not have a deterministic implementation on a GPU")
        # an operation like squeeze_ changes a tensor's shape for good: hold views that keep theirs
        held = tree_map(lambda x: x.detach() if torch.is_tensor(x) else x, (args, kwargs or {}))
        if op._schema.is_mutable:
            self.written += [(x, x.clone()) for x in tensors(held)]
        outputs = op(*args, **(kwargs or {}))
        if name not in IN_SHAPE:
            self.graph.operations.append((op, *held, [x.detach() for x in tensors(outputs)]))
        return outputs


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations = []
        self.generators = []
        self.replays = 0

    def register_generator_state(self, generator):
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for op, args, kwargs, outputs in self.operations:
            for old, new in zip(outputs, tensors(op(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def record(graph):
    """In place of torch.cuda.graph; a capture computes nothing."""
    draws = [generator.get_state() for generator in graph.generators]
    with Recorder(graph) as recorder:
        yield
    with torch.no_grad():
        for x, before in reversed(recorder.written):
            x.copy_(before)
    for generator, before in zip(graph.generators, draws, strict=True):
        generator.set_state(before)


class Stream(contextlib.nullcontext):
    def wait_stream(self, stream):
        pass


def install(monkeypatch, script):
    """Let the script take the CPU for a GPU; returns the list of its graphs, as they are made."""
    made = []

    def new_graph():
        made.append(Graph())
        return made[-1]

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "set_device", lambda device: None)
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "current_stream", Stream)
    monkeypatch.setattr(cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(cuda, "graph", record)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(script, "device_of", lambda args: torch.device("cpu"))
    generator = torch.Generator()
    monkeypatch.setattr(script, "generator_of", lambda device: generator)
    return made
