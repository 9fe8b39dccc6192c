"""Trust regions: how far a step is trusted, by its predicted divergence or by the quadratic model of the loss."""
