"""Tools around runs: data sets, detection, plans, reports, tables, pages, pictures, benchmarks."""
