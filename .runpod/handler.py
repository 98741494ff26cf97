"""RunPod's Hub wants a handler.py; the worker is rp_handler.py."""

from pathlib import Path
from runpy import run_path

run_path(str(Path(__file__).parents[1] / "rp_handler.py"), run_name="__main__")
