"""RunPod's Hub wants a handler.py; the worker, with its `runpod.serverless.start`, is rp_handler.py."""

from pathlib import Path
from runpy import run_path

# As a program it is the worker; who imports it gets `handler`, and starts none.
handler = run_path(str(Path(__file__).parents[1] / "rp_handler.py"), run_name=__name__)["handler"]
