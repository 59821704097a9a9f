"""A folder of frames without a script: energies, angles and flats by the names, then the headers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from napari_xanes_tomo.model import Series, XanesTomoError
from napari_xanes_tomo.recipe import ScanParameters

from .assemble import finish
from .planned import WHY, Block, Folder, Frame, Problems, nan_none, take
from .script import NAN, NameFacts, facts_of
from .xrm import XrmError, XrmHeader, shown

__all__ = ["open_names"]

_SAME_ENERGY = 0.1  # eV between the measured energies of two frames of one energy


class _Item(NamedTuple):
    """A frame with what its name (or the name it was acquired under) tells."""

    frame: Frame
    facts: NameFacts
    time: float

    @property
    def order(self) -> tuple[object, ...]:
        theta = self.facts.theta if self.facts.theta == self.facts.theta else 0.0
        time = self.time if self.time == self.time else 0.0
        return self.facts.counter, time, theta, self.facts.shot, self.frame.name, self.frame.number


_Set = tuple[float, list[_Item]]  # the part of an energy's projections taken before a set of flats, and its shots


def open_names(folder: Folder, params: ScanParameters, verify: bool) -> Series:
    """Open a folder without a script: group by what the names and then the headers say."""
    problems = Problems()
    where = shown(folder.path.resolve().name)
    projections: dict[tuple[int, float], list[_Item]] = {}
    flats: dict[tuple[int, float], list[_Item]] = {}
    loose: list[_Item] = []  # flats whose names hold no energy
    for item in _with_energies(_listed(folder, verify, problems)):
        key = item.facts.rep, item.facts.energy
        if item.facts.kind != "flat" and key[1] != key[1]:
            problems.add(
                "error", "no-energy", "neither its name nor its header tells an energy: left out", item.frame.name
            )
        elif item.facts.kind == "flat" and key[1] != key[1]:
            loose.append(item)
        else:
            (flats if item.facts.kind == "flat" else projections).setdefault(key, []).append(item)
    if not projections and not flats:
        raise XanesTomoError(
            f"{where}: expected frames whose names or headers tell their energy, "
            f"got {len(folder.files)} files that do not; open the scan script instead"
        )
    for members in (*projections.values(), *flats.values()):
        members.sort(key=lambda item: item.order)
    keys = sorted(projections, key=lambda k: (k[0], projections[k][0].order[0], k[1]))
    groups = _assign_loose(loose, [projections[k] for k in keys])
    per_energy = _per_energy(list(projections.values())) if projections else 1
    blocks = []
    for index, key in enumerate(keys):
        own = [*_shots_apart(flats.pop(key, [])), *groups.get(index, [])]
        blocks.append(Block(key[1], _in_order(projections[key], own, per_energy)))
    for key, members in flats.items():
        energy = nan_none(key[1])
        for item in members:
            take(item.frame, folder.header(item.frame.path))
            if item.frame.status != "ok":
                reason = item.frame.status.partition(":")[2]
                problems.add("error", reason, f"flat {WHY.get(reason, reason)}", item.frame.name, energy)
        text = f"{len(members)} flats at {key[1]:g} eV (rep {key[0]}) have no projection: this energy is left out"
        problems.add("warning", "no-projections", text, energy=energy)
    if not blocks:
        raise XanesTomoError(
            f"{where}: expected projections, got only {len(folder.files)} flats; open the folder that holds both"
        )
    return finish(folder.path.resolve().name, blocks, folder, params, verify, problems, "")


def _listed(folder: Folder, verify: bool, problems: Problems) -> list[_Item]:
    """Return every image of every file with what name and header tell; what is no frame is reported."""
    out = []
    for file, path in sorted(folder.files.items()):
        name = shown(file)
        facts = facts_of(name)
        header: XrmHeader | None = None
        if verify or name.lower().endswith(".txrm") or facts.energy != facts.energy:
            found = folder.header(path)
            header = found.header if isinstance(found, XrmError) else found
            if isinstance(found, XrmError) and found.header is None and facts.energy != facts.energy:
                problems.add("error", found.reason, f"{WHY.get(found.reason, found.reason)}: left out", name)
                continue
        if facts.energy != facts.energy and header is not None:
            facts = _with_acquired(facts, header)
        if facts.kind == "dark":
            problems.add("info", "darks", "dark frame left out: dark fields are not used yet", name)
            continue
        for number in range(1, (header.n_images if header is not None else 1) + 1) or (1,):
            theta = facts.theta if facts.kind == "projection" else NAN
            frame = Frame(name, facts.kind, theta, NAN, 0, path, number, "ok")
            if header is not None and number <= len(header.energies_ev) and header.energies_ev[number - 1] > 0:
                frame.header_energy = header.energies_ev[number - 1]
            time = header.times_s[number - 1] if header is not None and number <= len(header.times_s) else NAN
            out.append(_Item(frame, facts, time))
    return out


def _with_acquired(facts: NameFacts, header: XrmHeader) -> NameFacts:
    """Add what the name tells under which a file was acquired; of a renamed one it is all there is to go by."""
    acquired = facts_of(re.split(r"[\\/]", header.acq_file_name)[-1])
    energy = NAN if header.energies_ev[0] > 0 else acquired.energy  # a measured one comes first
    renamed = facts.counter < 0 and facts.theta != facts.theta and not facts.shots
    if renamed:
        return acquired._replace(energy=energy, kind=acquired.kind if facts.kind == "projection" else facts.kind)
    return facts._replace(energy=energy, kind=acquired.kind if facts.kind == "projection" else facts.kind)


def _with_energies(items: Sequence[_Item]) -> list[_Item]:
    """Give frames whose names tell no energy the measured one: the median of those within 0.1 eV of each other."""
    lacking = sorted(
        {i.frame.header_energy for i in items if i.facts.energy != i.facts.energy and i.frame.header_energy > 0}
    )
    if not lacking:
        return list(items)
    parts = np.split(np.array(lacking), np.flatnonzero(np.diff(lacking) > _SAME_ENERGY) + 1)
    energy_of = {float(v): round(float(np.median(part)), 2) for part in parts for v in part}
    return [
        i._replace(facts=i.facts._replace(energy=energy_of.get(i.frame.header_energy, NAN)))
        if i.facts.energy != i.facts.energy
        else i
        for i in items
    ]


def _shots_apart(flats: Sequence[_Item]) -> list[_Set]:
    """Split the flats of one energy into sets: a new one where the numbers of the shots begin again."""
    sets: list[list[_Item]] = []
    for item in flats:
        if not sets or (item.facts.counter >= 0 and item.facts.shot and item.facts.shot <= sets[-1][-1].facts.shot):
            sets.append([])
        sets[-1].append(item)
    return [(k / len(sets), own) for k, own in enumerate(sets)]


def _in_order(projections: Sequence[_Item], sets: Sequence[_Set], per_energy: int) -> list[Frame]:
    """Put the sets of flats where they were taken among the projections.

    By the times in the headers where all of them are known; by the counters otherwise. The angle in the name of a flat
    tells nothing: it is that of the projection before it.
    """
    times = [i.time for i in projections]
    taken = [float(np.mean([i.time for i in own])) for _, own in sets]
    if len(sets) > 1 and np.isfinite([*times, *taken]).all() and min(times) < max(times):
        places = [sum(t < now for t in times) for now in taken]
    else:
        places = [_place(part, projections, per_energy) for part, _ in sets]
    frames: list[Frame] = []
    done = 0
    for place, (_, own) in sorted(zip(places, sets, strict=True), key=lambda p: p[0]):
        frames += [i.frame for i in projections[done:place]] + [i.frame for i in own]
        done = max(done, place)
    return frames + [i.frame for i in projections[done:]]


def _place(part: float, projections: Sequence[_Item], per_energy: int) -> int:
    """Return how many projections were taken when a part of those planned was."""
    counters = [i.facts.counter for i in projections]
    if min(counters) < 0:
        return round(part * len(projections))
    first = min(counters) - min(counters) % per_energy
    if min(counters) % per_energy == 1 and len(counters) == per_energy:
        first += 1  # counted from one
    return sum(c < first + part * per_energy for c in counters)


def _per_energy(energies: Sequence[Sequence[_Item]]) -> int:
    """Return how many projections an energy has, by the counters."""
    return max(max(i.facts.counter for i in e) - min(i.facts.counter for i in e) + 1 for e in energies)


def _assign_loose(loose: Sequence[_Item], energies: Sequence[Sequence[_Item]]) -> dict[int, list[_Set]]:
    """Give flats without an energy in their names to the energies, by the counters.

    A projection's counter runs over the whole scan, so that ``counter // projections per energy`` is the
    number of the energy; a flat's does too, in groups of as many as its name says (``_001of010``), an
    equal number of groups an energy: ``counter // 20`` and ``counter % 20 // 10`` for two groups of ten.
    """
    found: dict[int, list[_Set]] = {}
    if not loose or not energies:
        return found
    per_energy = _per_energy(energies)
    index_of = {}
    for i, members in enumerate(energies):
        counter = members[0].facts.counter
        index_of[counter // per_energy if counter >= 0 else i] = i
    shots = max((i.facts.shots for i in loose), default=0) or 10
    by_group: dict[int, list[_Item]] = {}
    for item in sorted(loose, key=lambda item: item.order):
        by_group.setdefault(max(item.facts.counter, 0) // shots, []).append(item)

    def covered(per: int) -> tuple[int, int, int]:
        hit = {g // per for g in by_group if g // per in index_of}
        stray = sum(g // per not in index_of for g in by_group)
        return -stray, len(hit), -abs(per - 2)

    per = max(range(1, 9), key=covered)
    for group, items in sorted(by_group.items()):
        if group // per in index_of:
            found.setdefault(index_of[group // per], []).append((group % per / per, items))
    return found
