"""Three fine-tunes of SmolLM2-135M answer in one batch, beside one copy of their base.

python examples/multi_tenant.py    # trains and compresses them first: half an hour, then cached
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads spin

from demo import compress
from pairs.pair import cache_root
from real_pairs import build_pair
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIRS = {"sums": "smollm2-demo", "records": "smollm2-records", "sorting": "smollm2-sorting"}


def main() -> None:
    pairs = {name: build_pair(pair) for name, pair in PAIRS.items()}
    base = pairs["sums"].base  # the same for all
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base)
    for name, pair in pairs.items():
        repo = cache_root() / "deltas" / pair.name / "1of16" / "deltamix-kl"
        if not (repo / "config.json").exists():
            compress(pair, "deltamix-kl", 1 / 16, repo)
        model.load_delta(repo, name)

    questions, right, names = [], [], []
    for name, pair in pairs.items():
        prompts, answers = pair.questions(2)
        for prompt, answer in zip(prompts, answers, strict=True):
            for tenant in (name, None):  # the fine-tune for this question, and the base
                questions.append(prompt)
                right.append(answer)
                names.append(tenant)
    batch = tokenizer(questions, return_tensors="pt", padding=True, add_special_tokens=False)
    written = model.generate(**batch, delta_names=names, max_new_tokens=12, do_sample=False)
    answers = tokenizer.batch_decode(
        written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )

    table = Table(title=f"One batch of {len(names)} rows, greedy answers")
    for column in ("question", "right", "delta", "its answer", "the base's answer"):
        table.add_column(column, overflow="fold")
    for i in range(0, len(names), 2):
        asked = questions[i].split("user\n")[-1].split("<|im_end|>")[0].strip()
        table.add_row(asked, right[i], names[i], answers[i].strip(), answers[i + 1].strip())
    console = Console()
    console.print(table)
    sizes = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in model.list_deltas().items())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    console.print(f"MB in memory: base {whole / 1e6:.1f}, deltas {sizes}")


if __name__ == "__main__":
    main()
