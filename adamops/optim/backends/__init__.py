"""How a step is run on a device: by the compiled ops, or in pure PyTorch."""
