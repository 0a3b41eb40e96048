"""From token shards to the teacher's answers in the cache."""
