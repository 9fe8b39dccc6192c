"""Costs of a step before it is made: operations counted from shapes, priced by rates measured on this machine.

`trial.py` makes steps of a maker on tensors without data, and `counting.py` records their operations and bytes; `flops.py`
has FLOPs of operators, `rates.py` the seconds that they take here. `prediction.py` puts these together, `layers.py` tells
FLOPs by layer. Of many ranks, `block_sizes.py` tells what a block amounts to, `traffic.py` the bytes of collectives, and
`ranks.py` what a rank holds and computes.
"""
