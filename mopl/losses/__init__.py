"""Losses on scores `(B, K)`: pure formulas that give one value for each list and objective, `(B, m)`."""
