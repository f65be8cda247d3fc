"""`pbkd slurm`: run `pbkd` commands in allocations. Each command imports what it needs when it is called."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.inspect_command import AllowImport
from pipelines.recipe_arguments import Overrides, RecipePath, Until
from pipelines.store_commands import DEFAULT_STORE, Machine, StoreOption
from slurm.records import ExecutorName

app = typer.Typer(help="Run recipes and searches on Slurm: allocate, start Ray inside, survive preemption.")

Nodes = Annotated[int | None, typer.Option(help="Nodes to ask for. [default: 1]")]
Cpus = Annotated[int | None, typer.Option(help="CPUs of each node; without it whole nodes are asked for.")]
Gpus = Annotated[int | None, typer.Option(help="GPUs of each node.")]
Memory = Annotated[str | None, typer.Option(help="Memory of each node, such as 64G.")]
Partition = Annotated[str | None, typer.Option(help="Slurm partition.")]
Time = Annotated[
    str | None, typer.Option(help="Time limit as of sbatch; the job goes on after it. [default: 60]")
]
Account = Annotated[str | None, typer.Option(help="Slurm account.")]
Qos = Annotated[str | None, typer.Option(help="Slurm quality of service.")]
Profile = Annotated[str | None, typer.Option(help="Site profile; without it `default`, if there is one.")]
Executor = Annotated[
    ExecutorName, typer.Option(help="local: the same job on this machine; debug: in this process.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted, and submit nothing.")]
Follow = Annotated[bool, typer.Option("--follow", help="Show the log until the job ends.")]
Sweep = Annotated[
    str | None,
    typer.Option(metavar="KEY=V,V,...", help="A job array: an allocation for each value, over one store."),
]
Jobs = Annotated[list[str], typer.Argument(metavar="JOB...", help="As `pbkd slurm status` shows them.")]


@app.callback()
def slurm() -> None:
    """Run recipes and searches on Slurm: allocate, start Ray inside, survive preemption."""


@app.command(epilog="Example: pbkd slurm run pipelines/recipes/digits.yaml --nodes 2 --time 30")
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Until = None,
    allow_import: AllowImport = False,
    nodes: Nodes = None,
    cpus_per_node: Cpus = None,
    gpus_per_node: Gpus = None,
    mem: Memory = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    qos: Qos = None,
    profile: Profile = None,
    executor: Executor = "slurm",
    sweep: Sweep = None,
    store: StoreOption = DEFAULT_STORE,
    dry_run: DryRun = False,
    follow: Follow = False,
    json_: Machine = False,
) -> None:
    """Run a recipe in an allocation: `pbkd run`, in a Ray cluster over its nodes.

    A job that comes to its time limit, or is preempted, keeps its state and is requeued. Submitted again, it
    goes on from what is finished.
    """
    typed = [str(recipe), *(overrides or [])]
    options = [*(["--until", until] if until else []), *(["--allow-import"] if allow_import else [])]
    key, values = _values(sweep)
    variants = [[*typed, f"{key}={value}"] for value in values] if key else [typed]
    name = ""
    for _, *given in variants:
        name = _recipe_name(recipe, given, until)
    _launch(
        [["run", *variant, *options] for variant in variants],
        name,
        [recipe.absolute()],
        store,
        _allocation(profile, nodes, cpus_per_node, gpus_per_node, mem, partition, time, account, qos),
        executor,
        dry_run,
        follow,
        json_,
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: pbkd slurm tune joint pipelines/recipes/digits.yaml --trials 8 --nodes 2 --time 240",
)
def tune(
    context: typer.Context,
    space: Annotated[str, typer.Argument(metavar="SPACE", help="As of `pbkd tune`.")],
    recipe: RecipePath,
    nodes: Nodes = None,
    cpus_per_node: Cpus = None,
    gpus_per_node: Gpus = None,
    mem: Memory = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    qos: Qos = None,
    profile: Profile = None,
    executor: Executor = "slurm",
    sweep: Sweep = None,
    store: StoreOption = DEFAULT_STORE,
    dry_run: DryRun = False,
    follow: Follow = False,
    json_: Machine = False,
) -> None:
    """Search in an allocation: `pbkd tune`, in a Ray cluster over its nodes.

    Overrides and options that are not listed here are those of `pbkd tune`, which gets them as they are. A
    sweep is a search for each value, named after it, of a key or an option: `--sweep=--seed=0,1`.
    """
    from tune_spaces.commands import check

    typed = [space, str(recipe), *context.args]
    name = check(typed, store)
    key, values = _values(sweep)
    variants = [typed]
    if key:
        variants = [[*typed, f"{key}={value}", f"--name={name}-{key.strip('-')}-{value}"] for value in values]
        for variant in variants:
            check(variant, store)
    _launch(
        [["tune", *variant] for variant in variants],
        f"tune-{name}",
        [Path(word).absolute() for word in (space, str(recipe)) if Path(word).is_file()],
        store,
        _allocation(profile, nodes, cpus_per_node, gpus_per_node, mem, partition, time, account, qos),
        executor,
        dry_run,
        follow,
        json_,
    )


@app.command(epilog="Example: pbkd slurm status")
def status(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="One job, with all that happened.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    json_: Machine = False,
) -> None:
    """Show the jobs of a store and how they are, or one of them with all that happened to it."""
    from slurm.views import job_rows, text_of

    rows = job_rows(store, job)
    typer.echo(json.dumps({"jobs": rows}) if json_ else text_of(rows, detailed=job is not None))


@app.command(epilog="Example: pbkd slurm logs 1234 --follow")
def logs(
    job: Annotated[str, typer.Argument(metavar="JOB", help="As `pbkd slurm status` shows it.")],
    node: Annotated[int, typer.Option(help="Of which node; the command runs on the first, 0.")] = 0,
    store: StoreOption = DEFAULT_STORE,
    follow: Follow = False,
) -> None:
    """Print the log of a job; with --follow until it ends, and exit as it did."""
    from slurm.views import follow_log, log_of

    if not follow:
        typer.echo(log_of(store, job, node), nl=False)
    elif code := follow_log(store, job, node):
        raise typer.Exit(code)


@app.command(epilog="Example: pbkd slurm cancel 1234")
def cancel(jobs: Jobs, store: StoreOption = DEFAULT_STORE, json_: Machine = False) -> None:
    """End jobs with the state of their trainings kept; they are not requeued."""
    from slurm.views import cancel as end

    states = {job: end(store, job) for job in jobs}
    for job, state in states.items() if not json_ else ():
        typer.echo(f"{job}: {state}")
    if json_:
        typer.echo(json.dumps({"jobs": states}))


def _allocation(
    profile: str | None,
    nodes: Any,
    cpus: Any,
    gpus: Any,
    mem: Any,
    partition: Any,
    time: Any,
    account: Any,
    qos: Any,
) -> Any:
    from slurm.allocation import load_allocation

    typed = {
        "nodes": nodes,
        "cpus_per_node": cpus,
        "gpus_per_node": gpus,
        "mem": mem,
        "partition": partition,
        "time": time,
        "account": account,
        "qos": qos,
    }
    return load_allocation(profile, {key: value for key, value in typed.items() if value is not None})


def _launch(
    commands: list[list[str]],
    name: str,
    paths: list[Path],
    store: str,
    allocation: Any,
    executor: ExecutorName,
    dry_run: bool,
    follow: bool,
    json_: bool,
) -> None:
    """Submit, and say what was submitted and what to type next."""
    from pipelines.store import open_storage
    from slurm.launcher import Submission
    from slurm.records import folder_of_jobs, read_end
    from slurm.views import follow_log

    place = open_storage(store).location()
    submission = Submission(
        commands=tuple((*command, "--store", place) for command in commands),
        store=place,
        jobs=folder_of_jobs(place),
        paths=(Path.cwd(), *paths),
        name=f"pbkd-{name}",
        allocation=allocation,
        executor=executor,
    )
    if dry_run:
        typer.echo(submission.text())
        for number, command in enumerate(submission.commands):
            typer.echo(f"# {number}: pbkd {shlex.join(command)}")
        return
    for doubt in submission.check():
        typer.echo(f"note: {doubt}", err=True)
    records = submission.submit()
    if json_:
        typer.echo(json.dumps({"jobs": [record.id for record in records], "store": place}))
    else:
        where = "" if "PBKD_STORE" in os.environ or store == DEFAULT_STORE else f" --store {store}"
        for record in records:
            typer.echo(f"submitted {record.id}; next: pbkd slurm logs {record.id} --follow{where}")
    codes = [follow_log(place, record.id, 0) for record in records if follow]
    if executor == "debug":  # they have ended, and their logs were seen
        codes = [end.code for record in records if (end := read_end(submission.jobs / record.id)) is not None]
    if code := max(codes, default=0):
        raise typer.Exit(code)


def _values(sweep: str | None) -> tuple[str, list[str]]:
    """The key of a sweep and its values."""
    from pbkd.errors import UserError

    if sweep is None:
        return "", []
    key, equals, values = sweep.partition("=")
    if not key or not equals or not all(values.split(",")):
        raise UserError(f"--sweep {sweep}: expected KEY=VALUE,VALUE such as seed=0,1,2")
    return key, values.split(",")


def _recipe_name(recipe: Path, overrides: list[str], until: str | None) -> str:
    """The recipe's name; its mistakes are told here, not by a job that waited for hours."""
    from pbkd.errors import UserError
    from pbkd.storage import user_cache
    from pipelines.graph import build_graph
    from pipelines.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides)
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"download": False})})
    try:
        graph = build_graph(loaded, None, user_cache())
        if until is not None:
            graph.until(until.split(","))
    except UserError as error:
        raise UserError(f"{recipe}: {error}") from error
    return loaded.name
