"""Integers: quantize singular vectors, correct what that costs, pack the codes into bytes.

Two quantizers, Gaussian levels and min-max grids; GPTQ's error feedback; the error table that
prices widths; the reconstruction target correction; bit planes; and the packed delta they end in.
"""
