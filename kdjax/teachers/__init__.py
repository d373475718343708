"""Find, open and load teachers: models trained here, run folders, Hugging Face folders.

Nothing here computes a loss or an update. A teacher is read-only: it is never in a train state, an optimizer or a checkpoint.
"""
