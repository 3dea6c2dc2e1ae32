"""A matrix product with the rows of a weight."""


def linear(x, weight):
    return x @ weight.T
