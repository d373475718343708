"""The process that a command runs in: its signals, its streams, its environment. Nothing here imports JAX before it is called."""
