"""Modules, loaders and schedules as users write them, and what must hold for each."""
