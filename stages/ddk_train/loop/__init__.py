"""The training loop: Algorithm 1, its measurements and its schedules."""
