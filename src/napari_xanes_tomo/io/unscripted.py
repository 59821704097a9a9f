"""A folder of frames without a script: energies, angles and flats by the names, then the headers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from napari_xanes_tomo.model import Series, XanesTomoError
from napari_xanes_tomo.recipe import ScanParameters

from .assemble import finish
from .planned import WHY, Block, Folder, Frame, Problems, nan_none, take
from .script import NAN, NameFacts, facts_of
from .xrm import XrmError, XrmHeader

__all__ = ["open_names"]


def open_names(folder: Folder, params: ScanParameters, verify: bool) -> Series:
    """Open a folder without a script: group by what the names and then the headers say."""
    problems = Problems()
    projections: dict[tuple[int, float], list[tuple[tuple[Any, ...], Frame, NameFacts]]] = {}
    flats: dict[tuple[int, float], list[tuple[tuple[Any, ...], Frame, NameFacts]]] = {}
    loose: list[tuple[tuple[Any, ...], Frame, NameFacts]] = []  # flats whose names hold no energy
    for name, path in sorted(folder.files.items()):
        facts = facts_of(name)
        stack = name.lower().endswith(".txrm")
        header: XrmHeader | None = None
        if verify or stack or facts.energy != facts.energy:
            found = folder.header(path)
            header = found.header if isinstance(found, XrmError) else found
            if isinstance(found, XrmError) and found.header is None and facts.energy != facts.energy:
                problems.add("error", found.reason, f"{WHY.get(found.reason, found.reason)}: left out", name)
                continue
        if facts.energy != facts.energy and header is not None:
            acquired = facts_of(re.split(r"[\\/]", header.acq_file_name)[-1])
            if header.energies_ev[0] > 0 and facts.kind == "projection":
                facts = facts._replace(energy=round(header.energies_ev[0], 2))
            elif acquired.energy == acquired.energy or (acquired.kind == "flat" and facts.kind == "projection"):
                facts = acquired
            elif header.energies_ev[0] > 0:
                facts = facts._replace(energy=round(header.energies_ev[0], 2))
        if facts.kind == "dark":
            problems.add("info", "darks", "dark frame left out: dark fields are not used yet", name)
            continue
        for number in range(1, (header.n_images if header is not None else 1) + 1) or (1,):
            theta = facts.theta if facts.kind == "projection" else NAN
            frame = Frame(name, facts.kind, theta, NAN, 0, path, number, "ok")
            time = header.times_s[number - 1] if header is not None and facts.counter < 0 and stack else 0.0
            order = (facts.counter, time if time == time else 0.0, facts.theta, facts.shot, name, number)
            item = (order if facts.theta == facts.theta else (*order[:2], 0.0, *order[3:]), frame, facts)
            if facts.kind == "flat" and facts.energy != facts.energy:
                loose.append(item)
            else:
                into = flats if facts.kind == "flat" else projections
                into.setdefault((facts.rep, facts.energy), []).append(item)
    if not projections and not flats:
        raise XanesTomoError(
            f"{folder.path.resolve().name}: expected frames whose names or headers tell their energy, "
            f"got {len(folder.files)} files that do not; open the scan script instead"
        )
    for key in [k for k in projections if k[1] != k[1]]:
        for _, frame, _ in projections.pop(key):
            problems.add("error", "no-energy", "neither its name nor its header tells an energy: left out", frame.name)
    for members in (*projections.values(), *flats.values()):
        members.sort(key=lambda item: item[0])
    keys = sorted(projections, key=lambda k: (k[0], projections[k][0][0][0], k[1]))
    groups = _assign_loose(loose, [projections[k] for k in keys])
    blocks = []
    for index, key in enumerate(keys):
        frames: list[Frame] = [frame for _, frame, _ in flats.pop(key, [])]
        rest = [(frame, facts) for _, frame, facts in projections[key]]
        own = groups.get(index, [])
        for position, (place, group) in enumerate(own):
            if place == 0 or position == 0:
                frames += group
                continue
            # The angle in the name of a flat is that of the projection before it.
            previous = facts_of(group[0].name).theta
            cut = next((i + 1 for i, (_, f) in enumerate(rest) if abs(f.theta - previous) < 0.01), len(rest) // 2)
            frames += [f for f, _ in rest[:cut]]
            rest = rest[cut:]
            frames += group
        frames += [f for f, _ in rest]
        blocks.append(Block(key[1], frames))
    for key, members in flats.items():
        energy = nan_none(key[1])
        for _, frame, _ in members:
            take(frame, folder.header(frame.path))
            if frame.status != "ok":
                reason = frame.status.partition(":")[2]
                problems.add("error", reason, f"flat {WHY.get(reason, reason)}", frame.name, energy)
        text = f"{len(members)} flats at {key[1]:g} eV (rep {key[0]}) have no projection: this energy is left out"
        problems.add("warning", "no-projections", text, energy=energy)
    if not blocks:
        raise XanesTomoError(
            f"{folder.path.resolve().name}: expected projections, got only {len(folder.files)} flats; "
            "open the folder that holds both"
        )
    return finish(folder.path.resolve().name, blocks, folder, params, verify, problems, "")


def _assign_loose(
    loose: Sequence[tuple[tuple[Any, ...], Frame, NameFacts]],
    energies: Sequence[Sequence[tuple[tuple[Any, ...], Frame, NameFacts]]],
) -> dict[int, list[tuple[int, list[Frame]]]]:
    """Give flats without an energy in their names to the energies, by the counters.

    A projection's counter runs over the whole scan, so that ``counter // projections per energy`` is the
    number of the energy; a flat's does too, in groups of as many as its name says (``_001of010``), an
    equal number of groups an energy: ``counter // 20`` and ``counter % 20 // 10`` for two groups of ten.
    """
    found: dict[int, list[tuple[int, list[Frame]]]] = {}
    if not loose or not energies:
        return found
    per_energy = max(max(f.counter for _, _, f in e) - min(f.counter for _, _, f in e) + 1 for e in energies)
    index_of = {}
    for i, members in enumerate(energies):
        index_of[members[0][2].counter // per_energy if members[0][2].counter >= 0 else i] = i
    shots = max((f.shots for _, _, f in loose), default=0) or 10
    by_group: dict[int, list[Frame]] = {}
    for _, frame, facts in sorted(loose, key=lambda item: item[0]):
        by_group.setdefault(max(facts.counter, 0) // shots, []).append(frame)

    def covered(per: int) -> tuple[int, int, int]:
        hit = {g // per for g in by_group if g // per in index_of}
        stray = sum(g // per not in index_of for g in by_group)
        return -stray, len(hit), -abs(per - 2)

    per = max(range(1, 9), key=covered)
    for group, shot_frames in sorted(by_group.items()):
        if group // per in index_of:
            found.setdefault(index_of[group // per], []).append((group % per, shot_frames))
    return found
