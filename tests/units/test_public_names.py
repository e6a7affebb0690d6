"""`sa_lens.units` as a user imports it."""

from __future__ import annotations

import pkgutil

import sa_lens.units


def test_what_is_promised_is_there():
    for name in sa_lens.units.__all__:
        assert getattr(sa_lens.units, name).__module__.startswith(("sa_lens.units.", "sa_lens.core.unit"))


def test_no_module_hides_behind_a_function_of_its_name():
    modules = {found.name for found in pkgutil.iter_modules(sa_lens.units.__path__)}
    assert not modules & set(sa_lens.units.__all__)


def test_measures_are_called_by_their_names(gated, text):
    table = sa_lens.units.sparsity(gated)
    assert {"mean_abs", "hoyer", "gini"} <= set(table.columns)
    assert len(sa_lens.units.specialization(gated, text[6:], text[:6], progress=False).table)
