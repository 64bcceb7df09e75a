"""Generates and classifies for many requests at once. It knows nothing of HTTP."""
