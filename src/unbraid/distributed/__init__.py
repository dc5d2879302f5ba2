"""Many processes on one run: ranks and their collectives, slices of features, the mesh of both, and its launcher."""
