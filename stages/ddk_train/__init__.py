"""Stage two: train a student from the cache, choosing its data by DDK."""
