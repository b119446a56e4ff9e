"""The pool: never above its budget, never without what is in use."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from deltamix_hf import DeltaMixError
from deltamix_hf.checkpoint.delta_repo import StoredDelta
from deltamix_hf.multi_delta.pool import Pool

SIZE = 100


def stored(name: str, size: int = SIZE) -> StoredDelta:
    return StoredDelta({}, {"w": torch.zeros(size, dtype=torch.uint8)}, {}, name)


class Shelf:
    """Where a pool places deltas; counts bytes and reads."""

    def __init__(self, names=(), budget=None, host_budget=0):
        self.placed: dict[str, int] = {}
        self.most = 0
        self.reads: list[str] = []
        self.pool = Pool(self.place, self.remove)
        self.pool.resize(budget, host_budget)
        for name in names:
            self.add(name)

    def add(self, name, size=SIZE):
        self.pool.add(name, stored(name, size), lambda: self.read(name, size))

    def read(self, name, size=SIZE):
        self.reads.append(name)
        return stored(name, size)

    def place(self, name, delta):
        assert name not in self.placed
        self.placed[name] = delta.nbytes
        self.most = max(self.most, sum(self.placed.values()))

    def remove(self, name):
        self.placed.pop(name, None)


def test_the_longest_unused_makes_room():
    shelf = Shelf("abc", budget=2 * SIZE)
    assert list(shelf.placed) == ["b", "c"]
    with shelf.pool.holding(["b"]):
        pass
    with shelf.pool.holding(["a"]):
        assert sorted(shelf.placed) == ["a", "b"] and shelf.reads == ["a"]
    assert shelf.most == 2 * SIZE
    assert shelf.pool.memory().resident == {"a": SIZE, "b": SIZE}
    assert shelf.pool.memory().total == 2 * SIZE


def test_what_is_in_use_stays():
    shelf = Shelf("abc", budget=2 * SIZE)
    with shelf.pool.holding(["b"]), shelf.pool.holding(["a"]), shelf.pool.holding(["b", "a"]):
        assert sorted(shelf.placed) == ["a", "b"]
    shelf.pool.activate(["a"])
    for name in "bcbc":
        with shelf.pool.holding([name]):
            assert sorted(shelf.placed) == ["a", name]


def test_host_copies_come_back_without_the_disk():
    shelf = Shelf("abc", budget=SIZE, host_budget=2 * SIZE)
    assert sorted(shelf.pool.memory().host) == ["b", "c"]
    for name in "bcb":
        with shelf.pool.holding([name]):
            pass
    assert shelf.reads == []
    with shelf.pool.holding(["a"]):
        assert shelf.reads == ["a"] and sorted(shelf.pool.memory().host) == ["a", "b"]
    shelf.pool.resize(SIZE, 0)
    assert shelf.pool.memory().host == {}


def test_no_room_is_an_error_not_a_wait():
    shelf = Shelf("abc", budget=2 * SIZE)
    with pytest.raises(DeltaMixError, match=r"300 bytes; the budget of 200 bytes cannot hold them"):
        shelf.pool.holding("abc").__enter__()
    shelf.pool.activate(["a"])
    with pytest.raises(DeltaMixError, match=r"beside \['a'\], which stay"):
        shelf.pool.holding("bc").__enter__()
    with pytest.raises(DeltaMixError, match="are in use, or on no disk"):
        shelf.pool.resize(SIZE - 1, 0)
    with pytest.raises(DeltaMixError, match="cannot hold"):
        shelf.add("large", 3 * SIZE)
    assert sorted(shelf.pool.entries) == ["a", "b", "c"] and shelf.pool.budget == 2 * SIZE
    with pytest.raises(DeltaMixError, match="cannot hold"):
        shelf.pool.activate(["a", "b", "c"])
    assert shelf.pool.entries["a"].active and "a" in shelf.placed
    shelf.pool.activate([])
    shelf.pool.resize(SIZE - 1, 0)
    assert not shelf.placed


def test_what_is_on_no_disk_stays():
    shelf = Shelf(budget=2 * SIZE)
    shelf.pool.add("memory", stored("memory"), None)
    shelf.add("a")
    shelf.add("b")
    assert sorted(shelf.placed) == ["b", "memory"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["read", "place"])
def test_an_interrupted_load_leaves_the_pool_as_it_was(monkeypatch, where, error):
    shelf = Shelf("ab", budget=SIZE)
    plain = getattr(shelf, where)

    def fails(*args):
        plain(*args)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(shelf.pool if where == "place" else shelf, where, fails)
        with pytest.raises(error):
            shelf.pool.holding(["a"]).__enter__()
        with pytest.raises(error) if where == "place" else pytest.raises(DeltaMixError):
            shelf.add("b" if where == "read" else "c")
    assert not shelf.placed and sorted(shelf.pool.entries) == ["a", "b"]
    assert all(not e.users and not e.resident for e in shelf.pool.entries.values())
    with shelf.pool.holding(["b"]):
        assert list(shelf.placed) == ["b"]


def test_threads_at_random():
    """Twenty deltas, room for four, eight threads that use up to three at a time."""
    names = [f"d{i}" for i in range(20)]
    shelf = Shelf(names, budget=4 * SIZE)
    failures = []

    def work(seed):
        own = random.Random(seed)
        try:
            for _ in range(60):
                chosen = own.sample(names, own.randint(1, 3))
                with shelf.pool.holding(chosen):
                    time.sleep(own.random() * 1e-4)
                    if not all(name in shelf.placed for name in chosen):
                        failures.append(chosen)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not failures
    assert shelf.most <= 4 * SIZE
    assert all(not entry.users for entry in shelf.pool.entries.values())


def test_forgetting_waits_for_the_batch_to_end():
    shelf = Shelf("ab")
    gone = threading.Event()

    def forget():
        shelf.pool.discard("a")
        gone.set()

    with shelf.pool.holding(["a"]):
        thread = threading.Thread(target=forget)
        thread.start()
        assert not gone.wait(0.05) and "a" in shelf.placed
    thread.join(10)
    assert gone.is_set() and list(shelf.placed) == ["b"]
    with pytest.raises(DeltaMixError, match=r"no delta called 'a' is loaded; there are \['b'\]"):
        shelf.pool.discard("a")
