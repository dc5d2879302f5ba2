"""A self-contained static site about one run: overview, features, and the most entangled pairs."""

from unbraid.reporting.dashboard.build import write_dashboard
from unbraid.reporting.dashboard.serve import serve

__all__ = ["serve", "write_dashboard"]
