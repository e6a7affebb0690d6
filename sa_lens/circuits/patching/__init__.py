"""Activation and mask patching, and attribution of single units."""
