"""Lets torchvision's wheel, which is built for CUDA, be imported beside a CPU torch; SGLang imports it at start.

Its compiled operators cannot be loaded there, and its Python part then fails on the schemas that it expects of two of
them. This declares the schemas just before torchvision is imported. Run at every start of Python through a .pth file.
"""

import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch._kdflow_torchvision = self  # the declarations live as long as the library object
        return None


sys.meta_path.insert(0, _Declare())
