"""Sweeps that go on where they were cut: `python -m app.sweep status|resume|retry|cancel DIR`.

journal.py   what became of each job, a line per event; events.py: what such a line holds
folder.py    the folder of a sweep: who holds it, which sweep is in it
progress.py  what the user sees while the jobs run
"""
