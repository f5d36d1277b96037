"""What a folder of runs came to, in a table, a page and pictures. Needs neither torch nor Hydra.

reading.py               what is in the folder
configurations.py        which runs are one row, and which keys tell the rows apart
metric.py, numbers.py    which number is compared, and how numbers are shown
summary.py               the rows with their numbers
rerun.py                 the command that goes on with a run
tables.py, curves.py     the same on the terminal, in files, and as pictures
page.py, page_table.py   and as a page; markup.py escapes, page.html, .css and .js are its frame
"""
