"""The engine: what every optimizer here shares, whatever its rule."""
