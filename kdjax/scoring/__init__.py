"""Score checkpoints: likelihood and calibration per document, agreement with the teacher, multiple choice, the harness's tasks.

Results are immutable Parquet files. Nothing here trains a model or compares two of them: comparisons are in `analysis`.
"""
