"""The library on a GPU, from compression to compiled generation, each check by itself.

    python kernels/benchmarks/end_to_end.py [--tiny] [--only CHECK ...]

A small llama and three fine-tunes are made on the spot and compressed, on the CPU and on the GPU;
then every way to run a delta is tried, in processes of their own, against the same delta in float32
on the CPU, where the reference runs. One JSON line a check, with what was raised if it failed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import cases
from small_llama import (
    MIXED,
    NAMES,
    SIZES,
    TINY,
    distance,
    expected,
    here,
    ids,
    load,
    logits,
    near,
    pair,
    subject,
    using,
    with_deltas,
)


def check(case: str) -> Iterator[dict]:
    """The library's own check of the kernels, in this process."""
    import torch

    from deltamix_hf.ops import isolated_check, self_check

    found = list(self_check.errors(case, torch.device(here.device)))
    good = max(found) <= isolated_check.TOLERANCE
    yield {"ok": good, "errors": [round(error, 5) for error in found]}


def kernel() -> Iterator[dict]:
    """The same in children, as a user's first forward runs it; the checks below find its pass."""
    import torch

    from deltamix_hf.ops import dispatch

    device = torch.device(here.device, 0) if here.device == "cuda" else torch.device("cpu")
    for attempt in ("first", "cached"):
        started = time.perf_counter()
        chosen = dispatch.choose(device, passed={})
        row = {"attempt": attempt, "chosen": chosen}
        row["seconds"] = round(time.perf_counter() - started, 1)
        yield {**row, "ok": chosen == "triton" or here.device == "cpu"}


def compress(name: str, device: str, method: str, folder: str) -> Iterator[dict]:
    """Compress on `device`, save, reload: same logits, nearer to the fine-tune than the base is."""
    from transformers import AutoModelForCausalLM

    from deltamix_hf import METHODS, DeltaMixConfig

    switches = METHODS[method]
    if switches.tune_steps:
        switches = replace(switches, tune_steps=3)
    config = DeltaMixConfig(
        base_model=here.folder / "base",
        method=switches,
        ratio=1 / 8,
        calibration=ids(16, 64, seed=5),
        num_samples=16,
    )
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        here.folder / f"{name}-tuned", quantization_config=config, device_map=device
    )
    spent = {k: round(s, 2) for k, s in model.hf_quantizer.seconds.items()}
    row = {"seconds": round(time.perf_counter() - started, 1), "stages": spent}
    model.save_pretrained(here.folder / folder)
    yield {**row, "packed": len(model.config.quantization_config.errors)}
    found, again = logits(model, ids()), logits(load(folder, device), ids())
    yield {"check": "reload", "ok": distance(again, found) <= 1e-6, "error": distance(again, found)}
    tuned = logits(load(f"{name}-tuned", "cpu", "float32"), ids())
    kept = distance(found, tuned) / distance(expected(None, ids()), tuned)
    yield {
        "check": "near the fine-tune",
        "ok": kept < 0.5,
        "of the base's distance": round(kept, 3),
    }


def forward(dtype: str, rows: int, length: int) -> Iterator[dict]:
    """One delta against the CPU; and the reference on the GPU against both."""
    model, tokens = load("one", dtype=dtype), ids(rows, length)
    right, found = expected("one", tokens), logits(model, tokens)
    yield {"dtype": dtype, "tokens": [rows, length], **near(found, right, dtype)}
    os.environ["DELTAMIX_KERNEL"] = "reference"
    yield {"check": "reference on the GPU", **near(logits(model, tokens), right, dtype)}
    del os.environ["DELTAMIX_KERNEL"]


def greedy(model, tokens, out, **options) -> dict:
    """How many of the new tokens a single pass would have chosen, or all but chosen."""
    made, found = out[:, tokens.shape[1] :].cpu(), logits(model, out, **options)
    found = found[:, tokens.shape[1] - 1 : -1]
    best, chosen = found.max(-1).values, found.gather(-1, made[..., None])[..., 0]
    good = float((best - chosen <= 0.05 * found.std()).float().mean())
    return {"ok": good == 1.0 and made.shape[1] == 24, "agree": round(good, 3)}


def merge() -> Iterator[dict]:
    """Merged weights beside the factors, and a dense model of them."""
    import deltamix_hf

    model, tokens = load("one"), ids()
    right = expected("one", tokens)
    size = deltamix_hf.cache_merged(model)
    yield {"check": "cache_merged", "bytes": size, **near(logits(model, tokens), right)}
    deltamix_hf.cache_merged(model, False)
    yield {"check": "dropped", **near(logits(model, tokens), right)}
    yield {"check": "dequantize()", **near(logits(model.dequantize(), tokens), right)}
    dense = load("one", quantization_config=deltamix_hf.DeltaMixConfig(dequantize=True))
    yield {"check": "dequantize=True", **near(logits(dense, tokens), right)}


def backward() -> Iterator[dict]:
    """Gradients of the inputs, by the kernels and by the reference."""
    import torch

    model, found = load("one"), []
    embedded = model.get_input_embeddings()(ids().to(here.device)).detach()
    for choice in (None, "reference"):
        if choice:
            os.environ["DELTAMIX_KERNEL"] = choice
        x = embedded.clone().requires_grad_()
        with torch.enable_grad():
            model(inputs_embeds=x).logits.float().square().mean().backward()
        found.append(x.grad.float().cpu())
    os.environ.pop("DELTAMIX_KERNEL", None)
    yield near(*found)


def many() -> Iterator[dict]:
    """Rows of a batch with deltas of their own: each as alone, those of the base bit for bit."""
    model, tokens = with_deltas(), ids(4)
    found, base = logits(model, tokens, delta_names=MIXED), logits(load("base"), tokens)
    for row, name in enumerate(MIXED):
        yield {"row": row, "delta": name, **near(found[row], expected(name, tokens)[row])}
    yield {"check": "base row, bits", "ok": bool((found[1] == base[1]).all())}
    alone = logits(model, tokens, delta_names="one")
    yield {"check": "mixed and alone, bits", "ok": True, "same": bool((found[0] == alone[0]).all()),
           "error": distance(found[0], alone[0])}  # fmt: skip
    model.delete_delta("one")
    model.load_delta(here.folder / "two", "again")
    found = logits(model, tokens, delta_names=["again", None, "three", "two"])
    yield {"check": "deltas came and went", **near(found[0], expected("two", tokens)[0])}


def memory() -> Iterator[dict]:
    """Deltas move to the host and back."""
    model, tokens = with_deltas(), ids()
    size = max(model.list_deltas().values())
    before = {name: logits(model, tokens, delta_names=name) for name in NAMES}
    model.set_delta_memory(budget_bytes=2 * size, host_bytes=4 * size)
    for name in (*NAMES, *NAMES):
        found = logits(model, tokens, delta_names=name)
        yield {"delta": name, "ok": bool((found == before[name]).all())}


def graph(many_deltas: bool, embedded: bool) -> Iterator[dict]:
    """A captured forward; `embedded`: past the embedding. Replays follow new inputs and deltas."""
    import torch

    model, tokens = subject(many_deltas), ids(4, 1).to(here.device)
    table = load("base").get_input_embeddings()

    def inputs(tokens):
        return {"inputs_embeds": table(tokens)} if embedded else {"input_ids": tokens}

    fixed = inputs(tokens)
    with using(model, MIXED, many_deltas):
        for _ in range(2):
            model(**fixed, use_cache=False)
        if here.device == "cpu":
            yield {"ok": True, "skipped": "no GPU"}
            return
        torch.cuda.synchronize()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            out = model(**fixed, use_cache=False).logits
    yield {"check": "captured"}
    for names in (MIXED, ["three", "two", None, "one"]):
        fresh = inputs(ids(4, 1, seed=9).to(here.device))
        for key, tensor in fixed.items():
            tensor.copy_(fresh[key])
        with using(model, names, many_deltas):
            right = model(**fresh, use_cache=False).logits.float().cpu()
            recorded.replay()
        torch.cuda.synchronize()
        yield {"check": "replay", **near(out.float().cpu(), right)}


def generate(many_deltas: bool, static: bool = False) -> Iterator[dict]:
    """Greedy tokens are those of the highest logits of one pass over all of them.

    `static`: with a static cache, which transformers compiles on a GPU (reduce-overhead).
    """
    model, names = subject(many_deltas), {"delta_names": MIXED} if many_deltas else {}
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **names}
    if static:
        options["cache_implementation"] = "static"
    for rows in (4, 4) if many_deltas or static else (1, 2):
        tokens, started = ids(rows).to(here.device), time.perf_counter()
        out = model.generate(tokens, **options)
        row = {"rows": rows, "seconds": round(time.perf_counter() - started, 2)}
        yield {**row, **greedy(model, tokens, out, **names)}
    if static:
        was = getattr(model, "_compiled_call", None) is not None
        yield {"check": "compiled", "ok": was or here.device == "cpu"}


def compiled(many_deltas: bool, mode: str | None) -> Iterator[dict]:
    """`torch.compile` in one graph; deltas and inputs change, nothing is compiled again."""
    import torch

    model = subject(many_deltas)
    compiler = {"mode": mode} if here.device == "cuda" else {"backend": "aot_eager"}
    fast = torch.compile(model, fullgraph=True, dynamic=False, **compiler)
    for i, names in enumerate((MIXED, ["three", "two", None, "one"], MIXED, MIXED)):
        tokens = ids(4, 4, seed=i)
        right = logits(model, tokens, **({"delta_names": names} if many_deltas else {}))
        started = time.perf_counter()
        with (
            torch._dynamo.config.patch(error_on_recompile=i > 0),
            using(model, names, many_deltas),
        ):
            found = logits(fast, tokens)
        yield {"run": i, "seconds": round(time.perf_counter() - started, 2), **near(found, right)}


def continuous() -> Iterator[dict]:
    """Continuous batching, a delta for each request."""
    from transformers import ContinuousBatchingConfig

    model = with_deltas()
    prompts = [row.tolist() for row in ids(4)]
    cache = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    out = model.generate_batch(
        prompts, delta_names=MIXED, max_new_tokens=8, continuous_batching_config=cache
    )
    counts = [len(found.generated_tokens) for found in out.values()]
    yield {"ok": len(counts) == 4 and min(counts) >= 1, "tokens": counts}


def loading() -> Iterator[dict]:
    """Placed by `device_map="auto"`, moved by `.to`, and by offloading to the CPU."""
    tokens = ids()
    right = expected("one", tokens)
    yield {"check": "auto", **near(logits(load("one", "auto"), tokens), right)}
    moved = load("one", "cpu").to(here.device)
    yield {"check": ".to", **near(logits(moved, tokens), right)}
    parts = {"model.embed_tokens": here.device, "model.layers": here.device, "model.norm": "cpu"}
    parts |= {"model.rotary_emb": here.device, "lm_head": "cpu"}
    if here.device == "cuda":
        found = load("one", parts)
        yield {"check": "offload", **near(found(tokens.cuda()).logits.float().cpu(), right)}


def phases(sizes: dict[str, int]) -> list[dict[str, cases.Case]]:
    """Checks that may run side by side, after those before; the longest first."""
    kl = "deltamix-kl"
    tried = ("odd bfloat16", "aligned float16")
    checks: dict[str, cases.Case] = {f"check {case}": partial(check, case) for case in tried}
    return [
        {"pair": partial(pair, sizes)},
        {
            "kernel": kernel,
            **({} if here.device == "cpu" else checks),  # minutes in the interpreter
            "compress on the GPU": partial(compress, "one", here.device, kl, "gpu"),
            **{f"compress {name}": partial(compress, name, "cpu", kl, name) for name in NAMES},
        },
        {
            "static cache": partial(generate, False, True),
            "static cache, many": partial(generate, True, True),
            "reduce-overhead": partial(compiled, False, "reduce-overhead"),
            "reduce-overhead, many": partial(compiled, True, "reduce-overhead"),
            "many": many,
            "many, generate": partial(generate, True),
            "forward": partial(forward, "bfloat16", 2, 8),
            "graph": partial(graph, False, False),
            "graph past the embedding": partial(graph, False, True),
            "graph, many": partial(graph, True, False),
            "graph past the embedding, many": partial(graph, True, True),
            "generate": partial(generate, False),
            "forward, long": partial(forward, "bfloat16", 2, 300),
            "forward, fp16": partial(forward, "float16", 2, 8),
            "backward": backward,
            "merge": merge,
            "continuous batching": continuous,
            "memory": memory,
            "loading": loading,
            "compile, default": partial(compiled, False, None),
            "compress by delta-come": partial(compress, "two", here.device, "delta-come", "come"),
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a smaller model, on a CPU")
    parser.add_argument("--only", nargs="+", help="of the last checks; the pair is always made")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    here.device = "cpu" if options.tiny else "cuda"
    found = phases(TINY if options.tiny else SIZES)
    if options.worker:
        import torch

        here.folder = options.folder
        torch.set_num_threads(1 if options.tiny else 3)
        with torch.no_grad():
            cases.serve({name: case for phase in found for name, case in phase.items()})
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [__file__, "--worker", "--folder", folder, *["--tiny"] * options.tiny]
        for phase in found:
            names = [n for n in phase if phase is not found[-1] or n in (options.only or phase)]
            workers = 2 if options.tiny else options.workers
            cases.run(names, workers, 300 if options.tiny else 110, [cases.PYTHON, *command])


if __name__ == "__main__":
    main()
