"""Selective feature decorrelation: which pairs of features are entangled, and a penalty that pushes only those apart."""
