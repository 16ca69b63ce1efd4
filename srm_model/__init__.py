"""The Spectral Robustness Mixer model."""
