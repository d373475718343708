"""The process and its devices: signals, streams, options and progress; backends, meshes, processes, preemption, profiling and logs.

Importing the room imports no JAX, and neither do the modules that every command needs before its libraries (`startup`, `environment`,
`interrupts`, `streams`, `options`, `progress`). Nothing here knows what a model, a dataset or a run is.
"""
