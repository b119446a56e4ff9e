"""Bit allocation: choose a width for every rank by 0/1 programs that HiGHS solves.

`knapsack` is the program, `per_matrix` solves one a matrix (the published methods), `whole_model`
one for all matrices together (deltamix-kl).
"""
