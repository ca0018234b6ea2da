"""Says what adamops is, and names its tools, or runs one: python -m adamops [TOOL ...]"""

from __future__ import annotations

import runpy
import sys

from . import __version__

TOOLS = {
    "report": "what works here, and why not; --check takes steps",
    "bench": "times ours, torch's, DeepSpeed's and the memory",
    "offload": "bytes and seconds of offloading a model",
    "deepspeed": "runs a DeepSpeed script on adamops' ops",
}


def main(arguments: list[str]) -> int:
    """Prints that, or runs the tool that is named."""
    if arguments and arguments[0] in TOOLS:
        sys.argv = arguments
        runpy.run_module(f"adamops.{arguments[0]}", run_name="__main__", alter_sys=True)
        return 0
    if arguments and arguments[0] not in ("-h", "--help"):
        print(f"{arguments[0]!r} is none of the tools of adamops: {', '.join(TOOLS)}", file=sys.stderr)
        return 2
    print(f"adamops {__version__}: Adam and AdamW for torch, compiled ahead of time.\n")
    print("  optimizer = adamops.AdamW(model.parameters(), lr=1e-3)  # as torch.optim's\n")
    print("Tools, each with --help:\n")
    for tool, purpose in TOOLS.items():
        print(f"  python -m adamops.{tool:9}  {purpose}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
