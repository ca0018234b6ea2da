"""The ops by family, laid out as in deepspeed.ops."""
