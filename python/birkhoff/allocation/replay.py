"""Runs a model again where only what follows a changed tensor is computed anew."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from torch import nn

Result = TypeVar("Result")

#: The names of modules inside one another.
Path = tuple[str, ...]


class Replay(Generic[Result]):
    """A run of a model whose parts are remembered.

    Parts are the children of the model and those of its outermost ``nn.ModuleList``: its blocks.
    When tensors change, the parts that are called before the first one that holds any of them give
    what they gave the first time. The model must make the same calls in every run.

    Attributes:
        result: What the first run gave.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Result]) -> None:
        """Runs the model for the first time."""
        self._model = model
        self._run = run
        self._parts = dict(_parts(model, ()))
        #: What each call of a part gave, by the part and the number of the call.
        self._outputs: dict[tuple[nn.Module, int], Any] = {}
        self.result = self._run_with(self._remember)

    def part_of(self, name: str) -> Path:
        """The innermost part that holds a tensor; that of the model itself is ()."""
        path = tuple(name.split("."))
        return max(
            (at for at in self._parts.values() if path[: len(at)] == at), key=len, default=()
        )

    def again(self, names: Iterable[str]) -> Result:
        """Runs the model after tensors of these names have changed."""
        tensors = self._model.state_dict()
        changed = {tensors[name].data_ptr() for name in names}
        # Tied tensors change under all their names.
        first = {self.part_of(name) for name, t in tensors.items() if t.data_ptr() in changed}
        holders = {
            part for part, at in self._parts.items() if any(p[: len(at)] == at for p in first)
        }
        called = {self._parts[part] for part, _ in self._outputs}
        # What holds a tensor without being called has it used from outside, no telling when.
        reached = not first <= called

        def call(part: nn.Module, number: int, forward: Callable[[], Any]) -> Any:
            nonlocal reached
            if not reached and part not in holders:
                return copy.deepcopy(self._outputs[part, number])
            reached = reached or self._parts[part] in first
            return forward()

        result = self._run_with(call)
        # Else the tensor was used without a call of the part that holds it, or not at all.
        return result if reached else self._run(self._model)

    def _remember(self, part: nn.Module, number: int, forward: Callable[[], Any]) -> Any:
        output = forward()
        # What comes after may change it in place.
        self._outputs[part, number] = copy.deepcopy(output)
        return output

    def _run_with(self, call: Callable[[nn.Module, int, Callable[[], Any]], Any]) -> Result:
        """Runs the model with ``call`` in the place of its parts."""
        numbers: Counter[nn.Module] = Counter()

        def replaced(part: nn.Module) -> Callable[..., Any]:
            forward = part.forward

            def counted(*arguments: Any, **options: Any) -> Any:
                number = numbers[part]
                numbers[part] += 1
                return call(part, number, lambda: forward(*arguments, **options))

            return counted

        own = {part: part.__dict__.get("forward") for part in self._parts}
        try:
            for part in self._parts:
                part.__dict__["forward"] = replaced(part)
            return self._run(self._model)
        finally:
            for part, forward in own.items():
                part.__dict__.pop("forward", None)
                if forward is not None:
                    part.__dict__["forward"] = forward


def _parts(module: nn.Module, path: Path) -> Iterable[tuple[nn.Module, Path]]:
    """The parts inside of a module, each with its path."""
    is_list = isinstance(module, nn.ModuleList)
    for name, child in module.named_children():
        at = (*path, name)
        if (is_list or not path) and not isinstance(child, nn.ModuleList):
            yield child, at
        if not is_list:
            yield from _parts(child, at)
