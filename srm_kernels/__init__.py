"""Operators of the Spectral Robustness Mixer."""
