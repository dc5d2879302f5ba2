"""How fast this machine is: training steps, pipelines, model passes and synthetic samples, in a table to share."""
