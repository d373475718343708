"""The four-axis grid: its config, the runs it needs, what they cost, and doing what is missing."""
