"""Triton kernels behind `ssl_ib.ops`; nothing else imports this package."""
