"""What a Lightning module's checkpoints hold of its methods and subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtu_fast._checks.warned import warn
from mtu_fast.engine import Engine
from mtu_fast.integrations import _resuming
from mtu_fast.methods import Method
from mtu_fast.subspace import Subspace

KEY = "mtu_fast"  # of a checkpoint


class Checkpointed:
    """Stands before `LightningModule` among the bases; knows methods and subspaces by the names of their attributes."""

    _engine: Engine | None = None
    _rows: Mapping[str, Any] | None = None  # of a checkpoint, until there is an engine to take them
    _strays: tuple[str, ...] = ()  # what was given to `unlearn` and no checkpoint will know

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the states of the module's methods and subspaces: those that are its attributes.

        Args:
            checkpoint: as `LightningModule.on_save_checkpoint` is given it.
        """
        module: Any = self
        parent: Any = super()
        parent.on_save_checkpoint(checkpoint)
        if self._strays:
            warn(
                f"lightning: found {' and '.join(self._strays)} given to unlearn and held by no attribute of the "
                "module, so that this checkpoint does not know where they stand; hold each as one, as in "
                "self.method = ... in __init__."
            )
        methods, rows = self._methods(), {}
        for name, subspace in self._subspaces().items():
            # an engine first takes in what the checkpoint before held
            rows[name] = _resuming.states_of_rows(module.engine, subspace)
        states = {name: _resuming.state_of_method(method) for name, method in methods.items()}
        checkpoint[KEY] = {"methods": states, "subspaces": rows}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what `on_save_checkpoint` added; kept rows once there is an engine.

        Args:
            checkpoint: as `LightningModule.on_load_checkpoint` is given it.
        """
        parent: Any = super()
        parent.on_load_checkpoint(checkpoint)
        if KEY not in checkpoint:
            return
        states, methods = checkpoint[KEY], self._methods()
        lost = [name for name in states["methods"] if name not in methods]
        lost += [name for name in states["subspaces"] if name not in self._subspaces()]
        if lost:
            warn(
                f"lightning: found the states of {lost} in the checkpoint, expected attributes of these names: what "
                "they are called now begins anew."
            )
        for name, method in methods.items():
            if name in states["methods"]:
                _resuming.resume_method(method, states["methods"][name])
        self._rows = states["subspaces"]
        if self._engine is not None:
            self._take_rows(self._engine)

    def _take_rows(self, engine: Engine) -> None:
        """What a checkpoint had of the module's subspaces."""
        rows, self._rows = self._rows or {}, None
        for name, subspace in self._subspaces().items():
            if name in rows:
                _resuming.resume_rows(engine, subspace, rows[name])

    def _methods(self) -> dict[str, Method]:
        """The module's own, by the names of their attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Method)}

    def _subspaces(self) -> dict[str, Subspace]:
        """Likewise."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Subspace)}

    def _note_strays(self, *given: Method | Subspace | None) -> None:
        """Remember what has a state and is no attribute, for a word when a checkpoint is written."""
        held = {id(value) for value in vars(self).values()}
        for each in given:
            if each is not None and id(each) not in held and _has_state(each):
                self._strays = tuple(dict.fromkeys([*self._strays, f"a {type(each).__name__}"]))


def _has_state(given: Method | Subspace) -> bool:
    """Whether what was given changes from step to step."""
    return isinstance(given, Subspace) or bool(given.generators() or given.state_dict())
