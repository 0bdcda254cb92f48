"""A widget that brings a picture along, for exported notebooks and forges, where no widget runs."""

from __future__ import annotations

import base64
from typing import Any

from toolkit.notebook.extra import check_extra

check_extra()

import ipywidgets  # noqa: E402


class WithPicture(ipywidgets.VBox):
    """A box of widgets whose output in a notebook also holds a PNG and a text."""

    def picture(self) -> bytes:
        """Return what is on the screen as a PNG."""
        raise NotImplementedError

    def summary(self) -> str:
        """Return what is on the screen in words."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        picture = base64.b64encode(self.picture()).decode()
        return {**(data or {}), "text/plain": self.summary(), "image/png": picture}, metadata
