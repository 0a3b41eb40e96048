"""Write rows in the formats of other trainers."""
