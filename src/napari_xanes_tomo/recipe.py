"""What the user asked for: frozen, bounded parameters of every step, read from and written to YAML."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import reprlib
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .model import XanesTomoError

__all__ = [
    "EDGE_MEASURES",
    "FLAT_CHOICES",
    "SCALE_CHANGES",
    "AbsorbanceParameters",
    "GivenParameters",
    "JitterParameters",
    "MapsParameters",
    "Recipe",
    "ReferenceFile",
    "RegistrationParameters",
    "ScanParameters",
    "check_flats",
    "parameter_key",
]


class _Parameters(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _unit(unit: str) -> dict[str, Any]:
    return {"unit": unit}


class ScanParameters(_Parameters):
    """How the files are read."""

    flip_rows: bool = Field(
        False, description="Turn every frame upside down (the instrument's handedness is not verified)."
    )
    theta_sign: Literal[1, -1] = Field(1, description="Sense of rotation: +1 as recorded, -1 reversed.")
    bin: int = Field(1, ge=1, le=16, description="Sum n x n recorded pixels into one before anything else.")
    pixel_law_slope_nm_per_ev: float = Field(
        0.002039449,
        gt=0,
        description="Pixel size of the unbinned camera = slope * energy + offset.",
        json_schema_extra=_unit("nm/eV"),
    )
    pixel_law_offset_nm: float = Field(
        -0.792164997,
        description="Pixel size of the unbinned camera = slope * energy + offset.",
        json_schema_extra=_unit("nm"),
    )


class GivenParameters(_Parameters):
    """Projections or volumes that were aligned elsewhere: what their files do not tell."""

    kind: Literal["auto", "raw", "projections", "volumes", "images"] = Field(
        "auto",
        description="What PATH holds: raw frames, aligned projections (absorbance), registered volumes, or registered "
        "images of 2-D XANES (absorbance), one an energy. auto: as the files tell; TIFF stacks and HDF5 or OME-Zarr "
        "arrays without angles are volumes.",
    )
    unit: Literal["auto", "1/cm", "1/mm", "1/um", "1/voxel"] = Field(
        "auto", description="Unit of the linear attenuation in volumes; auto: as the files tell."
    )
    pixel_nm: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Edge of a pixel or voxel on the common grid, instead of what the files tell.",
        json_schema_extra=_unit("nm"),
    )
    energies_ev: tuple[float, ...] = Field(
        (),
        description="Photon energies, eV, in the order of the file or of the file names, instead of what they tell.",
        json_schema_extra=_unit("eV"),
    )
    theta_deg: tuple[float, ...] = Field(
        (),
        description="Angles, deg, of the projections of every energy, instead of what the files tell.",
        json_schema_extra=_unit("deg"),
    )


class AbsorbanceParameters(_Parameters):
    """How counts become absorbance."""

    contrast: Literal["absorption", "phase"] = Field(
        "absorption",
        description="What makes the contrast. Phase (Zernike) frames are aligned and reconstructed, not mapped.",
    )
    flats: Literal["auto", "own half", "nearest in time", "time-weighted", "next energy", "pca"] = Field(
        "auto",
        description="Flats a projection is divided by. auto: those of its half, unless others of the same energy leave "
        "clearly less in the air; time-weighted: between the flats before and after (after the last ones of an energy, "
        "the scaled ones of the next); pca: their principal components, weighted by the air.",
    )
    flats_at: tuple[str, ...] = Field(
        (),
        description="Exceptions, as 'energy in eV: flats': '8344: half 1' (or half 2, own half, nearest in time, "
        "time-weighted, next energy, pca). An energy without flats needs one: next energy takes the nearest, scaled.",
    )
    stray_light: Literal["blocked rows", "off"] = Field(
        "blocked rows",
        description="Subtract the level behind blocked rows of the camera from every frame; where no rows are blocked "
        "nothing is subtracted.",
    )
    mask_bad_pixels: bool = Field(True, description="Leave out pixels that are bad in the flats: shadows, dust, dead.")
    dark_below: float = Field(
        0.1, ge=0, le=0.9, description="Pixels darker than this part of the flat's median are left out as shadow."
    )
    dust_depth: float = Field(
        0.2,
        gt=0,
        le=10,
        description="Pixels that differ from their surroundings in the flat by more than this part are left out.",
    )
    remove_air: bool = Field(
        True, description="Subtract from every projection the surface fitted to the air around the object."
    )
    air_order: Literal["auto", "plane", "quadratic"] = Field(
        "auto", description="Terms of that surface; auto: quadratic where they predict air left out of the fit better."
    )
    air_margin_px: float = Field(
        6.0,
        ge=0,
        le=200,
        description="Distance kept between the object and what counts as air, for 256 columns.",
        json_schema_extra=_unit("px"),
    )

    @field_validator("flats_at")
    @classmethod
    def _known_flats(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            _flats_at(entry)
        return entries

    def flats_for(self, energy_ev: float) -> str:
        """Return the flats asked for at an energy: the exception, else the rule."""
        named = [use for ev, use in map(_flats_at, self.flats_at) if abs(ev - energy_ev) <= 0.05]
        return named[-1] if named else self.flats


FLAT_CHOICES = ("auto", "own half", "nearest in time", "time-weighted", "next energy", "pca")


def check_flats(use: str) -> str:
    """Return `use` when it names flats (a policy, or ``half N``); raise ValueError otherwise."""
    if use in FLAT_CHOICES or (use.startswith("half ") and use[5:].isdigit() and 1 <= int(use[5:]) <= 99):
        return use
    raise ValueError(f"expected {', '.join(FLAT_CHOICES)} or 'half N', got {use[:60]!r}")


def _flats_at(entry: str) -> tuple[float, str]:
    """Return (energy in eV, flats) of an entry of `flats_at` such as ``8344: half 1``."""
    energy, _, use = entry.partition(":")
    try:
        ev = float(energy.strip().removesuffix("eV"))
    except ValueError:
        raise ValueError(f"expected 'energy in eV: flats', as '8344: half 1', got {entry[:60]!r}") from None
    return ev, check_flats(use.strip())


class JitterParameters(_Parameters):
    """How the displacement of every projection within one tomogram is found."""

    screen: bool = Field(
        True, description="Exclude projections without beam, saturated, copied, displaced, blurred or empty."
    )
    refine: bool = Field(True, description="Refine the moments by reprojection where that is better.")
    iterations: int = Field(
        6,
        ge=0,
        le=100,
        description="Reprojection iterations at most; up to 12 more where projections were left out late.",
    )
    max_shift_px: float = Field(
        200.0,
        gt=0,
        le=1000,
        description="Largest displacement looked for, for 1024 columns.",
        json_schema_extra=_unit("px"),
    )


class RegistrationParameters(_Parameters):
    """How the tomograms of all energies are brought onto one grid."""

    reference_ev: float | None = Field(
        None,
        gt=0,
        description="Reference energy; by default the highest one at least 150 eV above the last edge.",
        json_schema_extra=_unit("eV"),
    )
    fine_px: float = Field(
        0.7,
        ge=0,
        le=10,
        description="Inner width of the band-pass (difference of Gaussians), px of a 256 px frame.",
        json_schema_extra=_unit("px"),
    )
    coarse_px: float = Field(
        2.0,
        gt=0,
        le=50,
        description="Outer width of the band-pass (difference of Gaussians), px of a 256 px frame.",
        json_schema_extra=_unit("px"),
    )
    blur_px: float = Field(
        0.75,
        ge=0,
        le=5,
        description="Blur of the recorded intensities (point spread and pixel, standard deviation). It acts before the "
        "logarithm, so that particles of different contrast seem to differ in size; this is taken out.",
        json_schema_extra=_unit("px"),
    )
    iterations: int = Field(12, ge=1, le=100, description="Gauss-Newton iterations at most per scale.")
    correct_angles: bool = Field(
        True,
        description="Reconstruct an energy at the angles it was really seen at, where they differ from the "
        "reference's for certain (5 standard errors, 0.05 degrees); filtered back-projection only.",
    )


SCALE_CHANGES = ("instrument", "instrument x shrinkage")
"""What the user can say of a scale that departs from the calibration, see `MapsParameters.scale_change`."""

EDGE_MEASURES = (
    "edge_energy_half",
    "edge_energy_50",
    "edge_energy_derivative",
    "edge_energy_integral",
    "white_line",
    "white_line_height",
)


class ReferenceFile(NamedTuple):
    """One entry of `MapsParameters.references`: ``name=file[#group] [valence=number]``."""

    name: str
    file: str
    group: str | None
    valence: float | None


def _reference(entry: str) -> ReferenceFile:
    found = re.fullmatch(
        r"\s*(?P<name>[A-Za-z0-9][A-Za-z0-9_]*)\s*=\s*(?P<file>[^#=\s][^#=]*?)\s*(#\s*(?P<group>[^#=]+?)\s*)?"
        r"(\s+valence\s*=\s*(?P<valence>[-+]?\d+(\.\d*)?))?\s*",
        entry,
    )
    if found is None:
        raise ValueError(f"expected entries such as NiO=NiO.xdi valence=2 or NiO=set.prj#NiO foil, got {entry!r}")
    valence = found["valence"]
    return ReferenceFile(found["name"], found["file"], found["group"], None if valence is None else float(valence))


class MapsParameters(_Parameters):
    """How the aligned projections become volumes and maps."""

    elements: tuple[str, ...] | None = Field(
        None, description="Elements to map; by default those whose K edge the energies bracket."
    )
    scanned_edge: str | None = Field(
        None, description="Element whose K edge was scanned; by default the one with most energies around it."
    )
    leave_out_below_ev: float = Field(
        15.0,
        ge=0,
        le=200,
        description="Energies left out of the element fit begin this far below the scanned edge.",
        json_schema_extra=_unit("eV"),
    )
    leave_out_above_ev: float = Field(
        60.0,
        ge=0,
        le=500,
        description="Energies left out of the element fit end this far above the scanned edge.",
        json_schema_extra=_unit("eV"),
    )
    scanned_edge_in_elements: bool = Field(
        True,
        description="Use the energies left out for the amounts as well: not with the table, but with the edge as the "
        "particle's mean spectrum shows it, free to move and broaden. What then still follows the edge's position is "
        "measured on the particle and taken out. Less noise; a white line whose height changes where the edge does not "
        "move counts as amount.",
    )
    attenuation: Literal["elam", "chantler"] = Field("elam", description="Table of mass attenuation.")
    white_line_factors: tuple[str, ...] = Field(
        (),
        description="Declared height of an edge's step from the edge to 60 eV above it, relative to the table, such as "
        "Mn=1.15. Without one it is 1, unless white_line_from_spectrum is asked for and finds another.",
    )
    white_line_from_spectrum: bool = Field(
        False,
        description="Where no factor is declared and the particle's mean spectrum contradicts 1, take the factor that "
        "agrees with its energies outside the white lines. What is taken is always said; without this it is suggested.",
    )
    voxel_px: int = Field(
        0,
        ge=0,
        le=16,
        description="Voxel of the chemistry; 0 takes the smallest of 1, 2, 3, 4, 6 px whose noise / edge jump, with "
        "the smoothing applied, is at most noise_limit.",
        json_schema_extra=_unit("px"),
    )
    noise_limit: float = Field(
        0.1, gt=0, le=10, description="Largest noise / edge jump of a voxel when its size is chosen automatically."
    )
    scale_change: Literal["instrument", "instrument x shrinkage"] = Field(
        "instrument",
        description="What a measured scale that departs from the calibration of the pixel size is taken for. "
        "instrument: the magnification. instrument x shrinkage: the particle's size, its mass kept; every energy's "
        "absorbance is brought to that of the particle at the reference energy, by the square of its size.",
    )
    common_blur: bool = Field(
        False,
        description="Blur every energy to the point spread of the widest one before they are combined: an energy out "
        "of focus fakes a rim around every particle. Costs resolution; the standard errors know it.",
    )
    fill_lost: bool = Field(
        True,
        description="Fill lost projections from their neighbours in the angle for the reconstruction, where there is "
        "one on either side near enough; they are marked in the table of quality.",
    )
    reconstruction: Literal["fbp", "sirt", "cgls", "tomopy-gridrec", "tomopy-sirt"] = Field(
        "fbp",
        description="Filtered back-projection, or an iterative algorithm (many times slower, for few or missing "
        "angles), or TomoPy's where it is installed. All but fbp use only the angles that every energy has, and the "
        "maps of sigma stay those of fbp.",
    )
    iterations: int = Field(
        0, ge=0, le=1000, description="Of an iterative reconstruction; 0 takes 100 for SIRT and 10 for CGLS."
    )
    filter: Literal["ramp", "shepp-logan", "cosine", "hann"] = Field(
        "ramp",
        description="Window on the ramp filter of the filtered back-projection; all but ramp blur the slices, not y.",
    )
    half_sets: bool = Field(
        True,
        description="Align every other projection of the reference energy on its own, with every other flat, and "
        "correlate the two halves (Fourier shells) before and after each step; takes about as long as the flats and "
        "the jitter correction of one energy.",
    )
    local_tomography: bool = Field(
        False,
        description="The particle is wider than the field: continue every line beyond the field with its last value "
        "before the filter of fbp.",
    )
    non_negative: bool = Field(
        False,
        description="No amount of an element is negative: least squares with that constraint, on the reconstructed "
        "volumes. It makes every mean over voxels with little of an element too large, so that it is off by default; "
        "the errors stay those without it.",
    )
    smoothing_voxel: float = Field(
        1.0,
        ge=0,
        le=10,
        description="Sigma of the Gaussian applied to the maps.",
        json_schema_extra=_unit("voxel"),
    )
    shape_smoothing: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Smoothing of the particle's shape (all energies together) as a part of that of the maps; "
        "1 switches the sharpening of the densities at cracks and surfaces off.",
    )
    energy_offset_ev: float | None = Field(
        None,
        description="Monochromator offset added to absolute edge energies; they stay uncalibrated without it.",
        json_schema_extra=_unit("eV"),
    )
    edge_measures: tuple[str, ...] = Field(
        (),
        description=f"Further measures of the edge in every voxel: {', '.join(EDGE_MEASURES)}. Every energy of the "
        "edge is then reconstructed.",
    )
    pre_edge_from_ev: float = Field(
        -200.0,
        ge=-1000,
        le=0,
        description="The line below the edge is fitted from here, relative to the tabulated edge.",
        json_schema_extra=_unit("eV"),
    )
    pre_edge_to_ev: float = Field(
        -20.0,
        ge=-1000,
        le=0,
        description="The line below the edge is fitted up to here, relative to the tabulated edge.",
        json_schema_extra=_unit("eV"),
    )
    post_edge_from_ev: float = Field(
        60.0,
        ge=0,
        le=2000,
        description="The line above the edge is fitted from here, relative to the tabulated edge.",
        json_schema_extra=_unit("eV"),
    )
    post_edge_to_ev: float = Field(
        300.0,
        ge=0,
        le=2000,
        description="The line above the edge is fitted up to here, relative to the tabulated edge.",
        json_schema_extra=_unit("eV"),
    )
    free_slopes: bool = Field(
        False,
        description="Fit the slopes below and above the edge in every voxel instead of taking the particle's; "
        "edge_measures only.",
    )
    references: tuple[str, ...] = Field(
        (),
        description="Reference spectra whose fractions are mapped (linear combination), such as NiO=NiO.xdi valence=2 "
        "or LNO=set.prj#LiNiO2 valence=3: a name, a file (.xdi, Athena .prj, .csv, two columns), the spectrum in it, "
        "and its valence where it is known.",
    )

    @field_validator("white_line_factors")
    @classmethod
    def _factors(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            element, _, number = item.partition("=")
            try:
                factor = float(number)
            except ValueError:
                factor = float("nan")
            if not (element.strip().isalpha() and 0.2 <= factor <= 5):
                raise ValueError(f"expected entries such as Mn=1.15 (factors from 0.2 to 5), got {item!r}")
        return value

    @field_validator("edge_measures")
    @classmethod
    def _measures(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            if item not in EDGE_MEASURES:
                near = difflib.get_close_matches(item, EDGE_MEASURES, n=1, cutoff=0)
                raise ValueError(f"expected some of {', '.join(EDGE_MEASURES)}, got {item!r}; did you mean {near[0]}?")
        return tuple(dict.fromkeys(value))

    @field_validator("references")
    @classmethod
    def _references(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [_reference(item).name for item in value]
        twice = [n for n in names if names.count(n) > 1]
        if twice:
            raise ValueError(f"expected references of different names, got {twice[0]!r} twice")
        return value

    @model_validator(mode="after")
    def _windows(self) -> Self:
        for name in ("pre", "post"):
            low, high = getattr(self, f"{name}_edge_from_ev"), getattr(self, f"{name}_edge_to_ev")
            if not low < high:
                raise ValueError(f"expected {name}_edge_from_ev below {name}_edge_to_ev, got {low:g} and {high:g}")
        return self

    @property
    def pre_edge_ev(self) -> tuple[float, float]:
        """Window of the line below the edge, eV from it."""
        return self.pre_edge_from_ev, self.pre_edge_to_ev

    @property
    def post_edge_ev(self) -> tuple[float, float]:
        """Window of the line above the edge, eV from it."""
        return self.post_edge_from_ev, self.post_edge_to_ev

    @property
    def reference_files(self) -> tuple[ReferenceFile, ...]:
        """What `references` say, taken apart."""
        return tuple(_reference(item) for item in self.references)

    def white_line(self, element: str) -> float:
        """Return the declared white-line factor of an element, 1 where there is none."""
        declared = self.declared_white_line(element)
        return 1.0 if declared is None else declared

    def declared_white_line(self, element: str) -> float | None:
        """Return the declared white-line factor of an element, None where there is none."""
        named = [item.partition("=") for item in self.white_line_factors]
        return next((float(f) for e, _, f in reversed(named) if e.strip() == element), None)


class Recipe(_Parameters):
    """Every parameter of a run. The same file serves the GUI and the command line."""

    version: Literal[1] = 1
    on_fail: Literal["continue", "stop"] = Field(
        "continue",
        description="What a run without a user does where a score misses its threshold: go on and flag it, or stop.",
    )
    scan: ScanParameters = ScanParameters()
    given: GivenParameters = GivenParameters()
    absorbance: AbsorbanceParameters = AbsorbanceParameters()
    jitter: JitterParameters = JitterParameters()
    registration: RegistrationParameters = RegistrationParameters()
    maps: MapsParameters = MapsParameters()

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe; files of references that stand beside it are named with their whole path.

        Raises
        ------
        XanesTomoError
            The file cannot be read, is not YAML, or holds an unknown key or a value out of bounds; unknown
            keys are named together with the nearest known one.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise XanesTomoError(f"recipe {path.name}: cannot be read ({error}); give a YAML text file") from None
        recipe = cls.from_text(text, path.name)
        found = []
        for entry, item in zip(recipe.maps.references, recipe.maps.reference_files, strict=True):
            beside = path.absolute().parent / item.file
            name, _, rest = entry.partition("=")
            found.append(f"{name}={rest.replace(item.file, str(beside), 1)}" if beside.exists() else entry)
        maps = recipe.maps.model_copy(update={"references": tuple(found)})
        return recipe.model_copy(update={"maps": maps})

    @classmethod
    def from_text(cls, text: str, name: str = "recipe") -> Recipe:
        """Parse the YAML `text` of a recipe; see `from_yaml`."""
        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            line = str(error).replace("\n", " ")
            raise XanesTomoError(f"{name}: expected YAML, but {line[:300]}") from None
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise XanesTomoError(f"{name}: expected `key: value` lines, got a {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise XanesTomoError(f"{name}: {_explain(error, cls)}") from None

    @classmethod
    def schema_text(cls) -> str:
        """Return the JSON schema of a recipe, as text."""
        return json.dumps(cls.model_json_schema(), indent=2, ensure_ascii=False) + "\n"

    def same_work(self, other: Recipe) -> bool:
        """Whether both ask for the same results: what is done about a missed threshold does not count."""
        return self.model_copy(update={"on_fail": other.on_fail}) == other

    def to_yaml(self) -> str:
        """Return the recipe as YAML text; reading it back gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parameter_key(*parts: Any) -> str:
    """Return 16 hex digits that identify `parts` (models, numbers, texts, sequences of them)."""

    def plain(x: Any) -> Any:
        if isinstance(x, BaseModel):
            return x.model_dump(mode="json")
        if isinstance(x, (list, tuple)):
            return [plain(i) for i in x]
        return x

    text = json.dumps([plain(p) for p in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 4
_SHORT.maxstring = _SHORT.maxother = 60


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for key in location:
        info = model.model_fields.get(str(key))
        if info is None:
            return []
        kinds = [info.annotation, *get_args(info.annotation)]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(k) for k in item["loc"]) or "the file"
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.0)
            hint = f"; the nearest known key is {near[0]!r}" if near else ""
            lines.append(f"unknown key {where!r}{hint}")
        else:
            # Not `repr`: YAML aliases make values that are small in the file and endless when written out.
            lines.append(f"{where}: {item['msg']}, got {_SHORT.repr(item['input'])}")
    return "; ".join(lines)
