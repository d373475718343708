"""Scoring of checkpoints: per-document likelihood, calibration, agreement with the teacher; results as immutable Parquet files."""
