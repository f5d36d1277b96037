"""Sweeps that go on where they were cut: `python -m app.sweep status|resume|retry|cancel DIR`.

folder.py    the folder of a sweep: who holds it, which sweep is in it
journal.py   what became of each job, a line per event; events.py: what such a line holds
launcher.py  runs what is left of the jobs; queue.py: on this machine, cluster.py: as jobs of SLURM
composing.py the configurations of the jobs
study.py     a sweep whose jobs Optuna chooses
progress.py  what the user sees while the jobs run
"""
