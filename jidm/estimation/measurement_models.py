"""The measurement model of each kind of Jacobian field."""

from __future__ import annotations

from jidm.errors import InputError
from jidm.estimation.analytic_measurement import AnalyticMeasurement, AnalyticOptions
from jidm.estimation.learned_measurement import LearnedMeasurement, LearnedOptions
from jidm.fields.base import JacobianField
from jidm.fields.free import LearnedField

Options = AnalyticOptions | LearnedOptions


def measurement_model(
    field: JacobianField | LearnedField, options: Options | None = None
) -> AnalyticMeasurement | LearnedMeasurement:
    """The measurement model of a field; the default options suit most video.

    Raises:
        InputError: the options are those of another kind of field.
    """
    if isinstance(field, LearnedField):
        options = LearnedOptions() if options is None else options
        if isinstance(options, LearnedOptions):
            return LearnedMeasurement(field, options)
    else:
        options = AnalyticOptions() if options is None else options
        if isinstance(options, AnalyticOptions):
            return AnalyticMeasurement(field, options)
    expected = LearnedOptions if isinstance(field, LearnedField) else AnalyticOptions
    raise InputError(f"a {type(field).__name__} takes {expected.__name__}, got {options!r}")
