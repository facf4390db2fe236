"""`prune-opd demo`: the whole loop on the embedded task, in minutes and without a download.

settings.py   what the user can choose
worker.py     trains one student in a process of its own and tells how it goes
run.py        trains both side by side, evaluates, saves, writes the card and the figures, prints the table
"""
