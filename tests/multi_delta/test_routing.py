"""Which rows take which deltas."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf import DeltaMixError
from deltamix_hf.multi_delta.routing import Route, Router

CPU = torch.device("cpu")
combinations = st.sampled_from([(), ("a",), ("b",), ("a", "b")])


@given(st.lists(combinations, min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 4))
def test_rows_are_those_named(rows, beams, length):
    route = Route(rows).of_batch(len(rows) * beams)
    found = dict(route.groups(len(rows) * beams * length, CPU))
    assert () not in found
    for i in range(len(rows) * beams * length):
        row = rows[i // (beams * length)]
        holders = [combination for combination, numbers in found.items() if i in numbers.tolist()]
        assert holders == ([row] if row else [])


def test_single():
    assert Route([("a",)] * 3).single == ("a",) and Route([()]).single == ()
    assert Route([("a",), ()]).single is None
    assert Route([("a",)]).of_batch(7).single == ("a",)


def test_a_batch_that_does_not_fit():
    with pytest.raises(DeltaMixError, match="2 rows were named, but the batch has 3"):
        Route([("a",), ()]).of_batch(3)


def test_each_thread_has_its_own_route():
    router = Router()
    seen = []
    with router.using(Route([("a",)])):
        with router.using(None):
            assert router.route.single == ("a",)
        thread = threading.Thread(target=lambda: seen.append(router.route.single))
        thread.start()
        thread.join()
        with router.using(Route([("b",)])):
            assert router.route.single == ("b",)
        assert router.route.single == ("a",)
    assert router.route.single == () and seen == [()]
