"""Forms for recipe sections: every pydantic field as a magicgui widget with its default, bounds, unit and tooltip."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from magicgui.widgets import CheckBox, ComboBox, Container, FloatSpinBox, LineEdit, SpinBox
from psygnal import Signal
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from qtpy.QtCore import QEvent, QObject, Qt
from qtpy.QtWidgets import QAbstractSpinBox, QComboBox, QSizePolicy, QToolButton, QVBoxLayout, QWidget

from napari_xanes_tomo.model import XanesTomoError

__all__ = ["AutomaticField", "Folded", "ParameterForm", "StillWheel", "label_of", "unit_of"]

_INT_LIMIT = 2**31 - 1
_FLOAT_LIMIT = 1e12
_FEWEST_DECIMALS = 3
_MOST_DECIMALS = 15


def unit_of(info: FieldInfo) -> str:
    """Return the unit of a field, ``""`` where it has none."""
    extra = info.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, Mapping) else ""


def label_of(name: str, info: FieldInfo) -> str:
    """Return the name of a field for people: ``max_shift_px`` is "Max shift" (its unit stands behind the number)."""
    unit = unit_of(info).lower().replace("/", "_per_")
    plain = name.removesuffix(f"_{unit}") if unit else name
    return plain.replace("_", " ").capitalize()


def _bounds(info: FieldInfo) -> dict[str, float]:
    found = {}
    for item in info.metadata:
        for key in ("ge", "gt", "le", "lt"):
            value = getattr(item, key, None)
            if value is not None:
                found[key] = value
    return found


def _decimals(value: float) -> int:
    """Return how many decimals a number needs to come back unchanged."""
    text = f"{value:.{_MOST_DECIMALS}f}".rstrip("0")
    return max(_FEWEST_DECIMALS, len(text.partition(".")[2]) if float(text) == value else _MOST_DECIMALS)


class StillWheel(QObject):
    """Keeps the wheel from changing a number while the user only scrolls past it."""

    def watch(self, widget: QWidget) -> None:
        """Let `widget` take the wheel only once it was clicked."""
        widget.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        widget.installEventFilter(self)

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        """Pass the wheel on to what lies behind."""
        if event is None or event.type() != QEvent.Type.Wheel or not isinstance(watched, QWidget) or watched.hasFocus():
            return False
        event.ignore()
        return True


class Folded(QWidget):
    """A title that shows and hides what lies below it; hidden at first.

    Parameters
    ----------
    title : str
    inside : QWidget
    tooltip : str
    """

    def __init__(self, title: str, inside: QWidget, tooltip: str) -> None:
        super().__init__()
        self.inside = inside
        self.button = QToolButton()
        self.button.setText(title)
        self.button.setToolTip(tooltip)
        self.button.setCheckable(True)
        self.button.setAutoRaise(True)
        self.button.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self.button.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.button.toggled.connect(self._show)
        box = QVBoxLayout(self)
        box.setContentsMargins(0, 0, 0, 0)
        box.setSpacing(0)
        box.addWidget(self.button)
        box.addWidget(inside)
        self._show(False)

    def _show(self, opened: bool) -> None:
        self.button.setArrowType(Qt.ArrowType.DownArrow if opened else Qt.ArrowType.RightArrow)
        self.inside.setVisible(opened)


class AutomaticField(Container[Any]):
    """A widget beside a box "automatic": None while the box is ticked."""

    def __init__(self, inner: Any, *, name: str, label: str, tooltip: str) -> None:
        self.automatic = CheckBox(text="automatic", value=True, tooltip=tooltip)
        self.inner = inner
        super().__init__(layout="horizontal", widgets=[self.automatic, inner], labels=False, name=name, label=label)
        self.margins = (0, 0, 0, 0)
        self.tooltip = tooltip
        inner.enabled = False
        self.automatic.changed.connect(self._toggle)

    def _toggle(self, automatic: bool) -> None:
        self.inner.enabled = not automatic

    def get(self) -> Any:
        """Return the value, None for automatic."""
        return None if self.automatic.value else self.inner.value

    def set(self, value: Any) -> None:
        """Show `value`, None for automatic."""
        self.automatic.value = value is None
        if value is not None:
            _put(self.inner, value)


def _put(widget: Any, value: Any) -> None:
    if isinstance(widget, FloatSpinBox):
        # Never fewer decimals than the number has: the form would change it by being looked at.
        widget.native.setDecimals(max(widget.native.decimals(), _decimals(float(value))))
    widget.value = value


def _number(kind: Any, info: FieldInfo, common: dict[str, Any], default: float | None) -> Any:
    bounds = _bounds(info)
    suffix = f" {unit_of(info)}" if unit_of(info) else ""
    if kind is int:
        low = int(bounds.get("ge", bounds.get("gt", -_INT_LIMIT - 1) + 1))
        high = int(bounds.get("le", bounds.get("lt", _INT_LIMIT + 1) - 1))
        if suffix:  # this spin box has no place for it
            common = {**common, "label": f"{common['label']} ({unit_of(info)})"}
        spin = SpinBox(min=low, max=high, value=min(max(int(default or 0), low), high), **common)
        spin.native.setKeyboardTracking(False)
        return spin
    decimals = _decimals(default if default is not None else 0.0)
    tiny = 10.0**-decimals
    low_f = float(bounds.get("ge", bounds.get("gt", -_FLOAT_LIMIT - tiny) + tiny))
    high_f = float(bounds.get("le", bounds.get("lt", _FLOAT_LIMIT + tiny) - tiny))
    box = FloatSpinBox(min=0.0, max=1.0, step=1.0, value=0.0, **common)
    box.native.setDecimals(decimals)
    box.native.setRange(low_f, high_f)
    box.native.setStepType(box.native.StepType.AdaptiveDecimalStepType)
    box.native.setSuffix(suffix)
    box.native.setKeyboardTracking(False)
    box.value = min(max(default if default is not None else 0.0, low_f), high_f)
    return box


def _texts(widget: LineEdit) -> tuple[str, ...] | None:
    parts = tuple(p.strip() for p in str(widget.value).split(",") if p.strip())
    return parts or None


class ParameterForm:
    """A form made from one section of the recipe.

    Parameters
    ----------
    model : type of BaseModel
        The section, e.g. `JitterParameters`. Its fields may be bool, int, float, a Literal, str, a tuple of str, or one
        of these or None, which stands for automatic.
    folded : mapping of str to sequence of str, optional
        Titles of parts that are folded away until they are opened, and the fields in them; the others stay on top.

    Attributes
    ----------
    native : QWidget
        Goes into a layout.
    widgets : dict of str to magicgui widget
        By the names of the fields.
    parts : dict of str to Folded
        What is folded, by title.
    changed : psygnal Signal
        Emitted without arguments when the user changed something.
    """

    changed = Signal()

    def __init__(self, model: type[BaseModel], folded: Mapping[str, Sequence[str]] | None = None) -> None:
        self.model = model
        self._get: dict[str, Callable[[], Any]] = {}
        self._set: dict[str, Callable[[Any], None]] = {}
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self.widgets: dict[str, Any] = {n: self._make(n, i) for n, i in model.model_fields.items()}
        self.native = QWidget()
        box = QVBoxLayout(self.native)
        box.setContentsMargins(0, 0, 0, 0)
        box.setSpacing(2)
        away = {name for names in (folded or {}).values() for name in names}
        self._containers = [self._together([n for n in self.widgets if n not in away])]
        box.addWidget(self._containers[0].native)
        self.parts: dict[str, Folded] = {}
        for title, names in (folded or {}).items():
            inside = self._together(names)
            part = Folded(title, inside.native, ", ".join(label_of(n, model.model_fields[n]) for n in names))
            box.addWidget(part)
            self._containers.append(inside)
            self.parts[title] = part
        self._folded = dict(folded or {})
        self._defaults: dict[str, Any] = {}
        self.value = model()
        self._defaults = {name: get() for name, get in self._get.items()}
        for container in self._containers:
            container.changed.connect(self._relay)
        self._still = StillWheel()
        for kind in (QAbstractSpinBox, QComboBox):
            for child in self.native.findChildren(kind):
                self._still.watch(child)

    def _together(self, names: Sequence[str]) -> Container[Any]:
        container: Container[Any] = Container(widgets=[self.widgets[n] for n in names], labels=True)
        container.margins = (0, 0, 0, 0)
        return container

    def close(self) -> None:
        """Let the widgets go."""
        for container in self._containers:
            container.close()
        self.native.deleteLater()

    def _relay(self) -> None:
        self._mark()
        self.changed.emit()

    def _mark(self) -> None:
        """Say in the title of a folded part that something in it is not at its default."""
        for title, part in self.parts.items():
            changed = any(self._get[n]() != self._defaults.get(n, self._get[n]()) for n in self._folded[title])
            part.button.setText(f"{title} (changed)" if changed else title)

    def _make(self, name: str, info: FieldInfo) -> Any:
        kind, optional = info.annotation, False
        if get_origin(kind) in (Union, types.UnionType):
            inner = [k for k in get_args(kind) if k is not type(None)]
            optional = len(inner) < len(get_args(kind))
            kind = inner[0] if len(inner) == 1 else None
        common: dict[str, Any] = {"name": name, "label": label_of(name, info), "tooltip": info.description or ""}
        default = info.default
        widget: Any
        if get_origin(kind) is tuple or kind is str:
            widget = LineEdit(value="", **common)
            widget.native.setPlaceholderText("automatic" if optional else "")
            if kind is str:
                self._get[name] = lambda: str(widget.value).strip() or (None if optional else "")
                self._set[name] = lambda v: setattr(widget, "value", v or "")
            else:
                self._get[name] = lambda: _texts(widget) if optional else _texts(widget) or ()
                self._set[name] = lambda v: setattr(widget, "value", ", ".join(map(str, v or ())))
            return widget
        if kind is bool:
            widget = CheckBox(value=bool(default), **{**common, "label": ""}, text=common["label"])
        elif get_origin(kind) is Literal:
            shown = [(f"{c:+d}" if isinstance(c, int) else str(c), c) for c in get_args(kind)]
            widget = ComboBox(choices=shown, **common)
        elif kind is int or kind is float:
            if optional:
                common = {**common, "label": ""}
            widget = _number(kind, info, common, default)
        else:
            raise TypeError(f"{self.model.__name__}.{name}: no widget for {info.annotation}")
        if optional:
            row = AutomaticField(widget, name=name, label=label_of(name, info), tooltip=info.description or "")
            self._get[name], self._set[name] = row.get, row.set
            return row
        self._get[name] = lambda: widget.value
        self._set[name] = lambda v: _put(widget, v)
        return widget

    @property
    def value(self) -> Any:
        """The parameters as the form shows them.

        Raises
        ------
        XanesTomoError
            They are refused by the section; says why.
        """
        try:
            return self.model(**{name: self._unrounded(name, get()) for name, get in self._get.items()})
        except ValidationError as error:
            first = error.errors()[0]
            where = str(first["loc"][0]) if first["loc"] else ""
            name = label_of(where, self.model.model_fields[where]) if where in self.model.model_fields else "parameters"
            raise XanesTomoError(f"{name}: {first['msg']}") from None

    @value.setter
    def value(self, parameters: BaseModel) -> None:
        with self.changed.blocked():
            for name, put in self._set.items():
                given = getattr(parameters, name)
                put(given)
                self._loaded[name] = (self._get[name](), given)
        self._mark()

    def _unrounded(self, name: str, shown: Any) -> Any:
        """Return the value that was put in, to its last digit, unless the user changed what is shown of it."""
        loaded, given = self._loaded[name]
        return given if shown == loaded else shown

    @property
    def enabled(self) -> bool:
        """Whether the widgets can be used."""
        return bool(self.native.isEnabled())

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self.native.setEnabled(enabled)
