"""The quality benchmark: compress pairs in many ways, judge each, keep one record a run.

    python examples/bench_quality/run.py --group main              # continues where it was stopped
    python examples/bench_quality/run.py --pair rxnfp --group parts
    python examples/bench_quality/run.py --report-only             # tables and plots from records

A run whose record exists is skipped (`--again` does it anew), so the same command continues after
a kill. Records lie in docs/results/quality/, the report they make in docs/results/quality.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads spin

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1]))

from bench_quality import records
from bench_quality.baseline_runs import PeerSkipped, is_baseline, run_baseline
from bench_quality.judge import Judge, compress, kept
from bench_quality.plan import GROUPS, LONG, Run, plan
from bench_quality.texts import get_pair
from pairs.pair import cache_root

RESULTS = records.ROOT / "docs" / "results"


class Bench:
    """Runs and their records under `results`."""

    def __init__(self, results: Path, questions: int | None = None, exact: bool = False):
        self.results, self.questions, self.exact = results, questions, exact
        # One at a time: the reference logits of a pair may take gigabytes.
        self.judge = lru_cache(maxsize=1)(self._judge)

    def _judge(self, pair: str) -> Judge:
        return Judge(get_pair(pair), self.questions, self.exact)

    def ends(self, pair: str) -> dict:
        """Figures of base and fine-tune, measured once a pair.

        Raises:
            ValueError: they were measured on another number of rows.
        """
        path, judge = records.pair_path(self.results, pair), self.judge(pair)
        asked = len(judge.pair.rows("heldout", judge.questions))
        if path.exists():
            found = records.read(path)
            if found["questions"] != asked:
                raise ValueError(
                    f"the records of {pair} are of {found['questions']} held-out rows, "
                    f"not {asked}; give the same --questions, or another --results folder"
                )
            if found["exact"] or not judge.exact:
                return found
        found = judge.ends() | records.circumstances()
        records.write(path, found)
        return records.read(path)

    def done(self, run: Run) -> bool:
        return records.run_path(self.results, run.pair, run.id).exists()

    def do(self, run: Run) -> dict:
        """Compress, judge, write the record."""
        ends, judge = self.ends(run.pair), self.judge(run.pair)
        found = (run_baseline if is_baseline(run) else compress)(run, judge)
        found["kept"] = kept(found["figures"], ends["base"], ends["finetuned"])
        record = {"id": run.id, **asdict(run), "questions": ends["questions"]}
        path = records.run_path(self.results, run.pair, run.id)
        records.write(path, record | found | records.circumstances())
        return records.read(path)


def run_all(bench: Bench, runs: list[Run]) -> list[str]:
    """Do the runs; one that fails is reported and does not stop the others. Returns failures."""
    failed = []
    for number, run in enumerate(runs, 1):
        name = f"[{number}/{len(runs)}] {run.pair} {run.id}"
        started = time.perf_counter()
        try:
            record = bench.do(run)
        except PeerSkipped as reason:
            print(f"{name}: skipped, {reason}", flush=True)
        except Exception:  # a night's work must not be lost to one broken run
            traceback.print_exc()
            print(f"{name}: FAILED", flush=True)
            failed.append(f"{run.pair} {run.id}")
        else:
            figures = record["figures"]
            print(
                f"{name}: KL {figures['kl']:.5f}, ratio {record['ratio']:.5f}, "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", action="append", help="repeatable; default: those of the group")
    parser.add_argument("--group", action="append", choices=GROUPS, help="repeatable; default all")
    parser.add_argument("--questions", type=int, help="held-out rows (default: plan.py says)")
    parser.add_argument("--exact", action="store_true", help="exact match too; slow")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--again", action="store_true", help="redo runs that have a record")
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    bench = Bench(options.results, options.questions, options.exact)
    runs = plan(options.group or GROUPS, options.pair)
    if not options.pair:  # hours of training: only if someone did it before
        absent = {pair for pair in LONG if not (cache_root() / pair / "pair.json").exists()}
        runs = [run for run in runs if run.pair not in absent]
    if not options.again:
        runs = [run for run in runs if not bench.done(run)]
    if options.list:
        print("\n".join(f"{run.pair} {run.id}" for run in runs))
        return 0
    failed = [] if options.report_only else run_all(bench, runs)
    from bench_quality.report import write_report

    print(f"report: {write_report(options.results)}")
    for name in failed:
        print(f"FAILED: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
