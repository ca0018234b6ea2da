"""The facts about an op on this machine: whether it is built, usable and in use, and why not; for the report.

Builds nothing. Must work without torch, and must not know how facts are shown.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from typing import Any

from . import op_builder
from .op_builder import OpBuilder, cache
from .op_builder.cuda_architectures import coverage, visible_gpus
from .op_builder.spec import Op, RecordedOp, SituationalOp

FALLBACK = "torch_adam"
NOT_BUILT = "a build at first use, not done yet"
NUMPY_IS_MISSING = "Failed to initialize NumPy"  # begin of a warning of torch, which does not need it


def describe(op: op_builder.RegisteredOp) -> dict[str, Any]:
    """The facts about an op, as JSON types; an error that its builder raises is one of them."""
    entry: dict[str, Any] = {
        "name": op.name,
        "origin": "built-in" if op.origin == "built-in" else f"plugin of {op.origin}",
        "ok": False,
    }
    if op.builder is None:
        return {**entry, "error": op.error}
    try:
        return json.loads(json.dumps({**entry, **_describe_builder(op.builder)}, default=str))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin's builder may do anything
        return {**entry, "error": in_words(error)}


def describe_plugin(entry_point: importlib.metadata.EntryPoint) -> dict[str, Any]:
    """The facts about a plugin's op. Runs the plugin's code, so plugin_process.py calls this in another process."""
    torch_facts()  # first: it imports torch, whose OpenMP runtime the op then finds
    return describe(op_builder.load_plugin(entry_point))


def _describe_builder(builder: Op) -> dict[str, Any]:
    compatible = builder.compatibility()
    entry: dict[str, Any] = {
        "prebuilt": bool(builder.is_prebuilt()),
        "compatible": bool(compatible),
        "reason": str(getattr(compatible, "reason", "")),
    }
    record = builder.build_record() if isinstance(builder, RecordedOp) else None
    _check_record(record)
    if record:
        entry["build"] = record
    entry.update(_usable(builder, bool(compatible), entry["prebuilt"]))
    if record and "architectures" in record:
        entry["gpus"] = {f"sm_{gpu}": coverage(record["architectures"], gpu)._asdict() for gpu in visible_gpus()}
    if entry.get("openmp_runtime", "") is None and (wanted := torch_facts()["step_threads"]) and wanted["number"] != 1:
        error = f"there is no OpenMP runtime in this process, so a step runs on 1 thread instead of {wanted['number']}"
        entry.update(ok=False, error=error)
    if isinstance(builder, SituationalOp) and (reason := builder.not_applicable_reason()):
        entry["not_applicable_reason"] = reason
        entry["ok"] = entry["ok"] or not entry.get("error")
    elif problem := entry.get("cuda", {}).get("problem"):  # there is a GPU that this build cannot use
        entry.update(ok=False, in_use=f"a build at first use, else {FALLBACK} (pure PyTorch)", error=problem)
    return entry


def _check_record(record: Any) -> None:
    """Raises TypeError or ValueError for an invalid build record, which a plugin may return."""
    if record is None:
        return
    if not isinstance(record, dict):
        raise TypeError(f"build_record() returned a {type(record).__name__}, expected a dict or None")
    needed = {"compiler": str, "machine": str, "flags": list} if record.get("built") else {}
    if "targets" in record:
        needed |= {"targets_requested": str, "targets": list, "targets_dropped": dict}
    if "architectures" in record:
        needed |= {"architectures_requested": str, "architectures": list, "architectures_dropped": dict, "nvcc": str}
    for key, kind in needed.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"build_record() has {record.get(key)!r} for {key!r}, expected a {kind.__name__}")


def _usable(builder: Op, compatible: bool, prebuilt: bool) -> dict[str, Any]:
    """What would be used if the op were loaded now. Loads the op if that needs no build."""
    if builder.NAME == FALLBACK:
        return {"ok": compatible, "in_use": "pure PyTorch, where nothing compiled can be used"}
    own = builder.NAME in [known.NAME for known in op_builder.builtin_builders()]
    without = f"{FALLBACK} (pure PyTorch)" if own else "nothing"
    why = ""
    if prebuilt:
        try:
            if isinstance(builder, OpBuilder) and compatible:
                builder.load_prebuilt()  # first on its own: where it fails, load() would build the op
            return {"ok": True, "in_use": "prebuilt extension", **_facts(builder)}
        except ValueError as error:  # from an environment variable
            return {"ok": False, "in_use": "nothing", "error": str(error)}
        except Exception as error:
            why = f"the prebuilt extension does not load: {in_words(error)}"
    described = {"ok": False, **({"error": why} if why else {})}
    if not compatible:
        return {**described, "in_use": without}
    try:
        if isinstance(builder, OpBuilder) and cache.is_cached(builder):
            found = {**described, "ok": not why, "in_use": "extension built at first use, from the cache"}
            return {**found, **_facts(builder)}
    except ValueError as error:
        return {"ok": False, "in_use": "nothing", "error": str(error)}
    except Exception as error:
        return {"ok": False, "in_use": without, "error": f"{why}\n{in_words(error)}".strip()}
    return {**described, "in_use": NOT_BUILT}


def _facts(builder: Op) -> dict[str, Any]:
    """Loads the op, and returns what it says of itself."""
    module = builder.load()
    if not isinstance(builder, OpBuilder):
        return {}
    try:
        return builder.facts(module)
    except Exception as error:
        return {"ok": False, "error": f"facts(), which describes the loaded op, failed: {in_words(error)}"}


def in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def torch_facts() -> dict[str, Any]:
    """About torch, and what adamops makes of it; all None without torch."""
    facts: dict[str, Any] = dict.fromkeys(("torch", "threads", "step_threads", "tensors"))
    if importlib.util.find_spec("torch") is None:
        return facts
    try:
        import torch

        from . import threads
        from .optim.backends.tensor_layout import how_tensors_are_read
    except Exception as error:
        return {**facts, "torch": f"broken: {in_words(error)}"}
    facts.update(torch=torch.__version__, threads=torch.get_num_threads(), tensors=how_tensors_are_read())
    try:
        facts["step_threads"] = threads.explained()._asdict()
    except ValueError as error:  # from an environment variable
        facts["step_threads"] = {"number": None, "why": str(error)}
    return facts
