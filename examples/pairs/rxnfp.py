"""A published encoder and its published fine-tune, from the PyPI package `rxnfp` (MIT, 74.7 MB).

Base: BERT 12 x 256 pre-trained on chemical reactions (SMILES text). Fine-tune: the same, trained
on to classify reactions into 50 classes. Nothing is trained here. Two facts to know:

- The base has no classifier, so it gets the fine-tune's: the delta is the encoder's alone.
- The package has no data. The reactions here are put together from common reaction types and
  fragments; they are what the fine-tune was made for, but not its data and without labels, so the
  pair is judged by KL to the fine-tune and by agreement with it.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from .pair import Pair, Question, save_model, write_info, write_rows

PACKAGE = "rxnfp==0.1.0"
BASE, FINETUNED = "bert_pretrained", "bert_ft_10k_25s"
SMILES = (
    r"\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@"
    r"|\?|>>?|\*|\$|\%[0-9]{2}|[0-9]"
)

# Fragments, divided by spaces: L ends in an open bond, R begins with one. {x} is a halogen.
LEFT = """C CC CCC CC(C) CCCC COCC c1ccccc1 Cc1ccc(cc1) COc1ccc(cc1) Fc1ccc(cc1) Clc1ccc(cc1)
c1ccncc1 c1ccsc1 N#Cc1ccc(cc1) FC(F)(F)c1ccc(cc1) c1ccc2ccccc2c1 C1CCCCC1 COC(=O)c1ccc(cc1)
O=[N+]([O-])c1ccc(cc1) Cc1cc(C)cc(c1) CC(C)(C)OC(=O)NCC Clc1ncccc1 COc1cc(OC)cc(c1)"""
RIGHT = """C CC CCC C(C)C CCOC Cc1ccccc1 Cc1ccc(F)cc1 Cc1ccc(OC)cc1 c1ccccc1 c1ccc(C)cc1
c1ccc(Cl)cc1 c1ccc(OC)cc1 c1cccnc1 C1CCCCC1 CCN1CCOCC1 CCc1ccccc1 CC(=O)OCC CCO[Si](C)(C)C(C)(C)C
c1ccc(C(F)(F)F)cc1 CCCCBr c1ccc2ncccc2c1"""
REACTIONS = [
    "{L}C(=O)O.N{R}.CCN(C(C)C)C(C)C.CN(C)C=O>>{L}C(=O)N{R}",
    "{L}C(=O)Cl.N{R}.CCN(CC)CC.ClCCl>>{L}C(=O)N{R}",
    "{L}C(=O)O.O{R}.O=S(=O)(O)O>>{L}C(=O)O{R}",
    "{L}C(=O)O{R}.[Na+].[OH-].CO.O>>{L}C(=O)O",
    "{L}{x}.OB(O){R}.O=C([O-])[O-].[K+].[K+].[Pd]>>{L}{R}",
    "{L}O.{x}{R}.O=C([O-])[O-].[K+].[K+].CN(C)C=O>>{L}O{R}",
    "{L}N.{x}{R}.O=C([O-])[O-].[Cs+].[Cs+].CC#N>>{L}N{R}",
    "{L}S(=O)(=O)Cl.N{R}.c1ccncc1>>{L}S(=O)(=O)N{R}",
    "{L}C=O.N{R}.[BH3-]C#N.[Na+].CO>>{L}CN{R}",
    "{L}N=C=O.N{R}.C1CCOC1>>{L}NC(=O)N{R}",
    "CC(C)(C)OC(=O)N{R}.O=C(O)C(F)(F)F.ClCCl>>N{R}",
    "N{R}.CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.ClCCl>>CC(C)(C)OC(=O)N{R}",
    "O=[N+]([O-])c1ccc(O{R})cc1.[H][H].[Pd].CO>>Nc1ccc(O{R})cc1",
    "{L}C=O.[BH4-].[Na+].CO>>{L}CO",
    "{L}CO.O=S(Cl)Cl.ClCCl>>{L}CCl",
    "{L}S{R}.O=C(OO)c1cccc(Cl)c1.ClCCl>>{L}S(=O)(=O){R}",
    "{L}C#C.{x}{R}.[Cu]I.CCN(CC)CC.[Pd]>>{L}C#C{R}",
]


def reactions(count: int, seed: int = 0) -> list[str]:
    """`count` different reactions; every type appears about equally often."""
    generator = random.Random(seed)
    lefts, rights = LEFT.split(), RIGHT.split()
    found: dict[str, None] = {}  # keeps the order
    for pattern in itertools.cycle(REACTIONS):
        left, right = generator.choice(lefts), generator.choice(rights)
        halogen = generator.choice(["Cl", "Br", "I"])
        found[pattern.format(L=left, R=right, x=halogen)] = None
        if len(found) == count:
            return generator.sample(list(found), count)
    raise AssertionError("unreachable: cycle never ends")


def tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """One token per atom, bond or bracket, as in the package's own (rdkit-bound) tokenizer."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES), behavior="removed", invert=True)
    core.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **names)


def _models_folder() -> Path:
    spec = importlib.util.find_spec("rxnfp")  # not imported: that would need rdkit
    if spec is None or spec.origin is None:
        raise ImportError(f"the rxnfp models come in a package: pip install --no-deps {PACKAGE}")
    return Path(spec.origin).parent / "models" / "transformers"


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")


def build(cache: Path) -> Pair:
    """`rxnfp`: convert both published checkpoints to safetensors once; seconds, no training."""
    pair = Pair("rxnfp", cache / "rxnfp-base", cache / "rxnfp" / "finetuned")
    if pair.complete:
        return pair
    source = _models_folder()
    words = tokenizer((source / BASE / "vocab.txt").read_text(encoding="utf-8").splitlines())
    finetuned = _weights(source / FINETUNED)
    base = {k: v for k, v in _weights(source / BASE).items() if k.startswith("bert.")}
    base |= {k: v for k, v in finetuned.items() if k.startswith("classifier.")}
    # Settings are given, not read: the base's config.json does not even name its model type.
    config = BertConfig(
        vocab_size=591,
        hidden_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=512,
        num_labels=50,
    )
    for weights, folder in ((base, pair.base), (finetuned, pair.finetuned)):
        model = BertForSequenceClassification(config)
        model.load_state_dict(weights)
        save_model(model, words, folder)
    questions: list[Question] = [(reaction, None) for reaction in reactions(1024)]
    write_rows(pair.folder / "calibration.jsonl", questions[:512])
    write_rows(pair.folder / "heldout.jsonl", questions[512:])
    write_info(pair, base=f"{PACKAGE} {BASE}", finetuned=f"{PACKAGE} {FINETUNED}")
    return pair
