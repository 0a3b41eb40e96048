"""Knowledge distillation from a cache of the teacher's log-probabilities."""
