"""The digital twin: an NMC-like battery particle measured by a virtual transmission X-ray microscope.

The twin is written as real ``.xrm`` files with the script, names and order of acquisition of TomoBank
``tomo_00089`` (doi 10.1088/1361-6501/aa9c19), and its truth beside it in the format of a run's output. Nothing
here is shared with the solver: the particle is drawn on a grid 1.5 times finer, projected by Joseph's method
(doi 10.1109/TMI.1982.4307572) and sampled by the point spread of the virtual detector. What disturbs a real
measurement can be switched on one by one: see `TwinParameters`.
"""

from .files import write_twin
from .microscope import Truth, draw_motion, simulate
from .parameters import PRESETS, TwinParameters, twin_parameters
from .particle import ni_xanes

__all__ = [
    "PRESETS",
    "Truth",
    "TwinParameters",
    "draw_motion",
    "ni_xanes",
    "simulate",
    "twin_parameters",
    "write_twin",
]
