"""Methods that `registration.register` gives every `PreTrainedModel`; see `multi_delta.manager`."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from transformers import PreTrainedModel

from ..multi_delta.manager import DEFAULT, manager_of
from ..multi_delta.pool import DeltaMemory
from ..nn.delta_module import own_deltas


def load_delta(
    self: PreTrainedModel,
    repo: Any,
    name: str = DEFAULT,
    verify_tensors: bool = True,
    **base_kwargs: Any,
) -> None:
    """Load a delta repo beside the base, under a name; the first one becomes active.

    The base's files are looked for where `from_pretrained` found them, and its weights compared
    with them: all rows before the first delta, in 0.5 to 0.9 s a GB on an EPYC core, every 64th
    before each further one. Warns once of settings in which the delta cannot differ by row.

    Args:
        repo: folder or Hub id of a delta repo made from this model's base.
        name: what to call it in `set_delta` and `delta_names`.
        verify_tensors: compare its tensors with their fingerprints, now and each time it comes back
            from disk, 0.9 s for a GB of delta.
        base_kwargs: how to fetch it (`revision`, `token`, `cache_dir`, `local_files_only`).

    Raises:
        DeltaMixError: not a delta repo, made from another base, damaged, the base was edited in
            memory, or the name is taken; the model is as it was.
    """
    manager_of(self).load(str(repo), name, verify_tensors, **base_kwargs)


def set_delta(self: PreTrainedModel, name: str | None) -> None:
    """Use this delta for all calls that name none; None or "__base__" is the base.

    Raises:
        DeltaMixError: no delta of that name is loaded, or a list of names.
    """
    manager_of(self).choose(name)


@contextmanager
def use_deltas(self: PreTrainedModel, names: str | Sequence[str | None]) -> Iterator[None]:
    """Context manager: use these deltas in calls that name none, compiled ones and graphs too.

    A compiled model takes its rows' deltas from here, and so does a captured graph that is replayed
    within. Only one thread can be within at a time.

    Args:
        names: one for each row of a batch, None or "__base__" for the base, or one for all rows.

    Raises:
        DeltaMixError: no delta of that name is loaded, or no room for all of them.
    """
    with manager_of(self).using(names):
        yield


def disable_deltas(self: PreTrainedModel) -> AbstractContextManager[object]:
    """Run the plain base, until `enable_deltas` or, in a `with`, until its end."""
    deltas, restored = manager_of(self), ExitStack()
    restored.callback(deltas.enable, deltas.enabled)
    deltas.enable(False)
    return restored


def enable_deltas(self: PreTrainedModel) -> None:
    """Undo `disable_deltas`."""
    manager_of(self).enable(True)


def delete_delta(self: PreTrainedModel, name: str) -> None:
    """Forget a delta and free its memory.

    Raises:
        DeltaMixError: no delta of that name is loaded.
    """
    manager_of(self).delete(name)


def list_deltas(self: PreTrainedModel) -> dict[str, int]:
    """Count the bytes of every loaded delta on the model's device, wherever it is now, by name."""
    return manager_of(self).pool.placed_bytes() if _has_deltas(self) else {}


def set_delta_memory(self: PreTrainedModel, budget_bytes: int | None, host_bytes: int = 0) -> None:
    """Bound the memory of loaded deltas; those used longest ago are moved out and come back.

    Args:
        budget_bytes: for deltas beside the base, on its device; None: no bound.
        host_bytes: for copies in host memory, from which a delta comes back faster than from disk.

    Raises:
        DeltaMixError: deltas in use, or on no disk, take more; nothing is changed.
    """
    manager_of(self).pool.resize(budget_bytes, host_bytes)


def delta_memory(self: PreTrainedModel) -> DeltaMemory:
    """Count the bytes of every delta by where it is; with their budget."""
    return manager_of(self).pool.memory()


def active_deltas(self: PreTrainedModel) -> list[str]:
    """Return the delta in use for calls that name none, as a list like PEFT's; empty: the base."""
    if "dm_deltas" not in self.__dict__:  # a property must not change the model
        return [DEFAULT] if _has_deltas(self) else []
    deltas = manager_of(self)
    active = deltas.pool.active
    return [active] if deltas.enabled and active is not None else []


def _has_deltas(model: PreTrainedModel) -> bool:
    return "dm_deltas" in model.__dict__ or bool(own_deltas(model))
