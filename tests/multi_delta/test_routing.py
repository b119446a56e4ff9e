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
deltas = st.sampled_from([None, "a", "b"])


@given(st.lists(deltas, min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 4))
def test_rows_are_those_named(rows, beams, length):
    route = Route(rows).of_batch(len(rows) * beams)
    found = dict(route.groups(len(rows) * beams * length, CPU))
    assert None not in found
    for i in range(len(rows) * beams * length):
        row = rows[i // (beams * length)]
        holders = [name for name, numbers in found.items() if i in numbers.tolist()]
        assert holders == ([row] if row else [])


def test_rows_that_are_alike():
    assert Route(["a"] * 3).alike and Route([None]).alike and not Route(["a", None]).alike
    assert Route(["a"]).of_batch(7).of_rows(7) == ["a"] * 7


def test_a_batch_that_does_not_fit():
    with pytest.raises(DeltaMixError, match="2 rows were named, but the batch has 3"):
        Route(["a", None]).of_batch(3)


def test_each_thread_has_its_own_route():
    router = Router()
    seen = []
    with router.using(Route(["a"])):
        with router.using(None):
            assert router.route.rows == ("a",)
        thread = threading.Thread(target=lambda: seen.append(router.route.rows))
        thread.start()
        thread.join()
        with router.using(Route(["b"])):
            assert router.route.rows == ("b",)
        assert router.route.rows == ("a",)
    assert router.route.rows == (None,) and seen == [(None,)]
