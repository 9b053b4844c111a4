"""Cost of a plan against fvcore's count of the built candidate. Run: python benchmarks/cost.py [plans] [out.json]"""

import json
import sys

import torch
import torchvision
from fvcore.nn import FlopCountAnalysis

import prunefront

MODELS = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0")
#: fvcore also counts these, which multiply and accumulate nothing.
NOT_MACS = ("batch_norm", "adaptive_avg_pool2d")


def agreement(name: str, plans: int) -> dict[str, object]:
    torch.manual_seed(0)
    model, inputs = getattr(torchvision.models, name)(weights=None).eval(), torch.randn(1, 3, 64, 64)
    space = prunefront.discover(model, inputs)
    macs = params = 0
    for _ in range(plans):
        plan = space.plan({g.name: int(torch.randint(1, g.size + 1, ())) for g in space.groups})
        candidate, cost = space.apply(plan).eval(), space.cost(plan)
        analysis = FlopCountAnalysis(candidate, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        macs += cost.macs == sum(n for operator, n in analysis.by_operator().items() if operator not in NOT_MACS)
        params += cost.params == sum(p.numel() for p in candidate.parameters())
    return {"model": name, "groups": len(space.groups), "plans": plans, "macs_equal": macs, "params_equal": params}


def main() -> None:
    plans = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    rows = [agreement(name, plans) for name in MODELS]
    print("| model | groups | plans | macs equal | params equal |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if len(sys.argv) > 2:
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
