"""The grid over teacher size, teacher budget, student size and alpha: its config, its cells, what they cost, and runners that compute what is missing.

Nothing here interprets results: statistics are in `analysis`.
"""
