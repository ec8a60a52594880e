"""What routed feed-forwards did, as text."""


def print_routing(routing) -> None:
    """Levels of the tokens scored, and what the routed feed-forwards computed (a `fusedlm.model.auxiliary.Routing`)."""
    print(f"{routing.flops_share:.1%} of the full feed-forward FLOPs, measured (budget {routing.budget:.1%})")
    for name, (light, blend, full) in [("tokens", routing.shares), *enumerate(routing.layers)]:
        where = name if name == "tokens" else f"  routed layer {name}"
        print(f"{where}: {light:.1%} light, {blend:.1%} blended, {full:.1%} full")
