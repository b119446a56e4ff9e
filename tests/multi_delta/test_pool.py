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


class TensorList:
    """Where a pool places deltas; counts bytes and reads."""

    def __init__(self, names=(), budget=None, host_budget=0, copies=1):
        self.placed: dict[str, int] = {}
        self.most = 0
        self.reads: list[str] = []
        self.copies = copies
        self.pool = Pool(self.place, self.remove, self.sizes, lambda: self.copies > 1)
        self.pool.resize(budget, host_budget)
        for name in names:
            self.add(name)

    def sizes(self, delta):
        return delta.nbytes, 2 * delta.nbytes

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
    tensor_list = TensorList("abc", budget=2 * SIZE)
    assert list(tensor_list.placed) == ["b", "c"]
    with tensor_list.pool.holding(["b"]):
        pass
    with tensor_list.pool.holding(["a"]):
        assert sorted(tensor_list.placed) == ["a", "b"] and tensor_list.reads == ["a"]
    assert tensor_list.most == 2 * SIZE
    assert tensor_list.pool.memory().resident == {"a": SIZE, "b": SIZE}
    assert tensor_list.pool.memory().total == 2 * SIZE


def test_what_is_in_use_stays():
    tensor_list = TensorList("abc", budget=2 * SIZE)
    with (
        tensor_list.pool.holding(["b"]),
        tensor_list.pool.holding(["a"]),
        tensor_list.pool.holding(["b", "a"]),
    ):
        assert sorted(tensor_list.placed) == ["a", "b"]
    tensor_list.pool.activate("a")
    for name in "bcbc":
        with tensor_list.pool.holding([name]):
            assert sorted(tensor_list.placed) == ["a", name]


def test_host_copies_come_back_without_the_disk():
    tensor_list = TensorList("abc", budget=SIZE, host_budget=2 * SIZE)
    assert sorted(tensor_list.pool.memory().host) == ["b", "c"]
    for name in "bcb":
        with tensor_list.pool.holding([name]):
            pass
    assert tensor_list.reads == []
    with tensor_list.pool.holding(["a"]):
        assert tensor_list.reads == ["a"] and sorted(tensor_list.pool.memory().host) == ["a", "b"]
    tensor_list.pool.resize(SIZE, 0)
    assert tensor_list.pool.memory().host == {}


def test_no_room_is_an_error_not_a_wait():
    tensor_list = TensorList("abc", budget=2 * SIZE)
    with pytest.raises(DeltaMixError, match=r"300 bytes; the budget of 200 bytes cannot hold them"):
        tensor_list.pool.holding("abc").__enter__()
    tensor_list.pool.activate("a")
    with pytest.raises(DeltaMixError, match=r"beside \['a'\], which stay"):
        tensor_list.pool.holding("bc").__enter__()
    with pytest.raises(DeltaMixError, match="are in use, or on no disk"):
        tensor_list.pool.resize(SIZE - 1, 0)
    with pytest.raises(DeltaMixError, match="cannot hold"):
        tensor_list.add("large", 3 * SIZE)
    assert (
        sorted(tensor_list.pool.entries) == ["a", "b", "c"] and tensor_list.pool.budget == 2 * SIZE
    )
    with pytest.raises(DeltaMixError, match="no delta called 'd'"):
        tensor_list.pool.activate("d")
    assert tensor_list.pool.active == "a" and "a" in tensor_list.placed
    tensor_list.pool.activate(None)
    tensor_list.pool.resize(SIZE - 1, 0)
    assert not tensor_list.placed


def test_what_is_on_no_disk_stays():
    tensor_list = TensorList(budget=2 * SIZE)
    tensor_list.pool.add("memory", stored("memory"), None)
    tensor_list.add("a")
    tensor_list.add("b")
    assert sorted(tensor_list.placed) == ["b", "memory"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["read", "place"])
def test_an_interrupted_load_leaves_the_pool_as_it_was(monkeypatch, where, error):
    tensor_list = TensorList("ab", budget=SIZE)
    plain = getattr(tensor_list, where)

    def fails(*args):
        plain(*args)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(tensor_list.pool if where == "place" else tensor_list, where, fails)
        with pytest.raises(error):
            tensor_list.pool.holding(["a"]).__enter__()
        with pytest.raises(error) if where == "place" else pytest.raises(DeltaMixError):
            tensor_list.add("b" if where == "read" else "c")
    assert not tensor_list.placed and sorted(tensor_list.pool.entries) == ["a", "b"]
    assert all(not e.users and not e.resident for e in tensor_list.pool.entries.values())
    with tensor_list.pool.holding(["b"]):
        assert list(tensor_list.placed) == ["b"]


def test_threads_at_random():
    """Twenty deltas, room for four, eight threads that use up to three at a time."""
    names = [f"d{i}" for i in range(20)]
    tensor_list = TensorList(names, budget=4 * SIZE)
    failures = []

    def work(seed):
        own = random.Random(seed)
        try:
            for _ in range(60):
                chosen = own.sample(names, own.randint(1, 3))
                with tensor_list.pool.holding(chosen):
                    time.sleep(own.random() * 1e-4)
                    if not all(name in tensor_list.placed for name in chosen):
                        failures.append(chosen)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not failures
    assert tensor_list.most <= 4 * SIZE
    assert all(not entry.users for entry in tensor_list.pool.entries.values())


def test_forgetting_waits_for_the_batch_to_end():
    tensor_list = TensorList("ab")
    gone = threading.Event()

    def forget():
        tensor_list.pool.discard("a")
        gone.set()

    with tensor_list.pool.holding(["a"]):
        thread = threading.Thread(target=forget)
        thread.start()
        assert not gone.wait(0.05) and "a" in tensor_list.placed
    thread.join(10)
    assert gone.is_set() and list(tensor_list.placed) == ["b"]
    with pytest.raises(DeltaMixError, match=r"no delta called 'a' is loaded; there are \['b'\]"):
        tensor_list.pool.discard("a")


def test_a_budget_counts_what_is_on_the_device():
    """Where kernels keep codes of their own, twice what a delta takes in host memory."""
    shelf = TensorList(["one"], budget=3 * SIZE, host_budget=3 * SIZE, copies=2)
    shelf.add("two")
    memory = shelf.pool.memory()
    assert memory.resident == {"two": 2 * SIZE} and memory.host == {"one": SIZE, "two": SIZE}
    with pytest.raises(DeltaMixError, match=f"take {4 * SIZE:,} bytes"):
        shelf.pool.check_possible(["one", "two"])
    assert shelf.pool.placed_bytes() == {"one": 2 * SIZE, "two": 2 * SIZE}
    shelf.copies = 1  # the model moves to where they do not run
    with shelf.pool.holding(["one", "two"]):
        assert shelf.pool.memory().resident == shelf.pool.placed_bytes()
    assert shelf.pool.memory().resident == {"one": SIZE, "two": SIZE}
