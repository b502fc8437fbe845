"""What a representation is worth: the evaluations of frozen features, and the signs that training is healthy.

`features` computes them once, `knn`, `linear` and `heads` score them with labels, `health` looks at them without.
`maps` gives feature maps, `mask_sets` images with masks, and `segmenter` trains a decoder between the two.
What a run is asked while it trains is in `online`; `evaluate` is `ssl-ib-eval`, whose protocols lie in `protocols`.
"""
