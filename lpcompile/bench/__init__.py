"""Benchmarks, run by ``python -m lpcompile bench``; one command a file, each making a Result.

Every variant of a comparison runs in one process, interleaved, on random data; what a Result
holds goes to a table, to JSON, and from JSON to docs/benchmarks.md.
"""
