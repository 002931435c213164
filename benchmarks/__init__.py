"""Measurements and demonstrations that anyone can rerun."""
