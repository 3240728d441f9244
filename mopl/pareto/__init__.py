"""Fronts: grids of weights, hypervolume and its relatives, steerability, and the file `front.json`."""

from mopl.pareto._front_table import csv_text, write_csv
from mopl.pareto.bootstrap import Interval, bootstrap_interval, bootstrap_means, hypervolume_interval
from mopl.pareto.front import Front, Point
from mopl.pareto.grid import weight_grid
from mopl.pareto.indicators import (
    attainment,
    epsilon_additive,
    front_distance,
    gd_plus,
    hypervolume,
    hypervolume_of_resamples,
    igd_plus,
    max_gap,
    non_dominated,
    spacing,
)
from mopl.pareto.steerability import kendall_tau, spearman, steerability

__all__ = [
    "Front",
    "Point",
    "weight_grid",
    "write_csv",
    "csv_text",
    "bootstrap_interval",
    "bootstrap_means",
    "Interval",
    "hypervolume",
    "hypervolume_interval",
    "hypervolume_of_resamples",
    "non_dominated",
    "epsilon_additive",
    "igd_plus",
    "gd_plus",
    "front_distance",
    "spacing",
    "max_gap",
    "attainment",
    "steerability",
    "kendall_tau",
    "spearman",
]
