"""predict.py and the modules it needs in one file that Python runs: what is copied to an edge device beside a model."""

import zipfile
from pathlib import Path

from utils.atomic import atomic_file

ROOT = Path(__file__).parents[2]
MODULES = (
    "predict.py",
    "models/__init__.py",
    "models/conformal.py",
    "models/errors.py",
    "models/threads.py",
    "utils/__init__.py",
    "utils/atomic.py",
    "utils/console.py",
    "utils/data/__init__.py",
    "utils/data/ahead.py",
    "utils/data/image.py",
    "utils/line/__init__.py",
    "utils/line/edge_model.py",
    "utils/line/gallery.html",
    "utils/line/gallery.py",
    "utils/line/inputs.py",
    "utils/line/watch.py",
    "utils/pictures/__init__.py",
    "utils/pictures/heatmap.py",
    "utils/regions.py",
    "utils/size.py",
)


def write_program(path: Path) -> None:
    """Write ``path``, to be started as ``python predict.pyz model.onnx part.png`` where requirements-edge.txt is."""
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for module in MODULES:
            archive.write(ROOT / module, module)
        archive.writestr("__main__.py", "import sys\n\nfrom predict import main\n\nsys.exit(main())\n")
