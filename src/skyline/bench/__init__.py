"""The continuous benchmark of LLM serving: any engine behind an OpenAI-compatible address, along its Pareto frontier.

It is neutral: it speaks HTTP only and imports nothing of the engine (import-linter checks it).

    suite.py      what to measure (YAML)           results.py   what was measured
    metrics.py    what the numbers mean            stats/       what they are worth (pure functions)
    engines/      installs, starts, stops servers  load/        sends requests and measures itself
    runner.py     a suite from start to end        store/       results in SQLite or PostgreSQL
    dashboard/    pages                            importers/   result files of other tools
"""
