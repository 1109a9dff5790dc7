"""For all tests: tiny models are fastest on one thread, and progress bars only hide what a failure says."""

import os

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import torch

torch.set_num_threads(1)
