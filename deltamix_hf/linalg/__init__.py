"""Linear algebra: second moments as metrics, their Cholesky factors, and SVDs in them.

`second_moments` has the metric C or G of a layer in three forms (dense, diagonal, diagonal plus low
rank); `whitened_svd.factorise` takes the SVD of ΔW in two of them; `svd` and `cholesky` are the
decompositions, on any device.
"""
