"""Trust regions: bounds on a step, by its predicted divergence or by the quadratic model of the loss.

The policy that a maker holds, adaptive damping, the quadratic model on the batch of a step, and the rescaling to its
minimum. The options are in `gradmaker.methods.trust_region`.
"""
