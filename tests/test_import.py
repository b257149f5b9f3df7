"""`import visionattn` costs nothing, and timm knows the networks whoever is imported first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KNOWN = "assert timm.is_model('nat_mini') and timm.is_model('hat_x4')"


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_brings_no_library() -> None:
    loaded = run("import sys, visionattn, visionattn.cli.command; print(*sys.modules)").split()
    assert not {"torch", "timm", "numpy", "PIL"} & {name.partition(".")[0] for name in loaded}


ORDERS = [
    f"import timm, visionattn; {KNOWN}",
    f"import visionattn, timm; {KNOWN}",
    "import visionattn, importlib.util; importlib.util.find_spec('timm').loader.get_filename('timm');"
    f"import timm; {KNOWN}",
    "import visionattn; from timm import create_model; create_model('cfsr_x2')",
    "import visionattn; from timm.data import create_transform; import timm; timm.create_model('cfsr_x2')",
    f"import visionattn; visionattn.load_checkpoint; import timm; {KNOWN}",
    f"from visionattn import *; import timm; {KNOWN}; kernels.window_attention, run_within",
    f"import visionattn.kernels, sys; assert 'timm' not in sys.modules; import timm; {KNOWN}",
    # Parts that the networks are made of, or that are made of networks.
    f"from visionattn.layers import WindowAttention2d; import timm; {KNOWN}",
    f"import visionattn.models.registry; import timm; {KNOWN}",
    f"import visionattn.checkpoints.loading; import timm; {KNOWN}",
    f"import visionattn.tasks.dense.detection; import timm; {KNOWN}",
    # As pickle refers to the entrypoint of a network.
    f"import pickle; pickle.loads(b'cvisionattn.models.nat\\nnat_mini\\n.'); import timm; {KNOWN}",
    f"import threading, visionattn\ndef load(): import timm\n"
    "threads = [threading.Thread(target=load) for _ in range(4)]\n"
    f"for t in threads: t.start()\nfor t in threads: t.join()\nimport timm; {KNOWN}",
]

# PyTorch is imported once for all of them: it takes most of the time.
EACH = """
import json, os, sys
import torch, torchvision
assert not {"timm", "visionattn"} & set(sys.modules)
for code in json.loads(sys.argv[1]):
    if os.fork() == 0:
        exec(code, {})
        os._exit(0)
    if os.wait()[1]:
        raise SystemExit(code)
"""


def test_networks_are_registered_in_every_order_of_imports() -> None:
    run(EACH, json.dumps(ORDERS))


def test_timm_stays_as_it_was_loaded() -> None:
    printed = run(
        "import sys; before = list(sys.meta_path); import visionattn, timm, importlib\n"
        # Old releases of setuptools, which PyTorch imports, leave finders of their own.
        "assert not [x for x in sys.meta_path if x not in before and 'visionattn' in type(x).__module__]\n"
        "assert timm.__spec__.loader is timm.__loader__\n"
        "print(type(timm.__loader__).__name__); importlib.reload(timm)"
    )
    assert printed == "SourceFileLoader\n"


def test_public_names() -> None:
    run(
        "import visionattn; assert set(visionattn.__all__) <= set(dir(visionattn))\n"
        "for name in visionattn.__all__: assert getattr(visionattn, name)\n"
        "try: visionattn.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit('an attribute from nowhere')"
    )


def test_workers_that_are_spawned(tmp_path: Path) -> None:
    script = tmp_path / "workers.py"
    script.write_text(
        "import torch.utils.data as data, timm, visionattn\n"
        "class Names(data.Dataset):\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, index): return timm.is_model('nat_mini')\n"
        "if __name__ == '__main__':\n"
        "    loader = data.DataLoader(Names(), num_workers=1, multiprocessing_context='spawn')\n"
        "    assert [bool(known) for known in loader] == [True, True]\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
