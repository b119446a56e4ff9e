"""What `tests/attacks/test_fuzz.py` found and what was found while it was written, kept for good.

Each was an error of another type, a message nobody could read, or a load that should have failed.
"""

from __future__ import annotations

import pytest
import torch
from hostile import MODULE, WEIGHTS, edit_header, edit_json, edit_settings, edit_weights

RANKS = f"{MODULE}.dm_ranks"


def test_types_that_the_library_knows_and_we_do_not(attack):
    """SafetensorError: our reader cannot know the size of a C64, so it let any through."""
    it = attack()
    edit_header(it.folder / WEIGHTS, lambda header: header[RANKS].update(dtype="C64", shape=[5]))
    it.refused(WEIGHTS)


def test_a_name_that_grows_when_it_is_made_readable(attack):
    """Messages were cut before they were escaped, and then four times as long."""
    it = attack()

    def change(header):
        entry = header["model.layers.1.se" + "\x7f" * 900] = header.pop(RANKS)
        entry["shape"] += [1] * 40

    edit_header(it.folder / WEIGHTS, change)
    it.refused(WEIGHTS, "\\x7f\\x7f")


def test_an_option_called_self(attack):
    """TypeError: got multiple values for argument 'self'."""
    it = attack()
    edit_settings(it.folder, self=1)
    it.refused("has no option")


def test_a_base_that_is_a_number(attack):
    """TypeError: expected str, bytes or os.PathLike object."""
    it = attack()
    edit_settings(it.folder, base_model=5)
    it.refused("base_model")


def test_settings_that_are_a_list(attack):
    """AttributeError: 'list' object has no attribute 'get'; the same for the whole config.json."""
    it = attack()
    for value in ({"quantization_config": [1]}, []):
        edit_json(it.folder / "config.json", lambda _, value=value: value)
        with pytest.raises(ValueError, match=r"is not a delta repo|not a JSON object"):
            it.serve()


def test_a_matrix_for_a_vector(attack):
    """ValueError: not enough values to unpack; a norm has no rows and columns."""
    it = attack()

    def rename(tensors):
        for name in [name for name in tensors if name.startswith(f"{MODULE}.dm_")]:
            tensors[name.replace(MODULE, "model.norm")] = tensors.pop(name)
        del tensors["model.norm.weight"]

    edit_weights(it.folder, rename)
    edit_settings(it.folder, errors={}, overlay=None)
    it.refused("model.norm", "cannot carry a packed delta")


def test_layers_left_out_by_the_name_of_the_class(attack):
    """With another name in `architectures`, fewer layers loaded, or more that were made up."""
    it = attack()
    for layers in (1, 3):
        change = {"architectures": ["Another"], "num_hidden_layers": layers}
        edit_json(it.folder / "config.json", lambda config, change=change: config.update(change))
        with pytest.raises(ValueError, match=f"layers.{min(layers, 2)}"):
            it.load()


def test_a_vector_that_went_missing(attack):
    """The base's own norm answered in its place, a little wrong and unnoticed."""
    it = attack()
    edit_weights(it.folder, lambda tensors: tensors.pop("model.norm.weight"))
    it.refused("model.norm.weight", "incomplete")


def test_a_scale_that_is_infinite(attack):
    """It loaded, and every logit was NaN."""
    it = attack()
    edit_weights(it.folder, lambda tensors: tensors[RANKS][0, 1].fill_(0x7F80))
    it.refused(MODULE, "a scale")


def test_whole_tensors_of_integers(attack):
    """It loaded, whatever the integers stood for."""
    it = attack()
    whole = torch.ones(64, dtype=torch.int32)
    edit_weights(it.folder, lambda tensors: tensors.update({"model.norm.weight": whole}))
    it.refused("model.norm.weight", "I32")
