"""What a folder of runs came to, in a table, a page and pictures. Needs neither torch nor Hydra.

reading.py, states.py    what is in the folder, and what state each run truly is in
configurations.py        which runs are one row, and which keys tell the rows apart
metric.py, statistics.py which number is compared, and how
summary.py               the rows with their numbers
rerun.py                 the command that goes on with a run
tables.py, curves.py     the same on the terminal, in files, and as pictures
page.py, page_table.py, ranges.py, page.css, page.js   and as a page
"""
