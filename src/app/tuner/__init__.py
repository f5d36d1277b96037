"""Finders: from a configuration to the values it should have."""
