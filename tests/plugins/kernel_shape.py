"""The model sizes for which the tests compile kernels."""

from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape

# Odd sizes: a head dimension of two tiles, a group of 3 heads a key head, widths that are no powers of two.
SHAPE = ModelShape(TowerShape(4, 320, 4, 1280, 1176, 2), DecoderShape(4, 96, 6, 2, 16, 256, 500))
