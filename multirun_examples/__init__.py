"""Sweeps to begin with: a file each, with its question, its command and its measured table."""
