"""A self-contained static site about one run: overview, features, and the pairs that braid into each other."""

from unbraid.reporting.dashboard.build import write_dashboard
from unbraid.reporting.dashboard.serve import serve

__all__ = ["serve", "write_dashboard"]
