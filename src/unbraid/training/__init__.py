"""Training: one visible loop, its optimiser and schedules, checkpoints, and what a person sees meanwhile."""
