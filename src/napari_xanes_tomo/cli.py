"""The command line: ``xanes-tomo inspect | demo | test | recipe | run | report | export | view``.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 stopped by a threshold, 130 stopped by Ctrl-C. An error is one line on
stderr. What is heavy to import (numba, zarr, napari) is imported inside the command that needs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ._version import __version__
from .inspection import inspection, print_inspection, problem_line
from .model import Cancelled, Series, XanesTomoError, no_progress
from .terminal import FAILED, STOPPED_BY_USER, complain, duration, explain, keeping_partial, one_line, showing

if TYPE_CHECKING:
    from .execution import Execution
    from .recipe import Recipe
    from .state import State
    from .workflow import Workflow

__all__ = ["app", "main"]

STOPPED_BY_THRESHOLD = 3
_SCREEN = ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")  # without one of them Qt ends the process
_SHOWN = 8  # problems or flags listed before the rest is only counted

app = typer.Typer(
    name="xanes-tomo",
    help="Full-field XANES tomography: from raw .xrm files to maps of elements and of the edge energy.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

StepName = Literal["flats", "jitter", "registration", "maps"]
OnFail = Literal["continue", "stop"]

_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and show the traceback of an error.")]
_Script = Annotated[
    Path | None, typer.Option("--script", help="A scan script that lies elsewhere; PATH is then the frames' folder.")
]


# ------------------------------------------------------------------------------------------------------ inspect


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A scan script, a folder, one .xrm, .txrm or HDF5.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")] = False,
    script: _Script = None,
    recipe: Annotated[Path | None, typer.Option(metavar="R.yaml", help="How the files are read (scan, given).")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read the header of every file.")] = True,
    verbose: _Verbose = False,
) -> None:
    """List what a scan holds, and what is missing or damaged. Exit code 1 when nothing of it can be used."""
    from .io.given import open_input
    from .recipe import Recipe

    with one_line(verbose):
        own = Recipe() if recipe is None else Recipe.from_yaml(recipe)
        with contextlib.nullcontext(no_progress) if as_json else showing(verbose) as progress:
            series = open_input(path, own, script=script, verify=verify, progress=progress)
        facts = inspection(series)
        if as_json:
            typer.echo(json.dumps(facts, indent=1, allow_nan=False))
        else:
            print_inspection(series, facts)
        if not facts["totals"]["projections"]["usable"]:
            raise typer.Exit(FAILED)


# --------------------------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    preset: Annotated[
        Literal["tiny", "demo", "demo-real", "hard"],
        typer.Option(
            help="tiny: 64 px, 8 energies; demo: 256 px, 16 energies; demo-real: with glass in the field, a dark band, "
            "stray light, changing focus, shrinkage; hard: large jitter, few quanta, a post, a slip, bad frames."
        ),
    ] = "demo",
    seed: Annotated[int, typer.Option(min=0, help="Another particle, motion and noise.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Change a parameter of the preset; may be given several times."),
    ] = None,
    verbose: _Verbose = False,
) -> None:
    """Write a digital twin: the .xrm files and the script of a measurement, with the truth beside them."""
    again = "stopped; the same command writes the twin anew"
    with one_line(verbose, again):
        from .phantom import write_twin

        started = time.monotonic()
        with showing(verbose) as show:
            write_twin(folder, preset, seed=seed, options=_options(option or []), progress=show)
        files = sum(1 for p in folder.iterdir() if p.suffix == ".xrm")
        typer.echo(f"{folder}: {files} .xrm files and their script, the truth in {folder / 'truth'} "
                   f"({duration(time.monotonic() - started)})")  # fmt: skip
        typer.echo(f"next: xanes-tomo run {folder} --out {folder}-out")


def _options(texts: list[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` texts, the values as YAML."""
    import yaml

    out: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise XanesTomoError(f"--option: expected KEY=VALUE, got {text!r}")
        try:
            out[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise XanesTomoError(f"--option {key.strip()}: expected a number or a list, got {value!r}") from None
    return out


# --------------------------------------------------------------------------------------------------------- test


@app.command("test")
def on_my_data(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A measurement: its script, folder or file.")],
    energy: Annotated[
        float | None, typer.Option(help="The energy (eV) nearest to this; by default the last (--registration: first).")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="R.yaml", help="Parameters of the steps.")] = None,
    shift: Annotated[float, typer.Option(min=0, max=100, help="Rms displacement put in, px of 1024 columns.")] = 4.0,
    bad: Annotated[int, typer.Option(min=0, help="Number of bad frames put in.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Other displacements and bad frames.")] = 0,
    registration: Annotated[
        bool, typer.Option("--registration", help="Test the registration to the reference energy, with a scale jump.")
    ] = False,
    scale: Annotated[float, typer.Option(min=0.98, max=1.02, help="Scale put in (--registration).")] = 1.003,
    verbose: _Verbose = False,
) -> None:
    """Put known displacements and bad frames into copies of your projections and tell how well they are found again."""
    with one_line(verbose):
        from .injection import JitterTest, RegistrationTest, recover_jitter, recover_registration
        from .io.scan import open_series
        from .recipe import Recipe

        use = Recipe() if recipe is None else Recipe.from_yaml(recipe)
        with showing(verbose) as show:
            series = open_series(path, use.scan, progress=show)
            if not series.scans:
                raise XanesTomoError(f"{path.name}: expected a measurement with projections, got none")
            wanted = series.energies_ev[0 if registration else -1] if energy is None else energy
            scan = min(series.scans, key=lambda s: abs(s.energy_ev - wanted))
            found: JitterTest | RegistrationTest
            if registration:
                from .registration import reference_energy

                reference = series.scans[reference_energy(series.energies_ev, use.registration.reference_ev)]
                found = recover_registration(
                    scan, reference, use, shift_px=shift, scale=scale, seed=seed, progress=show
                )
            else:
                found = recover_jitter(scan, use, shift_px=shift, bad_frames=bad, seed=seed, progress=show)
        typer.echo(found.text())


# ------------------------------------------------------------------------------------------------------- recipe


@app.command()
def recipe(
    schema: Annotated[bool, typer.Option("--schema", help="Write its JSON schema, for editors and checks.")] = False,
) -> None:
    """Write the default recipe: every parameter of every step, as YAML."""
    from .recipe import Recipe

    typer.echo(Recipe.schema_text() if schema else Recipe().to_yaml(), nl=False)


# ---------------------------------------------------------------------------------------------------------- run

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text)
    size = float(found.group(1)) * 1024 ** " KMGT".index(found.group(2).upper() or " ") if found else 0.0
    if size < 1 << 20:
        raise typer.BadParameter(f"expected a size of at least 1M, such as 4G or 800M, got {text!r}")
    return int(size)


def _own_recipe(out: Path) -> Recipe | None:
    """Return the recipe of the run that `out` holds; None when it holds none."""
    if not (out / "journal.jsonl").is_file():
        return None
    from .io.journal import Journal
    from .recipe import Recipe

    for event in reversed(Journal(out).events):
        if event.kind in ("run", "recipe"):
            return Recipe.from_text(str(event.payload.get("recipe", "")), f"the recipe in {out.name}")
    return None


def _recipe_for(
    out: Path, recipe: Recipe | None, bin: int | None, on_fail: OnFail | None
) -> tuple[Recipe, Recipe | None]:
    """Return the recipe of a run, and what is to be asked of the folder (None: go on with its own)."""
    from .recipe import Recipe

    own = _own_recipe(out)
    wanted = recipe or own or Recipe()
    if bin is not None and bin != wanted.scan.bin:
        wanted = wanted.model_copy(update={"scan": wanted.scan.model_copy(update={"bin": bin})})
    if on_fail is not None:
        wanted = wanted.model_copy(update={"on_fail": on_fail})
    return wanted, None if own is not None and wanted == own else wanted


@dataclass(frozen=True)
class _Asked:
    """What the command line says about every scan of a run."""

    recipe: Recipe | None
    script: Path | None
    bin: int | None
    on_fail: OnFail | None
    memory_bytes: int
    execution: Execution
    until: StepName
    verbose: bool


@app.command("run")
def run_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH",
            help="Scan scripts, folders, .xrm, .txrm or HDF5; or what was aligned elsewhere (docs/formats).",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder; for several scans one folder for each in it.")],
    recipe: Annotated[Path | None, typer.Option(help="Parameters of every step, YAML.")] = None,
    script: _Script = None,
    bin: Annotated[int | None, typer.Option(min=1, max=16, help="Sum n x n pixels; goes before the recipe's.")] = None,
    on_fail: Annotated[
        OnFail | None, typer.Option(help="Where a score misses its threshold; goes before the recipe's.")
    ] = None,
    memory: Annotated[str, typer.Option(help="What the maps may take.", metavar="SIZE")] = "4G",
    threads: Annotated[int | None, typer.Option(min=1, help="Of this machine; all unless given.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Make the maps on the workers of this dask scheduler.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Make the maps on a batch system: options of dask-jobqueue, YAML.")
    ] = None,
    until: Annotated[StepName, typer.Option(help="The last step to do.")] = "maps",
    verbose: _Verbose = False,
) -> None:
    """Do the whole chain. Again on the same output folder, it goes on where it stopped.

    Results whose scores all pass are accepted. Exit code 3: stopped by a threshold (on_fail: stop).
    """
    memory_bytes = _bytes(memory)
    if script is not None and len(paths) > 1:
        raise typer.BadParameter("--script goes with one PATH; give the scripts themselves as PATHs")
    if scheduler is not None and cluster is not None:
        raise typer.BadParameter("--scheduler and --cluster: expected one of the two, got both")
    if threads is not None and (scheduler is not None or cluster is not None):
        raise typer.BadParameter("--threads is for this machine; the workers of a cluster have their own number")
    again = "stopped; what is finished is kept, the same command goes on from there"
    with one_line(verbose, again):
        from .execution import Cluster, from_options
        from .recipe import Recipe

        asked = _Asked(
            None if recipe is None else Recipe.from_yaml(recipe), script, bin, on_fail, memory_bytes,
            from_options(scheduler, cluster, threads), until, verbose,
        )  # fmt: skip
        if until == "maps" and isinstance(asked.execution, Cluster):
            asked.execution.check()
        if len(paths) == 1:
            try:
                _run_one(paths[0], out, None, asked)
            except XanesTomoError as error:
                code = _code(error)
                if code == FAILED:
                    raise
                complain(explain(error, verbose))
                raise typer.Exit(code) from None
            return
        if (out / "journal.jsonl").exists():
            raise XanesTomoError(f"{out}: expected a folder for several runs, it holds one itself; choose another")
        names: set[str] = set()
        codes = []
        for path in paths:
            try:
                _run_one(path, out, names, asked)
            except (KeyboardInterrupt, Cancelled):
                raise
            except Exception as error:  # noqa: BLE001 - one scan must not cost the others the night; reported here
                codes.append(_code(error))
                complain(f"{path}: {explain(error, verbose)}")
        if codes:
            ends = {FAILED: "failed", STOPPED_BY_THRESHOLD: "stopped by a threshold"}
            parts = [f"{codes.count(c)} of {len(paths)} scans {end}" for c, end in ends.items() if c in codes]
            complain(f"{', '.join(parts)}; the others are done")
            raise typer.Exit(FAILED if FAILED in codes else STOPPED_BY_THRESHOLD)


def _code(error: Exception) -> int:
    from .workflow import StoppedByThreshold

    return STOPPED_BY_THRESHOLD if isinstance(error, StoppedByThreshold) else FAILED


def _run_one(path: Path, out: Path, names: set[str] | None, asked: _Asked) -> None:
    """Run one scan into `out`, or into a subfolder of its own name when `names` (those taken so far) is given."""
    from .io.given import open_input
    from .recipe import Recipe

    started = time.monotonic()
    script = asked.script
    with showing(asked.verbose) as show:
        if names is not None:
            # Its name tells the folder, the folder its recipe, and that how the files are read.
            out = out / _free_name(open_input(path, asked.recipe or Recipe(), verify=False).name, names)
        recipe, of_folder = _recipe_for(out, asked.recipe, asked.bin, asked.on_fail)
        series = open_input(path, recipe, script=script, progress=show)
    _introduce(series)
    from .workflow import Workflow

    with (
        showing(asked.verbose) as show,
        Workflow(
            series, out, of_folder, memory_bytes=asked.memory_bytes, execution=asked.execution, source=script or path
        ) as workflow,
    ):
        try:
            with keeping_partial(show):
                state = workflow.run(until=asked.until, progress=show, accept="thresholds")
        except XanesTomoError:
            with contextlib.suppress(XanesTomoError):
                _report(out)  # what was found so far, and why it went no further
            raise
        report = _report(out)
    _conclude(workflow, state, report, asked.until, time.monotonic() - started)


def _report(out: Path) -> Path:
    from .report import write_report

    return write_report(out)


def _free_name(name: str, taken: set[str]) -> str:
    folder = re.sub(r"[^\w.+-]+", "_", name).strip(".") or "scan"
    if folder in taken:
        raise XanesTomoError(f"expected scans of different names, this is the second {name}; run it by itself")
    taken.add(folder)
    return folder


def _introduce(series: Series) -> None:
    """Say what there is to work on; what is odd about it, unless nothing can be used."""
    t = inspection(series)["totals"]
    if not t["projections"]["usable"]:
        why = [p.message for p in series.problems if p.severity == "error"]
        raise XanesTomoError(f"{series.name}: {why[-1] if why else 'expected projections that can be read, got none'}")
    text = ", ".join(f"{t[k]['usable']:,} of {t[k]['planned']:,} {k}" for k in ("energies", "projections", "flats"))
    first = series.scans[0]
    if first.given:
        size = " x ".join(str(n) for n in (series.frame_shape[0], len(first), series.frame_shape[1]))
        what = f"volumes (y, z, x) of {size} voxels" if first.given == "volumes" else f"{len(first)} projections each"
        if first.given == "images":
            what = f"images of {series.frame_shape[0]} x {series.frame_shape[1]} pixels"
        text = f"{len(series.scans)} energies, {what}, made elsewhere"
    typer.echo(f"{series.name}: {text}")
    odd = [p for p in series.problems if p.severity != "info"]
    for p in odd[:_SHOWN]:
        typer.echo(f"  {problem_line(p)}")
    if len(odd) > _SHOWN:
        typer.echo(f"  and {len(odd) - _SHOWN} more problems: see the report, or xanes-tomo inspect")


def _conclude(workflow: Workflow, state: State, report: Path, until: str, seconds: float) -> None:
    """Say what was done, what was not, and where it lies."""
    from .steps import STEPS

    energies = workflow.series.energies_ev
    out: list[tuple[float, str]] = []
    check: list[tuple[bool, str]] = []
    counts = []
    for s in STEPS:
        units = [(e, u) for (name, e), u in state.units.items() if name == s.name]
        done = sum(u.status in ("candidate", "accepted") for _, u in units)
        numbers = [u.candidate.payload["numbers"] for _, u in units if u.candidate is not None]
        extra = " (given)" if any("given" in n for n in numbers) else ""
        extra = " (not needed)" if s.name == "jitter" and any("single" in n for n in numbers) else extra
        part = f"{s.name} {done}/{len(units)}" if s.per_energy else f"{s.name} {'done' if done else 'not done'}"
        counts.append(part + extra if s.per_energy else part)
        for e, u in units:
            if u.status == "failed" and e is not None:
                out.append((float(energies[e]), u.reason))
            elif u.candidate is not None and u.status == "candidate":
                where = s.name if e is None else f"{s.name} {energies[e]:g} eV"
                for x in u.candidate.quality.scores:
                    if not x.passed:
                        red = x.colour == "red"
                        value = f"{'red, ' if red else ''}{where}: {x.name} {x.value:.3g} {x.unit}".rstrip()
                        limit = f"expected at {'most' if x.better == 'lower' else 'least'} {x.threshold:g}"
                        check.append((red, f"{value}, {limit}"))
        if s.name == until:
            break
    typer.echo(f"done in {duration(seconds)}: {', '.join(counts)}")
    if state.reference is not None and until in ("registration", "maps"):
        typer.echo(f"  reference energy: {energies[state.reference]:g} eV")
    _list("energies left out", list(dict.fromkeys(_with_energy(e, why) for e, why in out)))
    _list("to be looked at", [text for _, text in sorted(check, key=lambda c: not c[0])])  # what is red comes first
    maps = state[("maps", None)].candidate
    if until == "maps" and maps is not None:
        from .io.store import read_map_attributes

        whole, each = read_map_attributes(workflow.output.maps)
        mapped = [name for name in each if "_sigma" not in name]
        errors = "; their standard errors as NAME_sigma" if len(mapped) < len(each) else ""
        typer.echo(f"  maps:   {', '.join(mapped)}{errors}")
        _list("maps that could not be made", _absent(whole["absent"]))
        made = {f"{name}: {why}" for name, why in whole["absent"].items()}
        _list("about the maps", [n for n in maps.quality.notes if n not in made])
        typer.echo(f"          {workflow.output.maps}")
    typer.echo(f"  tables: {workflow.output.shifts.parent}")
    typer.echo(f"  report: {report}")


def _absent(reasons: Mapping[str, str]) -> list[str]:
    """Return one line for every reason, with the maps it keeps from being made."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [f"{', '.join(each)}: {why}" for why, each in names.items()]


def _with_energy(energy_ev: float, reason: str) -> str:
    name = f"{energy_ev:g} eV"
    return reason if reason.startswith(name) else f"{name}: {reason}"


def _list(title: str, lines: list[str]) -> None:
    if lines:
        typer.echo(f"  {title}:")
    for line in lines[:_SHOWN]:
        typer.echo(f"    {line}")
    if len(lines) > _SHOWN:
        typer.echo(f"    and {len(lines) - _SHOWN} more, see the report")


# ----------------------------------------------------------------------------------------- report, export, view


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    verbose: _Verbose = False,
) -> None:
    """Write the report of a run again, from its journal, tables and maps."""
    with one_line(verbose):
        typer.echo(str(_report(out)))


FormatName = Literal[
    "nxtomo", "data-exchange", "aligned-tiff", "aligned-data-exchange", "volumes-tiff", "maps-tiff", "shifts"
]


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="PATH|OUT", help="A measurement, or the output folder of a run.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty folder; the same command goes on in it.")],
    format: Annotated[
        FormatName,
        typer.Option(
            help="nxtomo, data-exchange: raw counts and flats; the others come from a run: aligned projections "
            "(absorbance), volumes (1/cm), maps, tables of displacements for nabu and TomoPy."
        ),
    ] = "nxtomo",
    energy: Annotated[list[float] | None, typer.Option(help="Only this energy, eV; may be repeated.")] = None,
    one_file: Annotated[bool, typer.Option("--one-file", help="nxtomo: all energies as entries of one file.")] = False,
    scan: Annotated[
        Path | None, typer.Option(help="With a run: its measurement, where it is not at the place it was.")
    ] = None,
    script: _Script = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of this machine; all unless given.")] = None,
    verbose: _Verbose = False,
) -> None:
    """Write a measurement or a run for other programs. What a run excluded is left out, or marked invalid."""
    again = "stopped; the files that are whole are kept, the same command goes on from there"
    with one_line(verbose, again), showing(verbose) as show:
        from .export import RAW, export_maps, export_scan, export_shifts, export_workflow
        from .io.given import open_input
        from .io.scan import open_series

        started = time.monotonic()
        if not (path / "journal.jsonl").is_file():
            if format not in RAW:
                raise XanesTomoError(
                    f"{path}: expected the output folder of a run for --format {format}, got none there"
                )
            series = open_series(path, script=script, progress=show)
            made = export_scan(series, to, format, only=energy, one_file=one_file, progress=show)
        elif format == "maps-tiff":
            made = export_maps(path, to, progress=show)
        elif format == "shifts":
            made = export_shifts(path, to, only=energy, progress=show)
        else:
            from .workflow import Workflow

            own, source = _own_recipe(path), scan or _source_of(path)
            if own is None or source is None:
                raise XanesTomoError(f"{path}: expected the scan of this run, it is not there; name it with --scan")
            series = open_input(source, own, script=script, progress=show)
            with Workflow(series, path) as workflow:
                made = export_workflow(
                    workflow, to, format, only=energy, one_file=one_file, threads=threads, progress=show
                )
    for note in made.notes[:_SHOWN]:
        typer.echo(f"  {note}")
    if len(made.notes) > _SHOWN:
        typer.echo(f"  and {len(made.notes) - _SHOWN} more, see {to / 'export.json'}")
    kept = f", {made.kept} of them were there already" if made.kept else ""
    typer.echo(f"{to}: {len(made.files)} files ({format}){kept} ({duration(time.monotonic() - started)})")


@app.command()
def view(
    path: Annotated[Path, typer.Argument(metavar="PATH|OUT", help="A measurement, or the output folder of a run.")],
    out: Annotated[Path | None, typer.Option(help="With a measurement: the output folder of its run.")] = None,
    verbose: _Verbose = False,
) -> None:
    """Open a measurement or a run in napari. An output folder opens together with the scan it was made from."""
    with one_line(verbose):
        if not path.exists():
            raise XanesTomoError(
                f"{path}: expected a scan script, a folder, a file or an output folder, got no such path"
            )
        if sys.platform.startswith("linux") and not any(os.environ.get(name) for name in _SCREEN):
            raise XanesTomoError(
                "view: expected a display, got neither DISPLAY nor WAYLAND_DISPLAY; start it on a desktop"
            )
        try:
            from ._napari.view import main as show
        except ImportError as error:  # qtpy's own error where there is no binding is one as well
            if verbose:
                traceback.print_exc()
            raise XanesTomoError(
                f"view: expected napari and a Qt binding ({error}); pip install 'napari-xanes-tomo[all]'"
            ) from None
        if out is None and (path / "journal.jsonl").is_file():
            source = None if _made_elsewhere(path) else _source_of(path)
            if source is not None:
                show(source, out=path)
                return
        elif out is not None:
            show(path, out=out)
            return
        show(path)


def _made_elsewhere(out: Path) -> bool:
    """Whether the run in `out` began with what was aligned elsewhere, which has no frames to look at; says so."""
    from .io.journal import Journal

    noted = [e.payload.get("problems", ()) for e in Journal(out).events if e.kind == "scan"]
    given = bool(noted) and any(p.get("code") == "given" for p in noted[-1])
    if given:
        typer.echo(f"{out.name}: {noted[-1][0].get('message', '')}; its maps are shown", err=True)
    return given


def _source_of(out: Path) -> Path | None:
    """Return the scan that the run in `out` was made from; None, with a line, where it is not there."""
    from .io.journal import Journal
    from .run import scan_source

    source = scan_source(Journal(out))
    if source is not None and Path(source).exists():
        return Path(source)
    where = "its journal does not name its scan" if source is None else f"its scan is not at {source} any more"
    typer.echo(f"{out.name}: {where}; view SCAN --out {out} opens both", err=True)
    return None


# --------------------------------------------------------------------------------------------------------- main


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"xanes-tomo {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Full-field XANES tomography: from raw .xrm files to maps of elements and of the edge energy."""


def main() -> None:
    """Run the command line; the entry point ``xanes-tomo``."""
    try:
        app()
    except SystemExit as end:
        if end.code == STOPPED_BY_USER and threading.active_count() > 1:
            # A slab that is still being made would hold the process for minutes; what counts is on disk already.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(STOPPED_BY_USER)
        raise


if __name__ == "__main__":
    main()
