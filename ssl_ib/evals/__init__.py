"""What a representation is worth: the evaluations of frozen features, and the signs that training is healthy.

`features` computes them once, `knn` and `linear` score them with labels, `health` looks at them without.
"""
