"""What a person looks at after training: a table of methods, a picture of the fronts, a page with sliders, CSV."""

from mopl.report.page import write_page
from mopl.report.plot import plot_front
from mopl.report.records import Metric, write_csv
from mopl.report.table import print_table

__all__ = ["Metric", "print_table", "plot_front", "write_csv", "write_page"]
