"""How states and master weights are stored: precision, quantization, remainders."""
