"""What a person looks at after training: the table of methods, the picture of the fronts, the page with the slider."""

from mopl.report.page import write_page
from mopl.report.plot import plot_front
from mopl.report.records import Metric
from mopl.report.table import print_table

__all__ = ["Metric", "print_table", "plot_front", "write_page"]
