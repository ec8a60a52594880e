"""The routing of a routed feed-forward as text."""


def print_routing(routing) -> None:
    """Print the fractions of tokens at each level, and the FLOPs computed (a `fusedlm.model.routing.Routing`)."""
    print(f"{routing.flops_share:.1%} of the full feed-forward FLOPs, measured (budget {routing.budget:.1%})")
    for name, (light, blend, full) in [("tokens", routing.shares), *enumerate(routing.layers)]:
        where = name if name == "tokens" else f"  routed layer {name}"
        print(f"{where}: {light:.1%} light, {blend:.1%} blended, {full:.1%} full")
