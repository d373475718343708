"""Text to batches: sources, tokenizers, token stores, corpora, windows, and batches as a function of (seed, step).

Nothing here knows a model or a loss.
"""
