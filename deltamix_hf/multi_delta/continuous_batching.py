"""Continuous batching (`generate_batch`) with a delta for each request.

Continuous batching packs tokens of many requests into one row [1, tokens], in a thread of its own,
and lets requests that start alike share blocks of the KV cache. So:

- Every token takes the delta of its request. A step's route (`PackedRoute`) is made and set in
  that thread.
- A request begins in one thread and ends in another, so an object (`RequestDelta`) holds its delta
  in the pool. It travels among the request's `logit_processor_kwargs`, which transformers hands on
  to whatever the request becomes: its forks, or its second life after it had to make room in the
  cache.
- Shared blocks are found by a hash of their tokens. Tokens of a request with a delta are hashed as
  other numbers, which stand for exactly this delta, its name and which loading of the name it was:
  requests share blocks only if theirs are the same.

CUDA graphs and `torch.compile` of a step would keep the deltas of the batch they saw first: they
are refused. All this leans on private parts of transformers; each use checks that they are there.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ..errors import DeltaMixError
from ..transformers_private import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    PagedAttentionCache,
)
from .end_tokens import chose_ends
from .pool import Pool
from .routing import Names, PackedRoute, Router, named_route

Inputs = Sequence[Sequence[int]]  # token ids of each request
KEY = "request_delta"  # among a request's logit_processor_kwargs
ACTIVE: Any = object()  # no name given: the delta in use for all calls
MARK = "mark_complete_blocks|mark_shareable_blocks_as_complete"  # now | up to transformers 5.17
HOOKS = {
    ContinuousBatchingManager: ("add_request", "_create_batch_processor", "_run_generation_loop"),
    ContinuousBatchProcessor: ("prepare_next_batch", "_generation_step"),
    PagedAttentionCache: ("search_prefix_match", MARK),
}


def init_continuous_batching(
    plain: Callable[..., Any], model: Any, *args: Any, **kwargs: Any
) -> RoutedBatchingManager:
    """Make what `plain` makes, routed among the model's deltas.

    Raises DeltaMixError if CUDA graphs or `torch.compile` are asked for, or for an unknown
    transformers.
    """
    _check_hooks()
    for value in (*args, *kwargs.values()):
        if isinstance(value, ContinuousBatchingConfig) and any(value.cuda_graph_booleans):
            raise DeltaMixError(
                "CUDA graphs replay the deltas of the batch they were recorded with: leave "
                "use_cuda_graph of the ContinuousBatchingConfig out, or set it to False"
            )
    cached = getattr(model, "_cached_continuous_batching_manager", None)
    if not isinstance(cached, RoutedBatchingManager):
        model.destroy_cached_continuous_batching_manager()  # it is from before the first delta
    manager = plain(model, *args, **kwargs)
    if not isinstance(manager, RoutedBatchingManager):
        config = manager.continuous_batching_config
        if config.varlen_compile_config is not None or config.decode_compile_config is not None:
            raise DeltaMixError(
                "torch.compile of continuous batching keeps the deltas of the batch it saw first: "
                "give no compile config"
            )
        config.use_cuda_graph = (False, False)  # transformers may have chosen them by itself
        manager.__class__ = RoutedBatchingManager
        manager.dm_deltas, manager.dm_requests = model.dm_deltas, set()
    return manager


def generate_batch(
    plain: Any, model: Any, inputs: Inputs, *args: Any, delta_names: Names = None, **kwargs: Any
) -> dict[str, Any]:
    """Run `plain` with a delta for each request; all stay resident until the last has ended.

    Raises DeltaMixError for an unknown name or a wrong number of them, or if not all have room.
    """
    prompts = name_prompts(model.dm_deltas.router, inputs, delta_names)
    with model.dm_deltas.pool.holding(names_of(prompts)):
        return plain(model, prompts, *args, **kwargs)


class RoutedBatchingManager(ContinuousBatchingManager):
    """A manager whose requests name their deltas."""

    dm_deltas: Any  # the model's `DeltaManager`
    dm_requests: set[RequestDelta]  # of those that may not have ended

    def add_request(
        self, input_ids: list[int], *args: Any, delta_name: str | None = ACTIVE, **kwargs: Any
    ) -> str | None:
        """Add a request that takes `delta_name`; None or "__base__" is the base.

        If not given, it takes the delta that is now in use for all calls. Waits while requests
        and calls under way leave no room for its delta. It ends by the delta's end tokens, if no
        `eos_token_id` is given and the manager's generation config has not others than the model's.

        Raises:
            DeltaMixError: an unknown name, or there can be no room for the delta.
        """
        one_of_many = isinstance(input_ids, Prompt)  # given the manager's end tokens
        if not isinstance(input_ids, Prompt):
            names = None if delta_name is ACTIVE else [delta_name]
            (input_ids,) = name_prompts(self.dm_deltas.router, [input_ids], names)
        self._check_room(names_of([input_ids]))
        self.logit_processor.supported_keys[KEY] = RequestDelta  # its clear() forgets them
        own, given = self.dm_deltas.ends.get(input_ids.delta), kwargs.get("eos_token_id")
        if own is not None and not chose_ends(self.model, self.generation_config):
            kwargs |= {"eos_token_id": own} if one_of_many or given is None else {}
        request_delta = RequestDelta(self.dm_deltas.pool, input_ids.delta)
        added = None
        try:
            added = super().add_request(input_ids, *args, **{**kwargs, KEY: request_delta})
        finally:
            if added is None:  # refused, or the manager takes no requests any more
                request_delta.end()
            else:  # only now, or the generating thread could think that the request has ended
                self.dm_requests.add(request_delta)
        return added

    def add_requests(
        self, inputs: list[list[int]], *args: Any, delta_names: Names = None, **kwargs: Any
    ) -> list[str]:
        """Add requests with a name for each, or one for all; see `add_request`.

        Raises:
            DeltaMixError: as above, or a wrong number of names; none is added.
        """
        prompts: list[Any] = list(inputs)
        if not all(isinstance(prompt, Prompt) for prompt in prompts):
            prompts = name_prompts(self.dm_deltas.router, prompts, delta_names)
        self._check_room(names_of(prompts))
        with self.dm_deltas.pool.holding(names_of(prompts)):
            return super().add_requests(prompts, *args, **kwargs)

    def _check_room(self, names: Sequence[str]) -> None:
        """Before the start no request ends and makes room: then do not wait for it."""
        if not self.is_running():
            self.dm_deltas.pool.check_possible([*names_of(self.dm_requests), *names])

    def release(self, requests: set[RequestDelta]) -> None:
        """Release the deltas of requests that have ended."""
        processor = self.batch_processor
        if requests and processor is not None and processor.inputs_and_outputs.compute_stream:
            processor.inputs_and_outputs.compute_stream.synchronize()  # it may still read them
        for request_delta in requests:
            request_delta.end()
        self.dm_requests.difference_update(requests)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor: Any = super()._create_batch_processor()
        processor.__class__, processor.cache.__class__ = RoutedBatchProcessor, RoutedCache
        processor.dm_manager, processor.cache.dm_scheduler = self, processor.scheduler
        return processor

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self.release(set(self.dm_requests))


class RoutedBatchProcessor(ContinuousBatchProcessor):
    """Runs every step with the deltas of its requests."""

    dm_manager: RoutedBatchingManager

    def prepare_next_batch(self) -> bool:
        ready = super().prepare_next_batch()
        manager, scheduler = self.dm_manager, self.scheduler
        known = set(manager.dm_requests)  # before the queue is looked at: theirs have been queued
        with manager.input_queue.mutex:
            queued = list(manager.input_queue.queue)
        states = *queued, *scheduler.waiting_requests.values(), *scheduler.active_requests.values()
        manager.release(known - {_request_delta(state) for state in states})
        return ready

    def _generation_step(self, model: Any) -> None:
        with self.dm_manager.dm_deltas.router.using(self._route(model)):
            super()._generation_step(model)

    def _route(self, model: Any) -> PackedRoute:
        io: Any = self.inputs_and_outputs
        if hasattr(io, "io_pairs"):  # asynchronous: a batch is prepared while another runs
            io = io.io_pairs[io.current_pair].host_io
        requests = io.requests_in_batch
        rows = [_request_delta(request.state).delta for request in requests]
        lengths = [request.query_length for request in requests]
        if not self.model_runner.supports_logits_to_keep(model):
            return PackedRoute(rows, lengths)
        # Logits are made once a request: of those that get a token, then of token 0 to fill up.
        kept = [row for row, r in zip(rows, requests, strict=True) if r.has_new_token]
        kept += rows[:1] * (len(rows) - len(kept))
        return PackedRoute(rows, lengths, kept, model.get_output_embeddings())


class RoutedCache(PagedAttentionCache):
    """Shares blocks only among requests with the same deltas."""

    dm_scheduler: Any

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        request_delta = _request_delta(self.dm_scheduler.waiting_requests[request_id])
        return super().search_prefix_match(request_id, request_delta.with_cache_salt(prompt_ids))

    def mark_complete_blocks(self, state: Any, blocks: Any) -> None:
        super().mark_complete_blocks(_salted(state) if blocks else state, blocks)

    def mark_shareable_blocks_as_complete(self, state: Any, blocks: Any) -> None:
        super().mark_shareable_blocks_as_complete(_salted(state) if blocks else state, blocks)


def _request_delta(state: Any) -> RequestDelta:
    return state.logit_processor_kwargs[KEY]


def _salted(state: Any) -> Any:
    """What the cache reads a request's tokens from: all of them as its prompt, salted."""
    shadow = copy.copy(state)
    shadow.initial_tokens = _request_delta(state).with_cache_salt(
        state.initial_tokens + state.generated_tokens
    )
    shadow.generated_tokens = []
    return shadow


def _check_hooks() -> None:
    for owner, names in HOOKS.items():
        for name in names:
            if not any(hasattr(owner, one) for one in name.split("|")):
                raise DeltaMixError(
                    f"transformers {transformers.__version__} has no {owner.__name__}.{name}, "
                    "which continuous batching with deltas needs; use one of 5.16 to 5.23"
                )


class RequestDelta:
    """Hold a request's delta, None for the base, in the pool until its end.

    Waits while there is no room for it; DeltaMixError if there can be none, or the name is unknown.
    """

    def __init__(self, pool: Pool, delta: str | None):
        self.delta = delta
        self.salt: list[int] = []  # four numbers below 2³¹; none for the base
        self._hold = ExitStack()
        if delta is None:
            return
        self._hold.enter_context(pool.holding([delta]))
        # Not drawn at random: where several processes run one model, their hashes must agree.
        loaded = repr((delta, pool.entries[delta].serial)).encode()
        digest = hashlib.blake2b(loaded, digest_size=16).digest()
        self.salt = [int.from_bytes(digest[i : i + 4], "big") >> 1 for i in range(0, 16, 4)]

    def __deepcopy__(self, memo: dict[int, Any]) -> RequestDelta:
        return self  # a request's forks share it

    def end(self) -> None:
        """Let the delta go; doing so twice is harmless."""
        self._hold.close()

    def with_cache_salt(self, tokens: list[int]) -> list[int]:
        """Change the first tokens: enough, as a block's hash covers all blocks before it."""
        changed = [token ^ salt for token, salt in zip(tokens, self.salt, strict=False)]
        return changed + tokens[len(changed) :]


class Prompt(list[int]):
    """Token ids that know their delta, in whatever order they are taken up."""

    def __init__(self, ids: Sequence[int], delta: str | None):
        super().__init__(ids)
        self.delta = delta


def name_prompts(router: Router, inputs: Inputs, names: Names) -> list[Prompt]:
    """Give each input its delta: the one named, or else the one in use for all calls.

    Raises DeltaMixError for a wrong number of names; whether they are known is seen by who holds
    them.
    """
    if not (inputs or names):
        return []
    route = named_route(names, len(inputs)) or router.route
    rows = route.of_rows(len(inputs)) if route.alike else route.rows
    return [Prompt(ids, row) for ids, row in zip(inputs, rows, strict=True)]


def names_of(requests: Iterable[Prompt | RequestDelta]) -> list[str]:
    """Return the deltas of these requests, each once."""
    return list(dict.fromkeys(r.delta for r in requests if r.delta is not None))
