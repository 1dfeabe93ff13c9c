"""Activation importance: hooks and streaming statistics, gathered into scores that do not depend on the layout."""
