"""What an accelerator must prove: correct in bfloat16, fast, resumable bit for bit. `python -m benchmarks.device`; results: docs/DEVICE.md.

Each part is a module with `cases(size)`: a dict from a case's name to a function that measures it and returns a JSON-able dict. Each part
runs in a process of its own, so that no part inherits another's memory, and each case's result is appended to the results at once, so that
an interrupted run keeps what it has. Add a part to PARTS in results.py, its rows to page.py.
"""
