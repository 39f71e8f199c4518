"""What does Ablation-CAM cost behind the layer only, beside running the network once per channel?

64^3 input, MONAI ResNet18 in 3D (untrained, fixed seed). Ours is everything: the prediction that is
recorded, the check of the tail, every channel, the map. Running all the channels through the
network takes minutes, so each turn runs a few of them and is multiplied up; both take turns, so
that a busy machine slows both alike, on one thread, which waits for no other. The ratio is the
median over the turns. The drops of those channels must agree.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

LAYERS = {"layer4": 4, "layer3": 4}  # and the channels that each turn runs through the network
SIDE, ROUNDS, THREADS = 64, 7, 1


def build() -> Any:
    """The untrained network in eval mode."""
    import torch
    from monai.networks import nets

    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    return nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2).eval()


def naive(net: Any, layer: str, x: Any, target: Any, channels: list[int]) -> list[float]:
    """Drops of some channels, the whole network each time."""
    import torch

    def score(without: int | None) -> float:
        def hook(_module: Any, _inputs: Any, out: Any) -> Any:
            out = out.clone()
            if without is not None:
                out[:, without] = 0
            return out

        handle = net.get_submodule(layer).register_forward_hook(hook)
        try:
            with torch.inference_mode():
                return float(target(net(x))[0])
        finally:
            handle.remove()

    whole = score(None)
    return [whole - score(k) for k in channels]


def ours(net: Any, layer: str, x: Any, target: Any) -> tuple[Any, Any]:
    """The method from the network and the scan on, and its capture."""
    from med_gradcam.capture import captures
    from med_gradcam.methods import Bound, ablationcam
    from med_gradcam.tail import at_rest, record

    with at_rest(net):
        found = captures(record(net, [layer], x), target, None)[layer]
        return ablationcam.evidence(found, Bound(0.02, 0.05)).values, found


def compare(net: Any, layer: str, some: int) -> tuple[float, float, float, int]:
    """Seconds of ours, seconds of a network run, how many times faster, channels."""
    import torch

    from med_gradcam.methods import ablationcam
    from med_gradcam.tail import at_rest
    from med_gradcam.target import Target

    target = Target("class", "1", (1,), "softmax")
    x = torch.randn(1, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    _, found = ours(net, layer, x, target)
    count = len(found.activation)
    picked = [n * count // some for n in range(some)]
    truth = naive(net, layer, x, target, picked)
    with at_rest(net):
        drops = ablationcam._drops(found, torch.tensor(picked)).tolist()  # noqa: SLF001
    apart = max(abs(a - b) for a, b in zip(truth, drops, strict=True))
    if apart > 1e-5:
        raise SystemExit(f"the drops at {layer} differ by {apart:.1e}")
    quick, slow = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        ours(net, layer, x, target)
        middle = time.perf_counter()
        naive(net, layer, x, target, picked)
        quick.append(middle - start)
        slow.append((time.perf_counter() - middle) / (some + 1))
    times = [one * (count + 1) / all_ for one, all_ in zip(slow, quick, strict=True)]
    return statistics.median(quick), statistics.median(slow), statistics.median(times), count


def main() -> None:
    """Print the table as Markdown."""
    net = build()
    print(f"input {SIDE}^3, {THREADS} thread, medians of {ROUNDS} turns\n")
    print("| layer | channels | one prediction s | network per channel s | ours s | times faster |")
    print("|---|---|---|---|---|---|")
    for layer, some in LAYERS.items():
        quick, one, times, count = compare(net, layer, some)
        whole = one * (count + 1)
        print(f"| {layer} | {count} | {one:.2f} | {whole:.0f} | {quick:.2f} | x{times:.0f} |")


if __name__ == "__main__":
    main()
