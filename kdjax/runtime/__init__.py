"""The process of a command: signals, streams, environment variables. Importing these modules does not import JAX."""
