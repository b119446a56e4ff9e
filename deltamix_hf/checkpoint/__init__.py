"""Files of a delta repo or a base against a model: what they hold, whether and how they fit.

`base.BaseCheckpoint` reads a base by the model's names, `delta_repo.read_delta` a delta repo, and
`tensor_diff.differences` says how a fine-tune differs from its base. `validation` has every check
that files, base and model belong together (`verify_repo` lists them all), `report.inspect_repo` the
figures of a delta repo, `model_class.empty_model` a model without weights.
"""
