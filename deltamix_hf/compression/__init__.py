"""The compression job and its order: allocate, factorise, quantize, correct, tune."""
