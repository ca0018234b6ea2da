"""Says what adamops is, and names its tools: python -m adamops"""

from . import __version__

TOOLS = {
    "adamops.report": "what works here, and why not; --check takes steps",
    "adamops.bench": "times ours, torch's, DeepSpeed's and the memory",
    "adamops.offload": "bytes and seconds of offloading a model",
    "adamops.deepspeed": "runs a DeepSpeed script on adamops' ops",
}


def main() -> None:
    print(f"adamops {__version__}: Adam and AdamW for torch, compiled ahead of time.\n")
    print("  optimizer = adamops.AdamW(model.parameters(), lr=1e-3)  # as torch.optim's\n")
    print("Tools, each with --help:\n")
    for module, purpose in TOOLS.items():
        print(f"  python -m {module:17}  {purpose}")


if __name__ == "__main__":
    main()
