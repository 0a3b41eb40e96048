"""The student: loading it, its head, its memory, its processes."""
