"""Linear algebra: second moments as metrics, their Cholesky factors, and SVDs in them."""
