"""SignSGD, which has no states, and Adagrad, which has one that is never negative, as ops on adamops."""
