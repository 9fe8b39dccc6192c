"""Several processes.

What of a step depends on how many processes share a batch. Without a process group none of it runs. Owners of blocks and
collectives belong here.
"""
