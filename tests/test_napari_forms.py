"""Forms: every default, bound, unit and tooltip of every recipe section arrives, and values come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.recipe import MapsParameters, Recipe

pytest.importorskip("qtpy.QtWidgets")

from magicgui.widgets import CheckBox, ComboBox, FloatSpinBox, LineEdit, SpinBox
from qtpy.QtCore import QPoint, QPointF, Qt
from qtpy.QtGui import QWheelEvent
from qtpy.QtWidgets import QApplication

from napari_xanes_tomo._napari.forms import AutomaticField, ParameterForm, label_of, unit_of
from napari_xanes_tomo._napari.maps_dock import FOLDED

SECTIONS = {n: i.annotation for n, i in Recipe.model_fields.items() if isinstance(i.default, BaseModel)}


@pytest.fixture
def make_form(qtbot: Any) -> Iterator[Any]:
    made = []

    def make(model: type[BaseModel], folded: Any = None) -> ParameterForm:
        form = ParameterForm(model, folded)
        made.append(form)
        return form

    yield make
    for form in made:
        form.close()


def inner(widget: Any) -> Any:
    return widget.inner if isinstance(widget, AutomaticField) else widget


@pytest.mark.parametrize("name", SECTIONS)
def test_everything_arrives(make_form: Any, name: str) -> None:
    model = SECTIONS[name]
    form = make_form(model)
    assert list(form.widgets) == list(model.model_fields), "a field without a widget"
    assert form.value == model()
    for field, info in model.model_fields.items():
        widget = form.widgets[field]
        number = inner(widget)
        assert info.description
        assert widget.tooltip == info.description
        assert number.tooltip == info.description
        native = number.native
        bounds = {
            k: v for m in info.metadata for k in ("ge", "gt", "le", "lt") if (v := getattr(m, k, None)) is not None
        }
        if isinstance(number, SpinBox):
            low, high = native.minimum(), native.maximum()
            assert low == bounds.get("ge", bounds.get("gt", -(2**31) - 1) + 1 if "gt" in bounds else -(2**31))
            assert high == bounds.get("le", 2**31 - 1)
        elif isinstance(number, FloatSpinBox):
            low, high = native.minimum(), native.maximum()
            if "ge" in bounds:
                assert low == bounds["ge"]
            elif "gt" in bounds:
                assert bounds["gt"] < low <= bounds["gt"] + 1e-3
            else:
                assert low <= -1e9
            assert high == bounds["le"] if "le" in bounds else high >= 1e9
            assert native.suffix().strip() == unit_of(info)
        else:
            assert not bounds
        if unit_of(info) and not isinstance(number, (FloatSpinBox, SpinBox)):
            assert isinstance(number, LineEdit)  # several numbers in a line: the tooltip says the unit
            assert f", {unit_of(info)}" in widget.tooltip
        if isinstance(number, ComboBox):
            assert number.choices == info.annotation.__args__
        shown = number.text if isinstance(number, CheckBox) else widget.label
        assert shown.lower().startswith(label_of(field, info).lower())


EDITED: dict[str, dict[str, Any]] = {
    "given": {"kind": "volumes", "unit": "1/um", "pixel_nm": 25.5, "energies_ev": (8300.0, 8350.5)},
    "scan": {"flip_rows": True, "theta_sign": -1, "bin": 4, "pixel_law_slope_nm_per_ev": 0.00212345678901},
    "absorbance": {"remove_air": False, "air_margin_px": 7.123456789},
    "jitter": {"refine": False, "iterations": 0, "max_shift_px": 0.0625},
    "registration": {"reference_ev": 8570.0, "fine_px": 0.0, "coarse_px": 49.999, "iterations": 100},
    "maps": {
        "elements": ("Mn", "Ni"),
        "scanned_edge": "Ni",
        "filter": "hann",
        "smoothing_voxel": 1 / 3,
        "energy_offset_ev": -1.5,
    },
}


@pytest.mark.parametrize("name", SECTIONS)
def test_values_come_back_equal(make_form: Any, name: str) -> None:
    model = SECTIONS[name]
    form = make_form(model)
    edited = model(**EDITED[name])
    assert edited != model()
    form.value = edited
    assert form.value == edited
    form.value = model()
    assert form.value == model()


def test_every_edge_of_every_bound_is_accepted(make_form: Any) -> None:
    for model in SECTIONS.values():
        form = make_form(model)
        for name, widget in form.widgets.items():
            number = inner(widget)
            if isinstance(number, (SpinBox, FloatSpinBox)):
                for value in (number.native.minimum(), number.native.maximum()):
                    form.value = model()
                    number.native.setValue(value)
                    if name.endswith(("_from_ev", "_to_ev")):  # two ends of a window have to stay in order as well
                        with suppress(XanesTomoError):
                            assert form.value
                    else:
                        assert form.value  # not refused


def test_automatic_is_none_and_switches_its_number_off(make_form: Any) -> None:
    form = make_form(SECTIONS["registration"])
    row = form.widgets["reference_ev"]
    assert not row.inner.enabled
    row.automatic.value = False
    assert row.inner.enabled
    row.inner.value = 8570.0
    assert form.value.reference_ev == 8570.0
    row.automatic.value = True
    assert form.value.reference_ev is None


def test_changes_are_told_once_the_user_makes_them(make_form: Any) -> None:
    form = make_form(SECTIONS["jitter"])
    told = []
    form.changed.connect(lambda: told.append(1))
    form.value = SECTIONS["jitter"](iterations=3)
    assert not told
    form.widgets["iterations"].native.setValue(5)
    assert told
    assert form.value.iterations == 5


def test_the_wheel_does_not_change_a_number_that_was_not_clicked(make_form: Any) -> None:
    form = make_form(SECTIONS["jitter"])
    native = form.widgets["iterations"].native
    middle = QPointF(5, 5)
    event = QWheelEvent(
        middle, middle, QPoint(0, 120), QPoint(0, 120), Qt.MouseButton.NoButton, Qt.KeyboardModifier.NoModifier,
        Qt.ScrollPhase.NoScrollPhase, False,
    )  # fmt: skip
    QApplication.sendEvent(native, event)
    assert form.value.iterations == SECTIONS["jitter"]().iterations


def test_what_the_section_refuses_is_said_in_plain_words(make_form: Any) -> None:
    class Odd(BaseModel):
        name: Literal["a", "b"] = Field("a", description="One of two.")
        code: str = Field("x", description="A text.", pattern="^x")
        count_px: int = Field(3, ge=1, description="A number with a unit.", json_schema_extra={"unit": "px"})

    form = make_form(Odd)
    assert form.widgets["count_px"].label == "Count (px)"
    form.widgets["code"].value = "yes"
    with pytest.raises(XanesTomoError, match=r"^Code: .*pattern"):
        _ = form.value
    form.widgets["code"].value = "xylo"
    assert form.value == Odd(code="xylo")


def test_a_field_of_a_kind_nobody_knows_is_not_dropped_silently(make_form: Any) -> None:
    class Strange(BaseModel):
        grid: dict[str, int] = Field(default_factory=dict)

    with pytest.raises(TypeError, match=r"Strange\.grid: no widget"):
        make_form(Strange)


def test_the_lists_of_elements(make_form: Any) -> None:
    form = make_form(SECTIONS["maps"])
    edit = form.widgets["elements"]
    assert isinstance(edit, LineEdit)
    edit.value = " Mn , Ni,"
    assert form.value.elements == ("Mn", "Ni")
    edit.value = " "
    assert form.value.elements is None


def test_decimals_never_round_a_recipe(make_form: Any) -> None:
    form = make_form(SECTIONS["jitter"])
    for value in (0.1 + 0.2, 12.3456789012345, 999.0):
        form.value = SECTIONS["jitter"](max_shift_px=value)
        assert form.value.max_shift_px == value


def test_what_few_change_is_folded_away_and_says_when_it_was_changed(make_form: Any, qtbot: Any) -> None:
    away = [name for names in FOLDED.values() for name in names]
    assert len(set(away)) == len(away)
    assert set(away) < set(MapsParameters.model_fields)
    form = make_form(MapsParameters, FOLDED)
    qtbot.addWidget(form.native)
    form.native.show()
    assert form.widgets["voxel_px"].native.isVisible()
    assert not any(inner(form.widgets[name]).native.isVisible() for name in away)
    part = form.parts["Reconstruction"]
    qtbot.mouseClick(part.button, Qt.MouseButton.LeftButton)
    assert form.widgets["filter"].native.isVisible()
    assert not form.widgets["free_slopes"].native.isVisible()
    told = []
    form.changed.connect(lambda: told.append(form.value.filter))
    form.widgets["filter"].value = "hann"
    assert told == ["hann"]
    assert part.button.text() == "Reconstruction (changed)"
    form.value = MapsParameters(free_slopes=True)
    assert [p.button.text() for p in form.parts.values()] == [
        "Fit of the elements", "Measures of the edge (changed)", "Reconstruction",
    ]  # fmt: skip
