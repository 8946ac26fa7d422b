"""The loop, the engine under it, and what survives it."""
