"""Jobs that are killed, stopped and told to end at every point of a step and of a save; disks that fail at every call of a save.

python -m tests.faults            the sweep of jobs as a table
python -m tests.faults --write    and in docs/reliability.md
"""
