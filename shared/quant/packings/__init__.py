"""Packings: one module for each way of keeping a matrix in few bits (see shared/quant/packing.py)."""
