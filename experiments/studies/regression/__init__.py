"""Regression on sinusoids."""
