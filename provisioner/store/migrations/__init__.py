"""Numbered schema changes. Each says whether it is safe before or after the new code starts."""
