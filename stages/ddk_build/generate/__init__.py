"""Let a model write completions to prompts, with its own token ids and log-probabilities."""
