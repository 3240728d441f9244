"""How the weights of the objectives (and the temperatures) enter a model."""
