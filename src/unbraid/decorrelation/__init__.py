"""Selective feature decorrelation: the most entangled pairs of features, and a penalty that pushes only those apart."""
