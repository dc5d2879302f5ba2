"""Worlds whose features are known, so that an SAE can be judged against the truth."""

from unbraid.synthetic.toys import correlated_pair, parent_and_child
from unbraid.synthetic.world import World
from unbraid.synthetic.worlds import WORLDS, build_world

__all__ = ["WORLDS", "World", "build_world", "correlated_pair", "parent_and_child"]
