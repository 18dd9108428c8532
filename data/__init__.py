"""Datasets: one folder each with its prepare.py, and the code they share."""
