"""Every row gets its own delta or the call is refused: rows are never guessed from sizes."""

from __future__ import annotations

import pytest
import tiny_pairs
import torch
from architectures import ARCHITECTURES
from many_deltas import CLOSE, Family, loaded
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    WavLMConfig,
    WavLMForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from deltamix_hf import DeltaMixError
from deltamix_hf.multi_delta.row_layout import EACH, SHARED, observe

IMAGE = 255
NAMED = ["one", None, "three"]


def test_layouts_are_seen(pair):
    model = pair("gpt2").load(pair("gpt2").base)
    layouts, read = observe(model)
    found = {name: layouts.get(module, "") for name, module in model.named_modules()}
    assert found["transformer.wte"] == found["transformer.h.1.mlp.c_fc"] == EACH
    assert found["transformer.wpe"] == SHARED and not read
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.train()
    observe(model)
    assert all(module.training for module in model.modules())


class Experts(nn.Module):
    """Each expert gets the tokens that it is for."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen, y = flat[:, 0] > 0, torch.empty_like(flat)
        for number, expert in enumerate(self.experts):
            y[chosen == number] = expert(flat[chosen == number])
        return y.view_as(x)


def test_what_does_not_keep_rows():
    """Tokens of an expert, time before batch, a table, windows of all rows in turn."""
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, num_attention_heads=4, **size)).eval()
    block = model.model.layers[0]
    experts, by_time, table, windows = (
        Experts(),
        nn.Linear(64, 64),
        nn.Linear(64, 4),
        nn.Linear(4, 4),
    )
    block.mlp = experts
    model.extra = nn.ModuleDict({"by_time": by_time, "table": table, "windows": windows})
    positions = torch.randn(6, 64)

    def also(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        by_time(x.transpose(0, 1))
        table(positions)
        windows(x.unflatten(2, (16, 4)).permute(2, 0, 1, 3).flatten(0, 1))

    block.register_forward_hook(also)
    layouts, _ = observe(model)
    assert not {*experts.experts, by_time, table, windows} & layouts.keys()
    assert layouts[model.lm_head] == layouts[block.self_attn.q_proj] == EACH


# Pictures


def picture_rows(kind: str) -> tuple[dict, list[dict]]:
    """A call of three rows with two, no and one picture, and the calls of each row by itself."""
    random = torch.Generator().manual_seed(1)
    if kind == "llava":  # a picture has 4 tokens
        tokens, grids = [4, 4, 4], None
        pictures = torch.randn(3, 3, 16, 16, generator=random)
    else:  # of different sizes, one token for 2 x 2 patches
        tokens, grids = [4, 3, 2], torch.tensor([[1, 4, 4], [1, 2, 6], [1, 4, 2]])
        pictures = torch.randn(36, 3 * 2 * 8 * 8, generator=random)
    first, second, third = ([IMAGE] * count for count in tokens)
    rows = [[5, *first, 6, *second, 7, 8], [], [9, *third]]
    ids = torch.tensor([row + list(range(20, 36 - len(row))) for row in rows])

    def call(ids, chosen):
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if grids is None:
            return found | ({"pixel_values": pictures[chosen]} if chosen else {})
        found["mm_token_type_ids"] = (ids == IMAGE).int()
        if not chosen:
            return found
        parts = pictures.split([16, 12, 8])
        seen = {
            "pixel_values": torch.cat([parts[i] for i in chosen]),
            "image_grid_thw": grids[chosen],
        }
        return found | seen

    return call(ids, [0, 1, 2]), [call(ids[:1], [0, 1]), call(ids[1:2], []), call(ids[2:], [2])]


@torch.no_grad()
def check_pictures(family: Family, kind: str) -> None:
    model, (whole, rows) = loaded(family), picture_rows(kind)
    own = {name: family.pair.load(family.repos.get(name, family.pair.base)) for name in NAMED}
    expected = [own[name](**row).logits for name, row in zip(NAMED, rows, strict=True)]
    torch.testing.assert_close(
        model(**whole, delta_names=NAMED).logits, torch.cat(expected), **CLOSE
    )
    turned = {key: whole[key] for key in reversed(whole)}  # pictures first
    torch.testing.assert_close(
        model(**turned, delta_names=NAMED).logits, torch.cat(expected), **CLOSE
    )
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in 1, 2:
        together = model.generate(**whole, **options, num_beams=beams, delta_names=NAMED)
        for name, row, found in zip(NAMED, rows, together, strict=True):
            assert (
                found.tolist() == own[name].generate(**row, **options, num_beams=beams)[0].tolist()
            )
    with pytest.raises(DeltaMixError, match="not certain"):
        model(**whole | {"input_ids": whole["input_ids"].clamp(max=254)}, delta_names=NAMED)
    expected, model = own["one"](**whole).logits, loaded(family)
    torch.testing.assert_close(model(**whole, delta_names="one").logits, expected, **CLOSE)
    model.set_delta("one")  # pictures' places are found by the bits of their embeddings
    embedded = {key: value for key, value in whole.items() if key != "input_ids"}
    found = []
    for one in own["one"], model:
        embedded["inputs_embeds"] = one.get_input_embeddings()(whole["input_ids"])
        found.append(one(**embedded).logits)
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    if kind == "llava":  # Qwen2-VL's positions follow from the tokens
        torch.testing.assert_close(found[0], expected, **CLOSE)


@pytest.mark.parametrize("kind", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.untraced)])
def test_pictures_follow_their_rows(make_family, kind):
    check_pictures(make_family(kind), kind)


def test_one_picture_for_two_rows(make_family):
    model, (whole, rows) = loaded(make_family("llava")), picture_rows("llava")
    ids = whole["input_ids"][[2, 1]]
    with torch.no_grad():
        found = model(
            input_ids=ids, pixel_values=whole["pixel_values"][2:], delta_names=["three", None]
        )
        alone = make_family("llava").pair.load(make_family("llava").repos["three"])(**rows[2])
    torch.testing.assert_close(found.logits[:1], alone.logits, **CLOSE)
    with pytest.raises(DeltaMixError, match="not certain"), model.use_deltas(["one", "two"]):
        model.get_image_features(whole["pixel_values"][:2])


# Other models


def variant(build, folder, kept="nothing") -> Family:
    """A family of a model that is in no list, compressed without text; `kept` is the base's."""
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(folder / "base")
    kind = tiny_pairs.Family(build, type(model), {"budget_bytes": 10**6})
    source = tiny_pairs.Pair("", kind, folder / "base", folder / "tuned", torch.empty(0))
    repos = {}
    for seed, name in enumerate(("one", "three")):
        tuned = source.load(source.base)
        tiny_pairs.fine_tune(tuned, seed=seed)
        ours = {n: t for n, t in source.load(source.base).state_dict().items() if kept in n}
        tuned.load_state_dict(ours, strict=False)
        tuned.save_pretrained(source.tuned)
        repos[name] = folder / name
        source.compress(method="deltamix").save_pretrained(repos[name])
    return Family(source, repos)


DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def deberta():
    config = DebertaV2Config(vocab_size=256, type_vocab_size=0, **DEBERTA, **SIZE)
    return DebertaV2ForSequenceClassification(config).eval()


def choice():
    return BertForMultipleChoice(BertConfig(vocab_size=256, **SIZE)).eval()


def xlnet():
    sizes = {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}
    return XLNetForSequenceClassification(XLNetConfig(vocab_size=256, **sizes)).eval()


def swin():
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2], "num_heads": [2]}
    return SwinForImageClassification(SwinConfig(**sizes, window_size=4)).eval()


def bart():
    feed = {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 64, "vocab_size": 256}
    return BartForConditionalGeneration(BartConfig(**layers, **heads, **feed)).eval()


CASES = {
    "multiple choice": (choice, lambda: {"input_ids": tiny_pairs.token_ids(6, 7).view(3, 2, 7)}),
    "swin": (swin, lambda: {"pixel_values": torch.randn(3, 3, 32, 32)}),
    "bart": (bart, lambda: {"input_ids": tiny_pairs.token_ids(3, 7)}),
    "xlnet": (xlnet, lambda: {"input_ids": tiny_pairs.token_ids(3, 7)}),
}


@pytest.mark.untraced
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_rows_of_other_models(tmp_path, case):
    build, make = CASES[case]
    family, inputs = variant(build, tmp_path), make()
    model = loaded(family)
    own = {name: family.pair.load(family.repos.get(name, family.pair.base)) for name in NAMED}
    for name in NAMED:
        found = model(**inputs, delta_names=[name] * 3).logits
        torch.testing.assert_close(found, own[name](**inputs).logits, **CLOSE)
    if case == "xlnet":  # [length, batch, d] inside
        with pytest.raises(DeltaMixError, match="give all rows the same delta"):
            model(**inputs, delta_names=NAMED)
        return
    found = model(**inputs, delta_names=NAMED).logits
    for i, name in enumerate(NAMED):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        torch.testing.assert_close(found[i : i + 1], own[name](**one).logits, **CLOSE)


@pytest.mark.untraced
@torch.no_grad()
def test_encoded_before(tmp_path):
    """Rows are those of the encoder's outputs where there is no other input."""
    family, ids = variant(bart, tmp_path), tiny_pairs.token_ids(3, 7)
    model, options = loaded(family), {"max_new_tokens": 4, "do_sample": False}
    with model.use_deltas(NAMED):
        encoded = model.get_encoder()(ids)
    found = model.generate(encoder_outputs=encoded, delta_names=NAMED, **options)
    start = torch.full((3, 1), 2)
    logits = model(encoder_outputs=encoded, decoder_input_ids=start, delta_names=NAMED).logits
    for i, name in enumerate(NAMED):
        own = family.pair.load(family.repos.get(name, family.pair.base))
        expected = own.generate(ids[i : i + 1], **options)[0]
        assert torch.equal(found[i, : len(expected)], expected)
        alone = own(input_ids=ids[i : i + 1], decoder_input_ids=start[:1]).logits
        torch.testing.assert_close(logits[i : i + 1], alone, **CLOSE)


def whisper():
    return ARCHITECTURES["whisper"].build().eval()


@pytest.mark.untraced
@torch.no_grad()
def test_rows_that_generate_drops(tmp_path):
    """Whisper goes on with the rows that have more sound: which they are, nobody says."""
    family = variant(whisper, tmp_path, "encoder.embed_positions")
    model, random = loaded(family), torch.Generator().manual_seed(0)
    sound, mask = torch.randn(3, 80, 100, generator=random), torch.ones(3, 100, dtype=torch.long)
    mask[1, 40:] = 0
    settings = model.generation_config
    settings.no_timestamps_token_id, settings.max_initial_timestamp_index = 200, 2
    settings.is_multilingual = False
    options = {"attention_mask": mask, "return_timestamps": True, "max_new_tokens": 8}
    for name in NAMED:
        model.generate(sound, delta_names=[name] * 3, **options)
    with pytest.raises(DeltaMixError, match="does not see the 3 rows of the batch apart"):
        model.generate(sound, delta_names=NAMED, **options)
    short = [model.generate(sound[..., :40], delta_names=[name] * 3) for name in NAMED]
    together = model.generate(sound[..., :40], delta_names=NAMED)
    for i, found in enumerate(together):
        length = min(len(found), short[i].shape[1])
        assert torch.equal(found[:length], short[i][i, :length])


def wavlm():
    audio = {"conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    audio |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
    config = WavLMConfig(**SIZE, **audio, num_conv_pos_embedding_groups=4)
    return WavLMForSequenceClassification(config).eval()


READS = {
    "deberta": (deberta, "nothing", {"input_ids": tiny_pairs.token_ids(3, 7)}),
    "wavlm": (wavlm, ".bias", {"input_values": torch.randn(3, 800)}),
}


@pytest.mark.parametrize("case", READS)
@torch.no_grad()
def test_weights_that_others_read(tmp_path, case):
    """They are those of the delta that all rows have; where rows differ, they are nobody's."""
    build, kept, inputs = READS[case]
    family = variant(build, tmp_path, kept)
    model = loaded(family)
    for name in NAMED:
        own = family.pair.load(family.repos.get(name, family.pair.base))
        found = model(**inputs, delta_names=[name] * 3).logits
        torch.testing.assert_close(found, own(**inputs).logits, **CLOSE)
    with pytest.raises(DeltaMixError, match="give all rows the same delta"):
        model(**inputs, delta_names=NAMED)


def test_biases_that_others_read_are_refused(tmp_path):
    family = variant(wavlm, tmp_path)
    with pytest.raises(DeltaMixError, match=r"reads wavlm\..*_proj\.bias past its layer"):
        loaded(family)
