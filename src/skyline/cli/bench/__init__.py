"""`skyline bench`: the continuous benchmark. One file a command."""

from __future__ import annotations

import typer

from skyline.cli.bench.compare import compare
from skyline.cli.bench.dashboard import dashboard, export
from skyline.cli.bench.history import history
from skyline.cli.bench.import_ import import_
from skyline.cli.bench.plan import plan
from skyline.cli.bench.recommend import recommend
from skyline.cli.bench.run import rerun, run
from skyline.cli.bench.store import store
from skyline.cli.bench.watch import watch
from skyline.cli.examples import examples

bench = typer.Typer(
    help="Measure any engine behind an OpenAI-compatible address, along its Pareto frontier.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

bench.command(epilog=examples("skyline bench plan quick", "skyline bench plan my-suite.yaml"))(plan)
bench.command(
    epilog=examples(
        "skyline bench run quick --open",
        "skyline bench run quick --engine skyline",
        "skyline bench run quick --url http://127.0.0.1:8000 --model Qwen/Qwen3-0.6B",
    )
)(run)
bench.command(epilog=examples("skyline bench rerun 4f9a01c2"))(rerun)
bench.command(
    epilog=examples(
        "skyline bench compare skyline transformers --suite quick --pairs 5",
        "skyline bench compare main my-branch",
    )
)(compare)
bench.command(
    epilog=examples(
        "skyline bench watch quick --every 6h",
        "skyline bench watch quick --every 1d --print-cron",
        "skyline bench watch quick --every 1d --print-workflow > .github/workflows/bench.yml",
    )
)(watch)
bench.command(epilog=examples("skyline bench history", "skyline bench history --fail-on-regression"))(history)
bench.command(epilog=examples("skyline bench dashboard --open"))(dashboard)
bench.command(epilog=examples("skyline bench export site/"))(export)
bench.command(
    epilog=examples(
        "skyline bench recommend --slo ttft=500ms,tpot=50ms",
        "skyline bench recommend --slo ttft_p99=2s,interactivity=20 --model demo",
    )
)(recommend)
bench.command("import", epilog=examples("skyline bench import vllm-result.json benchmarks.json"))(import_)
bench.add_typer(store, name="store")
