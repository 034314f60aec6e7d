"""Tools around runs: data sets, detection, plans, reports, tables, pages, pictures, benchmarks."""

from run import early  # noqa: F401
