"""What importing costs: the decorators and the ops pull in torch and nothing heavy."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"timm", "torchvision", "pydantic", "yaml", "sklearn", "matplotlib", "tensorboard", "safetensors", "PIL"}


def modules_after(code):
    """Top-level packages in a fresh interpreter after some code."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", script]
    return set(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split())


def test_decorators_and_ops_need_torch_alone():
    loaded = modules_after(
        "sys.path.append('kernels')\n"
        "import ssl_ib, torch\n"
        "@ssl_ib.register_criterion('mine')\n"
        "class Mine(ssl_ib.Criterion):\n"
        "    def forward(self, outputs, batch, progress): ...\n"
        "import ssl_ib.ops, ssl_ib_kernels\n"
        "assert 'ssl_ib.criterions' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert {"ssl_ib", "ssl_ib_kernels", "torch"} <= loaded
    assert not loaded & HEAVY


def test_a_configuration_needs_no_parts():
    loaded = modules_after("import ssl_ib.config.config, ssl_ib.config.recipe\nssl_ib.config.recipe.recipe_names()")
    assert "pydantic" in loaded and not loaded & (HEAVY - {"pydantic", "yaml"})
