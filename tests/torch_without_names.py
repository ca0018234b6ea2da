"""Takes private names from torch, one at a time, and prints what a training run gives then: "name: digest or error".

Each name is tried in a fork of a process that has imported torch and not adamops.
"""

import ctypes
import gc
import hashlib
import os
import sys
import traceback

import torch

# Names that torch itself needs to run a step: they are back once adamops has been imported.
NEEDED_BY_TORCH = (
    "optim.optimizer._global_optimizer_pre_hooks",
    "optim.optimizer._global_optimizer_post_hooks",
    "_C.DisableTorchFunctionSubclass",
    "autograd.function.BackwardCFunction",
    "autograd.Variable._execution_engine",
)
NAMES = (
    *NEEDED_BY_TORCH,
    "Tensor._version",
    "Tensor._is_zerotensor",
    "Tensor._cdata",
    "Tensor.__dlpack_c_exchange_api__",
    "_is_functional_tensor",
    "_disable_dynamo",
    "_C._dispatch_keys",
    "_C._current_graph_task_id",
    "_C._profiler._RecordFunctionFast",
    "autograd.profiler._is_profiler_enabled",
)


def namespace_of(path):
    """The dict that holds the last name of a dotted path below torch, also that of a type written in C."""
    *owners, name = path.split(".")
    owner = torch
    for step in owners:
        owner = getattr(owner, step, None) or sys.modules[f"{owner.__name__}.{step}"]
    for cls in getattr(owner, "__mro__", (owner,)):
        (space,) = gc.get_referents(cls.__dict__) if isinstance(cls, type) else (vars(cls),)
        if name in space:
            return space, name
    raise AssertionError(f"torch has no {path}; take it out of this list and out of adamops/_torch_compat.py")


def train():
    """The digest of what a few steps of each kind give."""
    import adamops

    torch.manual_seed(0)
    digest = hashlib.sha256()
    for make in (adamops.DeepSpeedCPUAdam, adamops.FusedAdam):
        for settings in ({}, {"state_dtype": "8bit"}):
            model = torch.nn.Sequential(torch.nn.Linear(300, 20), torch.nn.Linear(20, 3))
            optimizer = make(model.parameters(), lr=1e-2, **settings)
            run = {
                "step": lambda optimizer=optimizer: optimizer.step(zero_grads=True),
                "async": lambda optimizer=optimizer: optimizer.step_async().wait(),
                "saved": lambda optimizer=optimizer: optimizer.load_state_dict(optimizer.state_dict()),
                "after": optimizer.step,
            }
            for way in run.values():
                for param in model.parameters():
                    param.grad = torch.randn_like(param)
                optimizer.clip_grad_norm_(0.5)
                way()
            for value in (*model.parameters(), *optimizer.fp32_params()):
                digest.update(value.detach().numpy().tobytes())
    return digest.hexdigest()


def train_in_backward():
    """The digest of a step during the backward pass, or the error of asking for it."""
    import adamops

    torch.manual_seed(0)
    model = torch.nn.Linear(300, 20)
    optimizer = adamops.DeepSpeedCPUAdam(model.parameters(), lr=1e-2)
    try:
        adamops.step_in_backward(model, optimizer)
    except RuntimeError as error:
        return str(error)
    model(torch.randn(4, 300)).square().mean().backward()
    return hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest()


def try_without(path):
    if path:
        space, name = namespace_of(path)
        taken = space.pop(name)
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(torch.Tensor))
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(torch._C.TensorBase))
    import adamops.ops.adam
    import adamops.optim.backward  # noqa: F401

    if path in NEEDED_BY_TORCH:
        space[name] = taken
    return f"{train()} {train_in_backward()}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in ("", *NAMES):
        sys.stdout.flush()
        child = os.fork()
        if not child:
            try:
                print(f"{path}: {try_without(path)}", flush=True)
            except BaseException:
                print(f"{path}: {traceback.format_exc()!r}", flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(f"{path}: died with {status}")
