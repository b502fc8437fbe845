"""The operations that views are made of, in plain torch, on a batch of images of which each has its own parameters."""
