"""What a run shows: figures and reports, drawn from the files of its folder and from nothing else."""
