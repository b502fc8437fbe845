"""An encoder in the layouts of the libraries that people use, and published encoders in ours."""

#: What a run's encoder can be written as (formats.py), and the published layouts that can be read (models/official.py).
FORMATS = ("safetensors", "timm", "hf", "torchvision", "onnx")
LAYOUTS = ("mae", "moco_v3", "dino", "swav", "simmim")
