"""To come."""


def build(page):
    return None
