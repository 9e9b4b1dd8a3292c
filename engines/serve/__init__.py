"""``vflow-export serve``: a batcher behind an OpenAI-compatible HTTP endpoint. Needs ``pip install 'vflow-export[serve]'``."""
