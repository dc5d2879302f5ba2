"""`python -m unbraid` is the same program as `unbraid`, so `torchrun -m unbraid` works."""

from unbraid.cli import main

main()
