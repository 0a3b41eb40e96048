"""The teacher: engines, the capture inside them, and what identifies a model."""
