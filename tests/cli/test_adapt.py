"""fusedlm eval with windows across documents and with adaptation."""

import json

import pytest


@pytest.mark.parametrize(
    "method,options,settings",
    [
        ("ngram", (), {"orders": [2, 3, 4, 5, 6, 7], "reset": False}),
        ("tilt", ("--adapt-reset",), {"reset": True}),
        ("finetune", ("--adapt-lr", "0.01", "--adapt-chunk", "32"), {"parameters": "norms", "lr": 0.01, "chunk": 32}),
        (
            "finetune",
            ("--adapt-parameters", "low_rank", "--adapt-rank", "2", "--adapt-steps", "2"),
            {"parameters": "low_rank", "rank": 2, "steps": 2},
        ),
    ],
)
def test_both_numbers_are_reported(workspace, fusedlm, method, options, settings):
    spans = ("--stride", "4", "--context", "16")
    plain = json.loads(fusedlm("eval", "runs/small", *spans, "--json").out)
    outcome = fusedlm("eval", "runs/small", *spans, "--adapt", method, *options, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    adapt = found.pop("adapt")
    assert found.pop("nll_per_token") == pytest.approx(plain.pop("nll_per_token"), rel=1e-6)
    assert found | {"bpb": 0} == plain | {"bpb": 0} and found["bpb"] == pytest.approx(plain["bpb"], rel=1e-6)
    assert (plain["window"], plain["stride"]) == (16, 4)
    assert adapt["method"] == method and settings.items() <= adapt.items()
    assert adapt["plain_bpb"] == found["bpb"] != adapt["adapted_bpb"]
    assert adapt["gain"] == pytest.approx(adapt["plain_bpb"] - adapt["adapted_bpb"], abs=1e-12)
    assert min(adapt["plain_microseconds_per_token"], adapt["adapted_microseconds_per_token"]) > 0
    assert {"gain_low", "gain_high", "resampled", "units"} <= adapt.keys()
    lines = fusedlm("eval", "runs/small", *spans, "--adapt", method, *options).out.splitlines()
    assert lines[0].startswith(f"{found['bpb']:.4f} bits per byte on validation text (window 16, stride 4)")
    assert lines[1].startswith(f"{adapt['adapted_bpb']:.4f} bits per byte with {method}, {adapt['gain']:+.5f} gained")


def test_windows_across_documents(workspace, fusedlm):
    plain = json.loads(fusedlm("eval", "runs/small", "--json").out)
    joined = json.loads(fusedlm("eval", "runs/small", "--across-documents", "--window", "64", "--json").out)
    assert joined["bpb"] != plain["bpb"] and joined["across_documents"] and not plain["across_documents"]
    assert (joined["tokens"], joined["bytes"]) == (plain["tokens"], plain["bytes"])
    assert ", across documents)" in fusedlm("eval", "runs/small", "--across-documents").out


@pytest.mark.parametrize(
    "options,word",
    [
        ("--adapt all", "--adapt 'all': must be one of ngram, tilt, finetune"),
        ("--adapt-lr 0.1", "--adapt-lr: needs --adapt"),
        ("--adapt-reset", "--adapt-reset: needs --adapt"),
        ("--adapt ngram --adapt-lr 0.1", "--adapt-lr: only for --adapt finetune"),
        ("--adapt finetune --adapt-lr 0", "--adapt-lr 0.0: must be greater than 0"),
        ("--adapt finetune --adapt-chunk 0", "--adapt-chunk 0: must be at least 1"),
        ("--adapt finetune --adapt-rank 4", "--adapt-rank 4: needs --adapt-parameters low_rank"),
        ("--adapt finetune --adapt-parameters all", "--adapt-parameters 'all': must be norms or low_rank"),
        ("--adapt finetune --adapt-rank two", "'two' is not an integer"),
        ("--adapt tilt --window 0", "--adapt: needs a window"),
        ("--across-documents --window 0", "--across-documents: needs a window"),
        ("--probe mqar --adapt ngram", "--adapt is not an option of --probe mqar"),
        ("--probe extend --across-documents", "--across-documents is not an option of --probe extend"),
    ],
)
def test_bad_options_are_one_line(workspace, fusedlm, options, word):
    outcome = fusedlm("eval", "runs/small", *options.split())
    assert outcome.code == 2 and word in outcome.err and outcome.err.count("\n") == 1, outcome.err
