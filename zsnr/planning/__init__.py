"""Memory and time of a training run before it begins."""
