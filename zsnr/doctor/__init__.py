"""Verdicts on models, from their small files."""
