"""Networks that come as programs (TorchScript, torch.export, ONNX), opened into eager modules.

An opened network has modules with names and hooks, runs operation by operation and keeps the very
weights of its source, so everything that explains an eager network explains it as well.
"""
