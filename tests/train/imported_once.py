"""What a server imports, so that the processes that it forks needn't."""

import gc

import PIL.PngImagePlugin  # noqa: F401
import pytest  # noqa: F401
import torchvision  # noqa: F401

import data_tools.shard  # noqa: F401

gc.collect()
gc.freeze()  # nor go through it again
