"""An engine directory as a model of Triton Inference Server's Python backend (not the Triton language): docs/triton.md."""
