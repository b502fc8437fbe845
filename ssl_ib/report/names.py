"""The numbers of a run in words, with their units."""

from __future__ import annotations

import re

#: Words that are not spelt as they stand in a key.
_WORDS = {
    "nce": "NCE",
    "kl": "KL",
    "mi": "mutual information",
    "club": "CLUB",
    "lr": "learning rate",
    "std": "deviation",
    "rankme": "RankMe",
    "knn": "kNN",
    "lidar": "LiDAR",
    "dino": "DINO",
    "mae": "MAE",
    "swav": "SwAV",
    "svib": "SVIB",
    "byol": "BYOL",
}
#: Whole names that words alone would not explain.
_NAMES = {"info_nce": "InfoNCE", "max": "shared by the latents of an image (max)", "min": "held of the input (min)"}
#: What is an entropy, or a difference of entropies, by natural logarithms.
_NATS = re.compile(r"(^|_)(nats|info_nce|entropy|kl|log_likelihood|ceiling)(_|$)")


def words(key: str) -> str:
    """A term or a metric as a reader says it: `loss/reconstruction_masked` is `reconstruction masked`."""
    name = key.rpartition("/")[2]
    if name in _NAMES:
        return _NAMES[name]
    return " ".join(_WORDS.get(word, word) for word in name.split("_") if word != "nats") or key


def unit(key: str) -> str:
    """The unit of a term, where its name tells: `nats`, or none."""
    return "nats" if _NATS.search(key.rpartition("/")[2]) else ""


def title(text: str) -> str:
    """A name at the head of a figure."""
    return text if text.startswith(_WORDS["knn"]) else text[:1].upper() + text[1:]
