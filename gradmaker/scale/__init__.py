"""Several processes.

What of a step depends on the number of processes. Without a process group none of it runs. Owners of blocks and
collectives belong here.
"""
