"""The measuring stick: what is measured (cases), how (measure, counters), what came out (results), the goals.

    cases.py  --a family's bench package does the work of each case-->  stand.py  --rows-->  results/*.json
    results/*.json + goals.py  --page.py, charts.py-->  docs/benchmarks.md, docs/images/bench_*.svg

No model is imported here: a family brings `models/<family>/bench`, a package with CASES, case id -> function(stand).
"""
