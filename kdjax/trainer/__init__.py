"""Train students and teachers: the compiled step, the loop around it, the optimizers, and the checks before it.

Nothing here reads text, scores documents or knows of a grid: a run is one config, one corpus and one mesh.
"""
