"""Engines of TensorRT and TensorRT for RTX, built from the graphs of an engine directory."""
