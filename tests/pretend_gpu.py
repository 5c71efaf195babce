"""A pretend GPU. Everything runs on the CPU; what would be on the device is marked, and counted.

    with PretendGPU() as gpu:
        gpu.adopt(model)                  its weights are on the device
        loss, record = model(batch)       the batch is on the host
    gpu.kernels, gpu.waits                what was started, and what the host waited for

A tensor belongs to the device if its storage does. What is computed from the device's tensors is
the device's. Each operation is one kernel, unless it only looks at memory in another way. An
operation on tensors of both sides is an error, as on a real GPU. The host waits whenever it reads
a number of the device, and whenever it sends or fetches a tensor without saying that it will not
wait. What is made with `device=` of a torch.device is the device's, since no code of the host says
that.
"""
import sys
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

import memdlm

# They look at memory in another way, or reserve it.
NO_KERNEL = frozenset("""
    view _unsafe_view t transpose permute expand slice select unsqueeze squeeze split
    split_with_sizes detach alias as_strided unbind chunk diagonal narrow empty empty_strided
    empty_like new_empty new_empty_strided lift_fresh _reshape_alias unfold mT
    """.split())
READS = frozenset("""
    _local_scalar_dense nonzero masked_select equal unique _unique2 unique_consecutive is_nonzero
    """.split())
INDEXED = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index".split())


class Mixed(RuntimeError):
    """An operation on tensors of the host and of the device."""


class PretendGPU:
    """Counts kernels by name and waits by (kind, place in the code), within `with`."""

    def __init__(self):
        self.kernels, self.waits, self.storages = Counter(), Counter(), {}
        self.in_backward = False
        self.modes = Calls(self), Operations(self)

    def __enter__(self):
        self.patches = ((memdlm, "to_device", self.send),
                        (torch.autograd, "_engine_run_backward", self.run_backward))
        self.before = [getattr(place, name) for place, name, _ in self.patches]
        for place, name, ours in self.patches:
            setattr(place, name, ours)
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)
        for (place, name, _), before in zip(self.patches, self.before):
            setattr(place, name, before)

    def run_backward(self, *args, **kwargs):
        """Layers that are computed again in a backward pass are Python code, whose calls count."""
        self.in_backward = True
        try:
            with Calls(self):
                return self.before[1](*args, **kwargs)
        finally:
            self.in_backward = False

    def adopt(self, what):
        """A tensor, or all that a module holds, is on the device from now on. Returns it.

        Storages are kept, so that no later one has the address of an earlier one.
        """
        if isinstance(what, torch.nn.Module):
            for module in what.modules():
                state = getattr(module, "quant_state", None)
                states = [state, getattr(state, "state2", None)]
                for one in (*module.parameters(recurse=False), *module.buffers(recurse=False),
                            *(x for s in states if s is not None for x in vars(s).values())):
                    if torch.is_tensor(one):
                        self.adopt(one)
        else:
            storage = what.untyped_storage()
            self.storages[storage._cdata] = storage
            if what.is_leaf and what.grad is not None:
                self.adopt(what.grad)
        return what

    def has(self, x):
        return x.untyped_storage()._cdata in self.storages

    def send(self, x, like):
        """memdlm.to_device: a copy that nobody waits for."""
        if self.has(x) or not self.has(like):
            return x
        self.kernels["copy to the device"] += 1
        return self.adopt(x.clone())

    def wait(self, kind):
        frame = sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.waits[kind, f"{frame.f_code.co_name} in {frame.f_code.co_filename}"] += 1

    @property
    def launches(self):
        """Kernels in all. Dropout is three operations on a CPU and one kernel on a GPU."""
        return self.kernels.total() - 2 * self.kernels["bernoulli_"]

    def clear(self):
        self.kernels.clear(), self.waits.clear()


class Calls(TorchFunctionMode):
    """What the CPU does not take for an operation: copies from one side to the other."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        gpu, kwargs = self.gpu, kwargs or {}
        if isinstance(function, torch._ops.OpOverload):  # `Operations` sees it
            return function(*args, **kwargs)
        if function == torch.Tensor.is_cpu.__get__:
            return not gpu.has(args[0])
        name = getattr(function, "__name__", "")
        x = args[0] if args and torch.is_tensor(args[0]) else None
        if name in ("cpu", "tolist", "numpy") and x is not None and gpu.has(x):
            gpu.wait("a copy to the host")
            with _disable_current_modes():
                copy = x.detach().clone()
            return copy if name == "cpu" else function(copy, *args[1:], **kwargs)
        out = function(*args, **kwargs)
        targets = [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, torch.device)]
        if torch.is_tensor(out) and targets and not gpu.has(out):
            if name == "to":
                if not kwargs.get("non_blocking"):
                    gpu.wait("a copy to the device")
                gpu.kernels["copy to the device"] += 1
                return gpu.adopt(out.clone())
            gpu.adopt(out)  # made there
            gpu.kernels[name] += 1
        return out


class Operations(TorchDispatchMode):
    """Each operation: on which side it is, whether it is a kernel, whether the host waits."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        gpu, kwargs = self.gpu, kwargs or {}
        name = function._schema.name.split("::")[-1]
        tensors = [x for x in tree_flatten((args, kwargs))[0] if torch.is_tensor(x)]
        theirs = [x for x in tensors if gpu.has(x)]
        if not theirs and (tensors or not gpu.in_backward):
            return function(*args, **kwargs)
        self.check(function, name, args, [x for x in tensors if not gpu.has(x)])
        if name in READS:
            gpu.wait(name)
        if name in INDEXED and any(torch.is_tensor(i) and gpu.has(i) and i.dtype == torch.bool
                                   for i in args[1]):
            gpu.wait("a mask of the device as an index")
        out = function(*args, **kwargs)
        if name not in NO_KERNEL:
            gpu.kernels[name] += 1
        for x in tree_flatten(out)[0]:
            if torch.is_tensor(x) and name != "_local_scalar_dense":
                gpu.adopt(x)
        return out

    def check(self, function, name, args, ours):
        """Mixed unless the host's tensors may take part."""
        for x in ours:
            if name in INDEXED and args[0] is not x and any(x is i for i in args[1]):
                self.gpu.wait("an index of the host")
            elif name == "copy_":
                self.gpu.wait("a copy between host and device")
            elif x.dim():  # a single number is sent along
                raise Mixed(f"{function}: a tensor {list(x.shape)} of the host")
