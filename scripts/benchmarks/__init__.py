"""What scripts/benchmark.py is made of.

processes   a fresh process, its output, and the memory of all that it started
products    seconds of a model's matrix products: the bound
systems     one way each to do a workload: fedsim, the baselines, the bound
tasks       which systems do which workload, and what is to be reached
elsewhere   what other simulators took on another machine
report      the Markdown page, from the Parquet files alone
plot        the figure, likewise
"""
