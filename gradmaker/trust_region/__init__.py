"""Trust regions: how far a step is trusted, by its predicted divergence or by the quadratic model of the loss.

The policy that a maker holds, damping that follows the loss, the quadratic model on the batch of a step, and the lengths that
it likes best. Options of these are in `gradmaker.methods.trust_region`.
"""
