"""The folder of a run: its record, status and owner, checkpoints on a store or a local disk, metrics and their sinks.

Nothing here computes: these modules write what a run produced and read it back verified.
"""
