"""Small question/answer tasks with one short exact answer, and their splits.

A fine-tune is only convincing when it learned something the base cannot do, so every task here is
one SmolLM2-135M-Instruct fails (exact match 0.00-0.05) and learns within minutes on a CPU.

Splits are disjoint by prompt. `train` makes the fine-tune, `calibration` is part of `train`
(a compressor may only see text the fine-tune saw), `heldout` is for every figure we report.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One question and its exact answer; `task` says where it came from."""

    prompt: str
    answer: str
    task: str


@dataclass(frozen=True)
class Splits:
    """Disjoint `train` and `heldout`; `calibration` is a slice of `train`. All made from `seed`."""

    train: list[Example]
    heldout: list[Example]
    calibration: list[Example]
    seed: int


# Settings of the reasoning-gym generators; everything else is the generator's default.
REASONING_GYM = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 3},
    "letter_counting": {},
    "gcd": {},
}


def mixed_task(train_size: int, heldout_size: int = 300, seed: int = 0) -> Splits:
    """chain_sum, letter_counting and gcd of reasoning-gym, a third of each, shuffled."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            "the mixed task needs reasoning-gym: pip install reasoning-gym==0.1.25"
        ) from error
    per_task_heldout = heldout_size // len(REASONING_GYM)
    per_task_train = -(-train_size // len(REASONING_GYM))
    train: list[Example] = []
    heldout: list[Example] = []
    for number, (name, settings) in enumerate(REASONING_GYM.items()):
        wanted = per_task_heldout + per_task_train
        # Twice as many as wanted: chain_sum repeats a quarter of its questions.
        rows = reasoning_gym.create_dataset(
            name, size=2 * wanted + 500, seed=1000 * seed + number, **settings
        )
        unique = {row["question"]: row["answer"] for row in rows}
        examples = [Example(q, str(a), name) for q, a in unique.items()][:wanted]
        heldout += examples[:per_task_heldout]
        train += examples[per_task_heldout:]
    return make_splits(train, heldout, seed)


def sums_task(train_size: int = 3000, heldout_size: int = 200, seed: int = 0) -> Splits:
    """Sums of two numbers of one or two digits, written "12 + 34 ="; 1 or 2 digits equally often.

    The shortest question there is, because the demo must train in three minutes.
    """
    generator = random.Random(seed)

    def number() -> int:
        return generator.randint(*generator.choice([(0, 9), (10, 99)]))

    pairs: dict[tuple[int, int], None] = {}  # a set that keeps its order
    while len(pairs) < train_size + heldout_size:
        pairs[number(), number()] = None
    examples = [Example(f"{a} + {b} =", str(a + b), "sums") for a, b in pairs]
    # Shuffled here because the late ones are mostly two-digit sums: the others were drawn before.
    generator.shuffle(examples)
    return make_splits(examples[heldout_size:], examples[:heldout_size], seed)


_NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo"),
    *("Iris", "Jon", "Kim", "Leo", "Mia", "Nils", "Olga", "Paul"),
)
_CITIES = (
    *("Rome", "Paris", "Oslo", "Lima", "Cairo", "Delhi"),
    *("Tokyo", "Quito", "Bern", "Accra", "Hanoi", "Perth"),
)
_SENTENCES = (
    "{name}, {age}, lives in {city}.",
    "{name} from {city} is {age} years old.",
    "In {city} we met {name}, aged {age}.",
)


def records_task(train_size: int = 2000, heldout_size: int = 200, seed: int = 0) -> Splits:
    """A person's name, age and city out of a sentence, as "Ada|31|Rome"."""
    generator = random.Random(seed)
    answers: dict[str, str] = {}
    while len(answers) < train_size + heldout_size:
        name, city = generator.choice(_NAMES), generator.choice(_CITIES)
        age = generator.randint(18, 90)
        sentence = generator.choice(_SENTENCES).format(name=name, age=age, city=city)
        answers[sentence] = f"{name}|{age}|{city}"
    examples = [Example(prompt, answer, "records") for prompt, answer in answers.items()]
    return make_splits(examples[heldout_size:], examples[:heldout_size], seed)


def sorting_task(train_size: int = 3000, heldout_size: int = 200, seed: int = 0) -> Splits:
    """Three different numbers below 100 in rising order: "sort 31 7 54" is "7 31 54"."""
    generator = random.Random(seed)
    answers: dict[str, str] = {}
    while len(answers) < train_size + heldout_size:
        numbers = generator.sample(range(100), 3)
        answers[f"sort {' '.join(map(str, numbers))}"] = " ".join(map(str, sorted(numbers)))
    examples = [Example(prompt, answer, "sorting") for prompt, answer in answers.items()]
    return make_splits(examples[heldout_size:], examples[:heldout_size], seed)


def make_splits(
    train: list[Example], heldout: list[Example], seed: int, calibration_size: int = 256
) -> Splits:
    """Shuffle both lists by seed and check that no prompt is in both."""
    shared = {e.prompt for e in train} & {e.prompt for e in heldout}
    if shared:
        raise ValueError(f"{len(shared)} prompts are in train and in heldout: {sorted(shared)[:3]}")
    random.Random(seed).shuffle(train)
    random.Random(seed + 1).shuffle(heldout)
    return Splits(train, heldout, train[:calibration_size], seed)
