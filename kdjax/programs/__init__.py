"""Whole steps as compiled programs: compile ahead of time for TPU slices that are not here, and read the compiler's output.

Nothing here runs a step.
"""
