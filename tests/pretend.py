"""A GPU that is not there: its tensors compute on the CPU, and refuse what tensors of a real one refuse.

So a whole stage can walk through its device code, give the CPU's numbers, and stop where two devices meet."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

COPIES = ("_to_copy", "copy_", "_local_scalar_dense")  # tensors of two devices may meet here
BY_ROWS = (
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
)  # rows may be told by the CPU


class There(torch.Tensor):
    "A tensor on the GPU that is not there; for PyTorch's compiled code it is one without a storage."

    @staticmethod
    def __new__(cls, here, at):
        how = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype)
        with torch.inference_mode(False):  # else it could not be a view of a weight
            out = torch.Tensor._make_wrapper_subclass(cls, here.shape, device="meta", **how)
        out.here, out.at = here, at
        return out

    device = property(lambda self: self.at)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"There({self.here!r}, {self.at})"

    def __reduce_ex__(self, protocol):
        return self.here.__reduce_ex__(protocol)  # a checkpoint

    def get_device(self):
        return self.at.index

    def tolist(self):
        return self.here.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.at} device type tensor to numpy; copy it to host memory first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, dict(kwargs or {}))


def computed(func, args, kwargs):
    "What an operation gives: computed here, said to be there."
    name, tensors = (
        func._overloadpacket.__name__,
        [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)],
    )
    there = [t for t in tensors if isinstance(t, There)]
    rows = {id(t) for t in tree_leaves(args[1])} if name in BY_ROWS else ()
    seen = (
        {str(t.device) for t in tensors if isinstance(t, There) or (t.ndim and id(t) not in rows)}
        if there
        else ()
    )
    if len(seen) > 1 and name not in COPIES:
        raise RuntimeError(f"{func}: tensors on one device are expected, but these are on {sorted(seen)}")
    at, wanted = there[0].at if there else None, kwargs.get("device")
    if wanted is not None:
        at = None if wanted.type == "cpu" else at or torch.device("cuda:0")
        kwargs["device"] = torch.device("cpu")
    known = {id(t.here): t for t in there} | {id(t): t for t in tensors if not isinstance(t, There)}
    out = func(
        *tree_map_only(There, lambda t: t.here, args), **tree_map_only(There, lambda t: t.here, kwargs)
    )
    if at is None:
        return out
    return tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else There(t, at), out)


class _Operations(TorchDispatchMode):
    "Also what PyTorch makes on the way back, of nothing but a size."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        made = kwargs.get("device") is not None and kwargs["device"].type == "meta"
        if made or any(isinstance(t, There) for t in tree_leaves((args, kwargs))):
            return computed(func, args, kwargs)
        return func(*args, **kwargs)


def _place(x):
    "The GPU that is meant, if one is."
    if not (isinstance(x, (str, torch.device)) and str(x).startswith("cuda")):
        return None
    return torch.device("cuda", torch.device(x).index or 0)


class _Places(TorchFunctionMode):
    "`cuda` becomes the device that is not there."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if getattr(func, "__self__", None) is torch.Tensor.data and isinstance(args[-1], There) and args[1:]:
            args[0].here, args[0].at = args[1].here, args[1].at  # `x.data = y`
        if func is torch.as_tensor and isinstance(args[0], There):  # as it is, or a copy
            return self._to(*args, **kwargs) if kwargs else args[0]
        if at := _place(kwargs.get("device")):
            made = func(*args, **kwargs | dict(device="cpu"))
            return made if isinstance(made, There) else There(made, at)
        return func(*args, **kwargs)

    def _to(self, x, *args, **kwargs):
        kwargs.pop("non_blocking", None)
        if args and torch.is_tensor(args[0]):
            args = args[0].device, args[0].dtype, *args[1:]
        at = next((p for p in map(_place, (*args, kwargs.get("device"))) if p), None)
        if at is None:
            return torch.Tensor.to(x, *args, **kwargs)
        kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
        x = torch.Tensor.to(x, *kinds[:1]) if kinds else x
        if isinstance(x, There) and x.at == at:
            return x
        if torch.is_grad_enabled() and x.requires_grad:
            return _Move.apply(x, at)
        return There((x.here if isinstance(x, There) else x.detach()).clone(), at)


class _Move(torch.autograd.Function):
    "A copy to the device, and the gradient back."

    @staticmethod
    def forward(ctx, x, at):
        ctx.back = isinstance(x, There)
        return There((x.here if ctx.back else x.detach()).clone(), at)

    @staticmethod
    def backward(ctx, grad):
        return (grad if ctx.back else grad.cpu()), None


TOLD = dict(  # what PyTorch answers about GPUs
    is_available=lambda: True,
    is_bf16_supported=lambda *_: True,
    empty_cache=lambda: None,
    mem_get_info=lambda *_: (2**36, 2**36),
    memory_reserved=lambda *_: 0,
    memory_allocated=lambda *_: 0,
    get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
    set_rng_state=lambda *_: None,
)


@contextlib.contextmanager
def pretended_gpu(monkeypatch, n: int = 1, **told):
    "Inside, this machine has GPUs."
    current = [0]

    def exchange(index):
        before, current[0] = current[0], current[0] if index < 0 else index
        return before

    told = TOLD | dict(device_count=lambda: n, current_device=lambda: current[0]) | told
    told |= dict(_exchange_device=exchange, _maybe_exchange_device=exchange)
    with monkeypatch.context() as m, _Operations(), _Places():
        for name, answer in told.items():
            m.setattr(torch.cuda, name, answer)
        m.setattr(torch.accelerator, "is_available", lambda: False)  # nothing to pin memory for
        yield
