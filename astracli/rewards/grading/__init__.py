"""Grading of mathematical answers: extraction, notation, typed answers and their comparison. See docs/grading.md."""
