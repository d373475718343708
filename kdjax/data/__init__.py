"""Text on disk -> batches: sources, tokenizers, token stores, corpora, windows and batches in a seeded order."""
