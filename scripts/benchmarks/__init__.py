"""What scripts/benchmark.py is made of.

processes   a fresh process, its output, and the memory of all that it started
products    seconds of a model's matrix products: the bound
systems     one way each to do a workload: fedsim, the baselines, the bound
tasks       which systems do which workload, and what is to be reached
elsewhere   what other simulators took on another machine
watched     fedsim's command line, which also says when its actors were up
section     a task's section of the page: tables, points, checks
report      the Markdown page, from the Parquet files alone
actors      its sections on actors: how they start, and what hundreds of them cost
plot        the figure, likewise
"""
