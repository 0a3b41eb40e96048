"""Give a student another model's tokenizer."""
