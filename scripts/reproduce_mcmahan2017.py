"""Reproduces Tables 1 and 2 of McMahan et al. 2017, cell by cell; writes results/published/mcmahan2017/.

    python scripts/reproduce_mcmahan2017.py                          # goes on until all is done: days on two cores
    python scripts/reproduce_mcmahan2017.py --hours 2                # for so long; a later call goes on from there
    python scripts/reproduce_mcmahan2017.py --cells 'table1-2nn-*'   # these
    python scripts/reproduce_mcmahan2017.py --cells 'table?-cnn-*' --gpu --jobs 8   # on a GPU
    python scripts/reproduce_mcmahan2017.py --variants               # some cells, with one thing changed at a time
    python scripts/reproduce_mcmahan2017.py --report                 # runs nothing; the tables and plots anew

What is run, and what counts as agreement, says scripts/mcmahan2017/plan.toml. Cells come in the order of their cost.
What has been run is never run again: its rows are in the Parquet files. Runs that were interrupted are under
results/mcmahan2017/.

Reference:
    McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017. https://arxiv.org/abs/1602.05629
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from torch.cuda import device_count as gpus

from fedsim.errors import InputError
from mcmahan2017 import page, plan, variants
from mcmahan2017.search import Task, next_tasks
from mcmahan2017.store import Store
from mcmahan2017.work import Finished, end_with_parent, work

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "results" / "published" / "mcmahan2017"
RUNS = ROOT / "results" / "mcmahan2017"


def reproduce(
    the_plan: plan.Plan,
    cells: Sequence[plan.Cell],
    store: Store,
    runs: Path,
    until: float,
    jobs: int,
    *,
    on_gpu: bool = False,
) -> None:
    """Makes the runs of some cells, as many at a time as there are jobs.

    Args:
        the_plan: the plan.
        cells: of these, in this order.
        store: what has been run.
        runs: the folder of unfinished runs.
        until: `time.time()` at which it ends.
        jobs: processes, one a run.
        on_gpu: they compute there.
    """
    going: dict[Future[Finished | None], Task] = {}
    with _pool(jobs) as pool:
        while True:
            free = jobs - len(going)
            for task in _tasks(the_plan, cells, store, {task.key for task in going.values()})[:free]:
                if time.time() < until:
                    going[pool.submit(work, task, runs, until, on_gpu=on_gpu)] = task
            if not going:
                return
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                task, finished = going.pop(future), future.result()
                if finished:
                    store.add(finished)
                print(f"{task.cell.name} lr={task.rate:g} seed={task.seed}: {_said(finished)}", flush=True)


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=end_with_parent)


def _tasks(the_plan: plan.Plan, cells: Sequence[plan.Cell], store: Store, going: set[object]) -> list[Task]:
    """What can be started now, the first cells first."""
    tasks = [task for cell in cells for task in next_tasks(the_plan, cell, store.done(cell))]
    return [task for task in tasks if task.key not in going]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other reproduction writes into this folder; none can until the end."""
    held, is_alone = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_alone = False
        yield is_alone
    finally:
        os.close(held)


def _said(finished: Finished | None) -> str:
    if finished is None:
        return "interrupted, to go on"
    row = finished.row
    return f"{row['rounds_to_target']:.1f} rounds to the target, of {row['rounds']}, in {row['seconds']:.0f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the arguments, runs, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cells", nargs="+", default=["*"], metavar="PATTERN", help="of these names, as a shell matches files"
    )
    parser.add_argument(
        "--hours", type=float, default=float("inf"), help="ends after so long (default: when all is done)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; a core each (default: %(default)s)"
    )
    parser.add_argument("--gpu", action="store_true", help="computes on the GPU, which the jobs share")
    parser.add_argument("--variants", action="store_true", help="what explains a difference, instead of the cells")
    parser.add_argument("--report", action="store_true", help="only writes the page anew")
    parser.add_argument(
        "--output",
        type=Path,
        default=PUBLISHED,
        metavar="DIR",
        help="of the Parquet files and the page (default: %(default)s)",
    )
    parser.add_argument(
        "--runs", type=Path, default=RUNS, metavar="DIR", help="for unfinished runs (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    the_plan = plan.read()
    names = [cell.name for cell in the_plan.cells]
    for pattern in args.cells:
        if not fnmatch.filter(names, pattern):
            parser.error(f"no cell {pattern!r}; there are {', '.join(names)}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give a number of processes, from 1")
    if not args.hours >= 0:  # nan neither
        parser.error(f"--hours {args.hours:g}: give a number of hours, from 0")
    if args.gpu and (args.variants or args.report):
        parser.error("--gpu is for the cells: the variants are measured on the CPU")
    if args.gpu and not gpus():
        parser.error("--gpu: torch finds no GPU here")
    if args.report and not any((args.output / name).is_file() for name in ("runs.parquet", variants.FILE)):
        parser.error(f"--report: nothing has been run into {args.output}; name the --output of a reproduction")
    for option, folder in () if args.report else (("--output", args.output), ("--runs", args.runs)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"{option} {folder}: {error.strerror}; name a folder that is there, or can be made")
    try:
        Store(args.output)
    except InputError as error:
        parser.error(f"--output: {error}")
    cells = [cell for cell in the_plan.cells if any(fnmatch.fnmatch(cell.name, each) for each in args.cells)]
    if not args.report:
        with _alone(args.output) as is_alone:
            if not is_alone:
                parser.error(
                    f"another reproduction writes into {args.output}; wait until it ends, or name another --output"
                )
            if args.variants:
                with _pool(args.jobs) as pool:
                    variants.measure(the_plan, args.output, pool)
            else:
                until = min(time.time() + 3600 * args.hours, 1e12)
                reproduce(the_plan, cells, Store(args.output), args.runs, until, args.jobs, on_gpu=args.gpu)
    page.write(the_plan, Store(args.output))
    print(args.output / "README.md")


if __name__ == "__main__":
    main()
