"""The quality benchmark: its plan, one run on the tiny pair, and the report made from records."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from bench_quality import records
from bench_quality.plan import (
    DATA_FREE_PARTS,
    GROUPS,
    LONG,
    OURS,
    PAIRS,
    PARTS,
    SMALL,
    Run,
    plan,
)
from bench_quality.report import write_report
from bench_quality.run import Bench, run_all
from pairs import tiny
from pairs.pair import cache_root
from tiny_pairs import make_config

pytestmark = pytest.mark.untraced

FIELDS = {
    *("id", "pair", "label", "method", "share", "seed", "calibration", "samples", "switches"),
    *("questions", "figures", "kept", "bytes", "ratio", "seconds"),
    *("finished", "machine", "threads", "versions", "commit"),
}


def test_ids_are_unique_and_say_what_differs():
    runs = plan(GROUPS)
    assert len({(run.pair, run.id) for run in runs}) == len(runs)
    described = [str((run.pair, run.label, run.share, run.seed, run.calibration)) for run in runs]
    described = [f"{text} {run.samples}" for text, run in zip(described, runs, strict=True)]
    assert len(set(described)) == len(runs)
    switches = PARTS | DATA_FREE_PARTS
    assert all(run.switches == switches.get(run.label, {}) for run in runs)


def test_ids_are_stable():
    """They name the records on disk: a changed id would orphan them."""
    assert Run("rxnfp", OURS, OURS, 16).id == "deltamix-kl_1of16_matched128_seed0"
    free = Run("rxnfp", "min-max, groups of 128", OURS, 32, 1, "none")
    assert free.id == "min-max-groups-of-128_1of32_none_seed1"
    assert Run("rxnfp", "BitDelta", "BitDelta", None).id == "bitdelta_own-size_matched128_seed0"


def test_the_main_table_comes_first_and_groups_share_runs():
    runs = plan(GROUPS)
    main = plan(["main"])
    assert runs[: len(main)] == main
    assert {run.seed for run in main if run.pair in LONG} == {0}
    # methods x (pairs x cells + the long pair's, less rxnfp at 1/128, whose overlay is larger)
    assert len(main) == 3 * (3 * 11 + 5 - 1)
    assert len(plan(["main", "parts"])) == len(main) + len(SMALL) * len(PARTS)


def test_a_pair_asked_for_is_used_in_every_group_but_the_tails():
    assert {run.pair for run in plan(GROUPS, ["tiny"])} == {"tiny"}
    assert plan(["tails"], [*PAIRS]) == []
    assert {run.pair for run in plan(GROUPS, ["pocket-noise"])} == {"pocket-noise"}


@pytest.mark.parametrize("switches", PARTS.values(), ids=PARTS)
def test_every_part_is_a_valid_config(switches):
    make_config(method=OURS, **switches)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """The tiny pair, trained even less."""
    tmp = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAMIX_CACHE", str(tmp / "pairs"))
        patch.setattr(tiny, "PRETRAIN", replace(tiny.PRETRAIN, steps=15))
        patch.setattr(tiny, "FINETUNE", replace(tiny.FINETUNE, steps=30))
        tiny.build(cache_root())
        yield Bench(tmp / "results", questions=32)


# 1/2 because the headers alone take 1/6.
RUNS = [Run("tiny", m, m, 2, samples=16) for m in (OURS, "delta-come", "low rank")]


def test_runs_become_records(bench):
    assert not any(map(bench.done, RUNS))
    assert run_all(bench, RUNS) == []
    for run in RUNS:
        record = records.read(records.run_path(bench.results, run.pair, run.id))
        assert record.keys() >= FIELDS
        assert record["questions"] == 32
        assert 0 < record["figures"]["kl"] < 1
        assert 0 <= record["figures"]["accuracy"] <= 1
        assert record["kept"].keys() == {"kl", "nll", "accuracy"}
        assert record["ratio"] <= 0.5
        kinds = ("payload", "scales", "metadata", "overlay")
        assert record["bytes"]["total"] == sum(record["bytes"][kind] for kind in kinds)
        if run.method != "low rank":
            assert record["stages"].keys() >= {"statistics", "compression"}
            assert record["types"]["self_attn.q_proj"]["matrices"] == 2
            assert (
                sum(entry["matrices"] for entry in record["types"].values()) == 11
            )  # k and v are too small
    assert all(map(bench.done, RUNS))


def test_base_and_finetune_are_measured_once(bench):
    path = records.pair_path(bench.results, "tiny")
    ends = bench.ends("tiny")
    assert ends["finetuned"]["kl"] == pytest.approx(0, abs=1e-9)
    assert ends["base"]["nll"] > ends["finetuned"]["nll"]
    records.write(path, ends | {"finished": "kept"})
    assert bench.ends("tiny")["finished"] == "kept"
    with pytest.raises(ValueError, match="of 32 held-out rows, not 16"):
        Bench(bench.results, questions=16).ends("tiny")


def test_a_broken_run_does_not_stop_the_others(bench, capsys):
    small = Run("tiny", OURS, OURS, 1000)
    assert run_all(bench, [small]) == [f"tiny {small.id}"]
    assert not bench.done(small)
    assert "too small" in capsys.readouterr().err


def test_the_report_is_made_from_the_records(bench):
    """As if the tiny pair had been run at 1/32 with 128 texts, so that tables show it."""
    run_all(bench, [run for run in RUNS if not bench.done(run)])
    for run in RUNS[:2]:
        record = records.read(records.run_path(bench.results, run.pair, run.id))
        shown = Run("tiny", run.label, run.method, 32)
        record |= {"id": shown.id, "share": 32, "samples": 128}
        records.write(records.run_path(bench.results, "tiny", shown.id), record)
    text = write_report(bench.results).read_text(encoding="utf-8")
    assert "| 1/32 | tiny |" in text
    assert "KL / KL of delta-come at 1/32 ≤ 0.30 |" in text
    assert "| tiny | `self_attn.q_proj` | 2 |" in text
    assert "No record yet." in text  # the other groups


def test_a_report_without_records_says_so(tmp_path):
    assert "No records yet." in write_report(tmp_path).read_text(encoding="utf-8")


def test_records_are_written_whole_and_without_nan(tmp_path):
    path = tmp_path / "new" / "record.json"
    records.write(path, {"figures": {"nll": float("nan"), "kl": 0.5}, "list": [float("inf")]})
    assert json.loads(path.read_text()) == {"figures": {"nll": None, "kl": 0.5}, "list": [None]}
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]
