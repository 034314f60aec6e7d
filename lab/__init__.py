"""What is made of runs: data sets, reports, tables, pages, pictures, plans, benchmarks. Nothing above needs it."""
