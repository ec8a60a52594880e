"""Preparation at scale, on datatrove: tasks that many processes run, filters, duplicates, held-out text kept out of
training. Only `data.pipeline` of a recipe leads here; nothing else of fusedlm imports datatrove.

Stages, each of which has a completion marker per task:

    read        files -> stored documents that pass the filters, their digests, MinHash signatures
    exact       digests -> pairs of documents with the same text
    near        signatures -> pairs of documents that agree in a bucket
    clusters    pairs -> documents to remove (one task)
    tokenizer   trained, or read (one task)
    tokens      documents -> tokens
    spans       tokens of held-out text -> hashes of its spans (one task)
    search      tokens of training text -> documents with such a span
    layout      lengths -> where shards begin and end (one task)
    shards      tokens -> shards
    finish      manifest; the folder appears (one task)

Documents are numbered by source, file and place, and every decision is a function of these numbers and the text. So the
shards do not depend on tasks, workers or restarts.
"""
