"""The Hub: push a delta repo with its model card and pictures.

`push.push_folder` uploads, `model_card.model_card` writes the card from the files, `plots` draws
where the bits went (`plots.save_figures`). Figures come from `checkpoint.report.inspect_repo`.
"""
